//! The file system of the virtual machine, as a cpio archive that the kernel unpacks at boot.
//!
//! Programs are the host's own, with the shared libraries that the host's loader names: the same
//! ones that the rings on the host run. Not compressed: under emulation unpacking would cost more
//! than reading.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

use super::run::{self, tool};

#[derive(Debug, Default)]
pub(super) struct Tree {
    /// By absolute path inside, parents before children because of the order of strings.
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug)]
enum Entry {
    Folder,
    Link(String),
    Console,
    Copy { source: PathBuf, mode: u32 },
    Text { contents: Vec<u8> },
}

impl Tree {
    pub(super) fn new() -> Self {
        let mut tree = Self::default();
        for folder in [
            "/dev",
            "/proc",
            "/sys",
            "/run",
            "/tmp",
            "/root",
            "/etc",
            "/usr/bin",
            "/usr/sbin",
            "/usr/lib",
            "/usr/lib64",
            "/var/lib",
            "/var/log",
        ] {
            tree.folder(folder);
        }
        for (link, target) in [
            ("/bin", "usr/bin"),
            ("/sbin", "usr/sbin"),
            ("/lib", "usr/lib"),
            ("/lib64", "usr/lib64"),
        ] {
            tree.insert(link, Entry::Link(target.to_owned()));
        }
        // Init's standard streams, before it mounts /dev.
        tree.insert("/dev/console", Entry::Console);
        tree
    }

    pub(super) fn folder(&mut self, at: &str) {
        self.insert(at, Entry::Folder);
    }

    pub(super) fn text(&mut self, at: &str, contents: impl Into<Vec<u8>>) {
        let contents = contents.into();
        self.insert(at, Entry::Text { contents });
    }

    pub(super) fn file(&mut self, at: &str, source: &Path) {
        self.copy(at, source, 0o644);
    }

    /// A program of the host, at the place where the host has it.
    pub(super) fn tool(&mut self, name: &str) -> Result<()> {
        let found = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"]
            .iter()
            .map(|folder| Path::new(folder).join(name))
            .find(|path| path.exists())
            .with_context(|| format!("{name} is not installed: `cargo xtask setup`"))?;
        self.program(&inner_path(&found)?, &found)
    }

    /// A program with the libraries it needs.
    pub(super) fn program(&mut self, at: &str, source: &Path) -> Result<()> {
        // Says what the loader would load: `name => /path (0x…)`, or the loader's own path alone.
        // It refuses static programs, and those need nothing.
        let listing = tool("ldd").arg(source).output().context("run ldd")?;
        if listing.status.success() {
            for line in String::from_utf8_lossy(&listing.stdout).lines() {
                ensure!(!line.contains("not found"), "{}: {line}", source.display());
                let path = line.split("=>").last().unwrap_or(line);
                let path = path.split_whitespace().next().map(Path::new);
                if let Some(library) = path.filter(|path| path.is_absolute()) {
                    self.copy(&inner_path(library)?, library, 0o755);
                }
            }
        }
        self.copy(at, source, 0o755);
        Ok(())
    }

    fn copy(&mut self, at: &str, source: &Path, mode: u32) {
        let source = source.to_owned();
        self.insert(at, Entry::Copy { source, mode });
    }

    fn insert(&mut self, at: &str, entry: Entry) {
        let parents = at.match_indices('/').map(|(end, _)| &at[..end]);
        for parent in parents.filter(|parent| !parent.is_empty()) {
            self.entries
                .entry(parent.to_owned())
                .or_insert(Entry::Folder);
        }
        self.entries.insert(at.to_owned(), entry);
    }

    /// Writes the archive and returns its size in bytes.
    pub(super) fn write(&self, path: &Path) -> Result<u64> {
        let file = File::create(path).with_context(|| format!("make {}", path.display()))?;
        let mut archive = BufWriter::new(file);
        for (number, (at, entry)) in (1..).zip(&self.entries) {
            let (mode, contents) = match entry {
                Entry::Folder => (0o040_755, Vec::new()),
                Entry::Link(target) => (0o120_777, target.clone().into_bytes()),
                Entry::Console => (0o020_600, Vec::new()),
                Entry::Text { contents } => (0o100_644, contents.clone()),
                Entry::Copy { source, mode } => {
                    let contents =
                        fs::read(source).with_context(|| format!("read {}", source.display()))?;
                    (0o100_000 | mode, contents)
                }
            };
            let device = match entry {
                Entry::Console => (5, 1),
                Entry::Folder | Entry::Link(_) | Entry::Copy { .. } | Entry::Text { .. } => (0, 0),
            };
            let name = at.trim_start_matches('/');
            record(&mut archive, number, name, mode, device, &contents)
                .with_context(|| format!("write {}", path.display()))?;
        }
        record(&mut archive, 0, "TRAILER!!!", 0, (0, 0), &[]).context("end the archive")?;
        let file = archive.into_inner().context("flush the archive")?;
        Ok(file.metadata().context("measure the archive")?.len())
    }
}

/// One entry in the "new ASCII" format of cpio(5): thirteen numbers in hex, name, contents, the
/// latter two padded to four bytes.
fn record(
    archive: &mut impl Write,
    number: u32,
    name: &str,
    mode: u32,
    device: (u32, u32),
    contents: &[u8],
) -> io::Result<()> {
    let size = u32::try_from(contents.len()).map_err(io::Error::other)?;
    let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
    write!(archive, "070701")?;
    for field in [
        number, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0,
    ] {
        write!(archive, "{field:08x}")?;
    }
    archive.write_all(name.as_bytes())?;
    // The header is 110 bytes long.
    archive.write_all(&[0; 4][..1 + padding(110 + name.len() + 1)])?;
    archive.write_all(contents)?;
    archive.write_all(&[0; 4][..padding(contents.len())])
}

fn padding(length: usize) -> usize {
    length.wrapping_neg() % 4
}

/// Where a file of the host belongs inside: its folder resolved, because `/lib` is a link to
/// `/usr/lib` on both sides, its own name kept, because `libc.so.6` may be one as well.
fn inner_path(path: &Path) -> Result<String> {
    let folder = path.parent().context("a file has a folder")?;
    let name = path.file_name().context("a file has a name")?;
    let folder = fs::canonicalize(folder).with_context(|| format!("find {}", folder.display()))?;
    Ok(folder.join(name).to_string_lossy().into_owned())
}

/// A copy without debugging information, which the machine's memory is too dear for.
pub fn stripped(source: &Path, folder: &Path) -> Result<PathBuf> {
    let name = source.file_name().context("a program has a name")?;
    let target = folder.join(name);
    run::quietly(
        tool("strip")
            .arg("--strip-debug")
            .arg("-o")
            .arg(&target)
            .arg(source),
    )?;
    Ok(target)
}
