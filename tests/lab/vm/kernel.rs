//! Debian's kernels for the virtual machine: found, fetched, unpacked; nothing is installed.
//!
//! Package names carry the kernel's version, so which one is newest is asked of apt, and the
//! answer names the folder that caches it: a security update is picked up by itself. Modules lie
//! in the package without their dependency list, and compressed since 6.12.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::run::{self, tool};

/// How many package versions are tried: an index may still list what the archive dropped.
const TRIES: usize = 3;

#[derive(Debug)]
pub struct Kernel {
    /// Like `6.1.0-56-cloud-amd64`.
    pub release: String,
    pub(super) image: PathBuf,
    folder: PathBuf,
    /// By module name, its file relative to the modules' folder and those of what it needs.
    modules: HashMap<String, (String, Vec<String>)>,
    builtin: BTreeSet<String>,
}

impl Kernel {
    /// The newest cloud kernel of `series` (like `6.1`) that apt knows, else the newest cached.
    pub fn newest(series: &str, cache: &Path) -> Result<Self> {
        fs::create_dir_all(cache).with_context(|| format!("make {}", cache.display()))?;
        let mut packages = candidates(series)?;
        if packages.is_empty() {
            // Images of containers often come without apt's lists.
            run::quietly(tool("apt-get").args(["-q", "update"]))?;
            packages = candidates(series)?;
        }
        let mut refused = None;
        for package in packages.into_iter().take(TRIES) {
            match Self::obtain(&package, cache) {
                Ok(kernel) => return Ok(kernel),
                Err(error) => refused = Some(error),
            }
        }
        let mut cached: Vec<String> = fs::read_dir(cache)
            .context("read the cache of kernels")?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| is_of_series(name, series))
            .collect();
        cached.sort_by_key(|name| numbers(name));
        match (cached.pop(), refused) {
            (Some(package), _) => Self::open(&cache.join(package)),
            (None, Some(error)) => Err(error),
            (None, None) => bail!("apt knows no cloud kernel {series}: Debian 12 does"),
        }
    }

    fn obtain(package: &str, cache: &Path) -> Result<Self> {
        let folder = cache.join(package);
        if !folder.exists() {
            println!("fetch {package}");
            // Prepared aside and renamed, so that an interrupted run leaves no half a kernel.
            let scratch = tempfile::tempdir_in(cache).context("make a scratch folder")?;
            run::quietly(
                tool("apt-get")
                    .args(["-q", "-o", "APT::Sandbox::User=root", "download", package])
                    .current_dir(scratch.path()),
            )?;
            let archive = only_entry(scratch.path())?;
            let tree = scratch.path().join("tree");
            run::quietly(tool("dpkg").arg("-x").arg(archive).arg(&tree))?;
            let release = only_entry(&tree.join("lib/modules"))?;
            let release = release.file_name().context("unnamed release")?;
            run::quietly(tool("/sbin/depmod").arg("-b").arg(&tree).arg(release))?;
            fs::rename(&tree, &folder).context("keep the unpacked kernel")?;
        }
        Self::open(&folder)
    }

    fn open(unpacked: &Path) -> Result<Self> {
        let folder = only_entry(&unpacked.join("lib/modules"))?;
        let release = folder.file_name().and_then(|name| name.to_str());
        let release = release.context("unreadable release")?.to_owned();
        let dependencies = fs::read_to_string(folder.join("modules.dep"))
            .with_context(|| format!("read the dependencies of {release}"))?;
        let modules = dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(file, needs)| {
                let needs = needs.split_whitespace().map(str::to_owned).collect();
                (module_name(file), (file.to_owned(), needs))
            })
            .collect();
        let builtin = fs::read_to_string(folder.join("modules.builtin"))
            .with_context(|| format!("read what is built into {release}"))?;
        Ok(Self {
            image: unpacked.join(format!("boot/vmlinuz-{release}")),
            builtin: builtin.lines().map(module_name).collect(),
            release,
            folder,
            modules,
        })
    }

    /// Names and contents of the modules that `wanted` come to, each after those it needs.
    pub(super) fn closure(&self, wanted: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let mut files: Vec<&String> = Vec::new();
        for name in wanted {
            if self.builtin.contains(*name) {
                continue;
            }
            let (file, needs) = self
                .modules
                .get(*name)
                .with_context(|| format!("kernel {} has no module {name}", self.release))?;
            // modules.dep lists the nearest need first, which is the order of unloading.
            for file in needs.iter().rev().chain([file]) {
                if !files.contains(&file) {
                    files.push(file);
                }
            }
        }
        files
            .into_iter()
            .map(|file| Ok((module_name(file), self.read(file)?)))
            .collect()
    }

    fn read(&self, file: &str) -> Result<Vec<u8>> {
        let path = self.folder.join(file);
        let decompressor = match path.extension().and_then(|extension| extension.to_str()) {
            Some("xz") => "xz",
            Some("zst") => "zstd",
            _ => return fs::read(&path).with_context(|| format!("read {file}")),
        };
        run::output(
            tool(decompressor)
                .args(["--decompress", "--stdout"])
                .arg(&path),
        )
    }
}

/// Cloud kernels of the series, newest first; a signed one before the same unsigned.
fn candidates(series: &str) -> Result<Vec<String>> {
    let names =
        run::output(tool("apt-cache").args(["pkgnames", &format!("linux-image-{series}")]))?;
    let mut names: Vec<String> = String::from_utf8(names)
        .context("package names are text")?
        .lines()
        .filter(|name| is_of_series(name, series))
        .map(str::to_owned)
        .collect();
    names.sort_by_key(|name| (numbers(name), !name.ends_with("-unsigned")));
    names.reverse();
    Ok(names)
}

fn is_of_series(package: &str, series: &str) -> bool {
    package
        .strip_prefix("linux-image-")
        .and_then(|rest| rest.strip_prefix(series))
        // The meta-package has no patch level, and 6.1 is not 6.12.
        .is_some_and(|rest| rest.starts_with('.'))
        && package
            .strip_suffix("-unsigned")
            .unwrap_or(package)
            .ends_with("-cloud-amd64")
}

fn numbers(package: &str) -> Vec<u64> {
    package
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

/// `kernel/net/sched/cls_bpf.ko.xz` is module `cls_bpf`; file names may have dashes, modules not.
fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split('.').next().unwrap_or(name).replace('-', "_")
}

fn only_entry(folder: &Path) -> Result<PathBuf> {
    let entries: Vec<_> = fs::read_dir(folder)
        .and_then(Iterator::collect)
        .with_context(|| format!("read {}", folder.display()))?;
    ensure!(
        entries.len() == 1,
        "{} holds {} entries instead of one",
        folder.display(),
        entries.len()
    );
    Ok(entries[0].path())
}
