//! The state directory: which files make a coordinator, and how each is written.
//!
//! The hard part is to tell "new" from "lost". A database is only ever created when neither it nor
//! the marker exists; from then on the marker says which mesh lives here, and the head file says how
//! far it had come and what it was when it was closed, so a database that was emptied, swapped, cut
//! short or flipped a bit of is noticed even where SQLite itself would call it sound.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use mesh_core::key::MachineKey;
use mesh_core::node::{Epoch, Generation, MeshId};
use rand_core::{OsRng, RngCore as _};
use rustix::fs::FlockOperation;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

/// First line of the marker file; the mesh id in hexadecimal follows.
const MARKER_HEADER: &str = "mesh-coordinator instance v1";
/// First word of the head file.
const HEAD_HEADER: &str = "mesh-coordinator-head";

/// How far the database had come, as far as is known, and what its file was when it was closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    pub epoch: Epoch,
    pub generation: Generation,
    /// SHA-256 of the closed file; `None` while a coordinator runs, and after one was killed.
    pub seal: Option<[u8; 32]>,
}

/// The directory, locked for this process for as long as the value lives.
#[derive(Debug)]
pub struct StateDir {
    root: PathBuf,
    head: Option<File>,
    _lock: File,
}

impl StateDir {
    /// Makes the directory if need be (0700) and takes its lock.
    pub fn open(root: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(root).with_context(|| format!("make {}", root.display()))?;
        fs::set_permissions(root, fs::Permissions::from_mode(0o700))
            .with_context(|| format!("restrict {} to its owner", root.display()))?;
        let path = root.join("lock");
        let lock = private().create(true).truncate(false).open(&path);
        let lock = lock.with_context(|| format!("open {}", path.display()))?;
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            bail!(
                "{} belongs to a mesh-coordinator that is running; stop it first",
                root.display()
            );
        }
        Ok(Self {
            root: root.to_owned(),
            head: None,
            _lock: lock,
        })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn database(&self) -> PathBuf {
        self.root.join("coordinator.db")
    }

    /// Where a database is prepared before it takes its place by a rename.
    pub fn database_new(&self) -> PathBuf {
        self.root.join("coordinator.db.new")
    }

    fn marker_path(&self) -> PathBuf {
        self.root.join("instance")
    }

    pub fn key_path(&self) -> PathBuf {
        self.root.join("coordinator.key")
    }

    // === marker ===

    /// Which mesh lives here; `None` when none ever did.
    pub fn marker(&self) -> anyhow::Result<Option<MeshId>> {
        let path = self.marker_path();
        let text = match fs::read(&path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        let id = text
            .strip_prefix(MARKER_HEADER)
            .and_then(|rest| <[u8; 16]>::try_from(hex::decode(rest.trim()).ok()?).ok());
        match id {
            Some(id) => Ok(Some(MeshId(id))),
            None => bail!(
                "{} is damaged; put it back from a copy, or run `mesh-coordinator db restore FILE`",
                path.display()
            ),
        }
    }

    pub fn write_marker(&self, mesh: MeshId) -> anyhow::Result<()> {
        let text = format!("{MARKER_HEADER}\n{mesh}\n");
        write_atomically(&self.marker_path(), text.as_bytes())
    }

    // === head ===

    /// What the last run noted; `None` when it is missing or unreadable, which only weakens checks.
    pub fn head(&self) -> Option<Head> {
        let text = fs::read_to_string(self.root.join("head")).ok()?;
        let mut words = text.split_whitespace();
        if words.next() != Some(HEAD_HEADER) {
            return None;
        }
        let epoch = words.next()?.parse().ok()?;
        let generation = words.next()?.parse().ok()?;
        let seal = words.next()?;
        let seal = <[u8; 32]>::try_from(hex::decode(seal).unwrap_or_default()).ok();
        (words.next() == Some(".")).then_some(Head {
            epoch: Epoch(epoch),
            generation: Generation(generation),
            seal,
        })
    }

    /// Notes what was acknowledged. It is not flushed to the disk, so it may lag after a power cut;
    /// it never leads. A failure only weakens a later check, so it is not an error.
    pub fn raise_head(&mut self, epoch: Epoch, generation: Generation) {
        drop(self.write_head(epoch, generation, None));
    }

    /// The database is about to change: from now on its bytes are vouched for by its rows only.
    pub fn break_seal(&mut self, epoch: Epoch, generation: Generation) -> io::Result<()> {
        self.write_head(epoch, generation, None)?.sync_all()
    }

    /// The database is closed for good: until the next start not one bit of it may change. Where
    /// its log could not be folded in, as on a full disk, there is nothing to seal yet.
    pub fn seal(&mut self, epoch: Epoch, generation: Generation) -> io::Result<()> {
        let log = self.root.join("coordinator.db-wal");
        let seal = match fs::metadata(log) {
            Ok(log) if log.len() > 0 => None,
            _ => Some(digest(&self.database())?),
        };
        self.write_head(epoch, generation, seal)?.sync_all()
    }

    fn write_head(
        &mut self,
        epoch: Epoch,
        generation: Generation,
        seal: Option<[u8; 32]>,
    ) -> io::Result<&File> {
        let seal = seal.map_or_else(|| "-".repeat(64), hex::encode);
        let line = format!(
            "{HEAD_HEADER} {:020} {:020} {seal} .\n",
            epoch.0, generation.0
        );
        let file = match self.head.take() {
            Some(file) => file,
            None => private()
                .create(true)
                .truncate(false)
                .open(self.root.join("head"))?,
        };
        // One write of one line of always the same length: a reader sees the old or the new one.
        file.write_all_at(line.as_bytes(), 0)?;
        Ok(self.head.insert(file))
    }

    // === the coordinator's key ===

    /// The coordinator's private key. `may_create` only where no mesh depends on the old one.
    pub fn key(&self, may_create: bool) -> anyhow::Result<MachineKey> {
        let path = self.key_path();
        match File::open(&path) {
            Ok(file) => read_key(file).with_context(|| format!("read {}", path.display())),
            Err(error) if error.kind() == io::ErrorKind::NotFound && may_create => {
                let mut seed = Zeroizing::new([0; 32]);
                OsRng.fill_bytes(&mut *seed);
                let text = Zeroizing::new(hex::encode(*seed));
                write_atomically(&path, text.as_bytes())?;
                Ok(MachineKey::from_seed(*seed))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => bail!(
                "{} is missing: every node pins this key, so put it back from your copy",
                path.display()
            ),
            Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
        }
    }
}

fn read_key(mut file: File) -> anyhow::Result<MachineKey> {
    let mode = file.metadata()?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        bail!("others may read the key (mode {mode:o}); run chmod 600 on it");
    }
    let mut text = Zeroizing::new(String::new());
    file.read_to_string(&mut text)?;
    let mut seed = Zeroizing::new([0; 32]);
    if hex::decode_to_slice(text.trim(), &mut *seed).is_err() {
        bail!("the key is damaged; put it back from your copy");
    }
    Ok(MachineKey::from_seed(*seed))
}

/// SHA-256 of a file.
pub fn digest(path: &Path) -> io::Result<[u8; 32]> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    io::copy(&mut file, &mut hash)?;
    Ok(hash.finalize().into())
}

/// Opens for reading and writing; what it creates is 0600.
pub fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options
}

/// Writes a 0600 file that is there whole or not at all, also after a power cut.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let temporary = path.with_extension("tmp");
    let write = || -> io::Result<()> {
        let mut file = private().create(true).truncate(true).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        sync_directory(path)
    };
    write().with_context(|| format!("write {}", path.display()))
}

/// Makes the renames in `path`'s directory durable.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_process_is_kept_out() {
        let dir = tempfile::tempdir().unwrap();
        let first = StateDir::open(dir.path()).unwrap();
        let error = StateDir::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("running"), "{error}");
        drop(first);
        StateDir::open(dir.path()).unwrap();
    }

    #[test]
    fn a_key_is_made_once_private_and_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        assert!(state.key(false).is_err());
        let key = state.key(true).unwrap().public();
        assert_eq!(state.key(false).unwrap().public(), key);
        let mode = fs::metadata(state.key_path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        fs::set_permissions(state.key_path(), fs::Permissions::from_mode(0o640)).unwrap();
        assert!(format!("{:#}", state.key(true).unwrap_err()).contains("chmod 600"));
        write_atomically(&state.key_path(), b"").unwrap();
        assert!(format!("{:#}", state.key(true).unwrap_err()).contains("damaged"));
    }

    #[test]
    fn a_damaged_marker_is_not_an_absent_one() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        assert_eq!(state.marker().unwrap(), None);
        state.write_marker(MeshId([7; 16])).unwrap();
        assert_eq!(state.marker().unwrap(), Some(MeshId([7; 16])));
        for bytes in [&b""[..], b"mesh-coordinator instance v1\n", b"\xff\0\x01"] {
            write_atomically(&dir.path().join("instance"), bytes).unwrap();
            assert!(state.marker().is_err());
        }
    }

    #[test]
    fn the_head_survives_and_garbage_counts_as_unknown() {
        let dir = tempfile::tempdir().unwrap();
        let mut state = StateDir::open(dir.path()).unwrap();
        assert_eq!(state.head(), None);
        state.raise_head(Epoch(1), Generation(41));
        fs::write(state.database(), "closed").unwrap();
        state.seal(Epoch(1), Generation(42)).unwrap();
        let head = state.head().unwrap();
        assert_eq!((head.epoch, head.generation), (Epoch(1), Generation(42)));
        assert_eq!(head.seal, Some(digest(&state.database()).unwrap()));
        state.break_seal(Epoch(1), Generation(43)).unwrap();
        assert_eq!(state.head().unwrap().seal, None);
        fs::write(dir.path().join("head"), "mesh-coordinator-head 1").unwrap();
        assert_eq!(state.head(), None);
    }
}
