//! What the node remembers: its keys, its membership, the last signed netmap.
//!
//! Three files, each under a checksum and each with the version before beside it (`keys`, `keys.1`).
//! A file that does not hold its checksum is never used and never taken for an absent one: an agent
//! that made itself a new identity because a disk bit flipped would leave a ghost in the mesh and
//! its user locked out. The netmap is verified again, signature by signature, when it is loaded.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

mod record;
#[cfg(test)]
mod tests;

pub use record::{Identity, Loaded, Remembered};

/// First line of every file, so that a foreign file is known for one.
const MAGIC: &[u8] = b"mesh-agent state v1\n";
/// Hexadecimal SHA-256 and a line feed, behind the magic.
const CHECKSUM: usize = 65;
/// More than any state is: a wrong file must not fill the memory.
const LARGEST: u64 = 64 << 20;

/// Why the state cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// Damaged or foreign. The text says which file and what to do.
    #[error("{0}")]
    Corrupt(String),
    #[error("{context}")]
    Io {
        context: String,
        #[source]
        source: io::Error,
    },
}

/// A file as it was found.
#[derive(Debug)]
enum Found {
    Absent,
    Good(Vec<u8>),
    /// The newest one is damaged; this is the one before.
    Previous(Vec<u8>, String),
    Corrupt(String),
}

/// The folder, owned by the agent's user alone.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
}

impl StateDir {
    /// Makes the folder if it is not there, and closes it to everybody else.
    pub fn open(path: &Path) -> Result<Self, Unusable> {
        let io = |source| Unusable::Io {
            context: format!("open the state folder {}", path.display()),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(io)?;
        let mode = fs::metadata(path).map_err(io)?.permissions().mode();
        if mode & 0o077 != 0 {
            fs::set_permissions(path, Permissions::from_mode(0o700)).map_err(io)?;
        }
        Ok(Self {
            path: path.to_owned(),
        })
    }

    fn find(&self, name: &str) -> Result<Found, Unusable> {
        let newest = self.read(&self.path.join(name))?;
        let previous = self.read(&self.path.join(format!("{name}.1")))?;
        Ok(match (newest, previous) {
            (None, None) => Found::Absent,
            (Some(Ok(payload)), _) => Found::Good(payload),
            // A stop between the two renames of a write leaves only the version before.
            (None, Some(Ok(payload))) => Found::Good(payload),
            (Some(Err(reason)), Some(Ok(payload))) => Found::Previous(payload, reason),
            (Some(Err(reason)), _) | (None, Some(Err(reason))) => Found::Corrupt(reason),
        })
    }

    /// `None`: no such file. `Some(Err(_))`: it is there and is not ours or not whole.
    fn read(&self, path: &Path) -> Result<Option<Result<Vec<u8>, String>>, Unusable> {
        let shown = path.display();
        let io = |source| Unusable::Io {
            context: format!("read {shown}"),
            source,
        };
        let metadata = match fs::symlink_metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io(error)),
        };
        if !metadata.is_file() {
            return Ok(Some(Err(format!("{shown} is not a plain file"))));
        }
        if metadata.len() > LARGEST {
            return Ok(Some(Err(format!(
                "{shown} is too large to be a state file"
            ))));
        }
        if metadata.permissions().mode() & 0o077 != 0 {
            fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(io)?;
        }
        let bytes = fs::read(path).map_err(io)?;
        Ok(Some(
            open_envelope(&bytes)
                .map(<[u8]>::to_vec)
                .map_err(|what| format!("{shown} {what}")),
        ))
    }

    /// Replaces the file in one step; the version before stays beside it. Whatever fails, one of
    /// the two is whole. `rotate` is false while the file in place is known to be damaged: it must
    /// not push the good version before it out.
    fn write(&self, name: &str, payload: &[u8], rotate: bool) -> io::Result<()> {
        let path = self.path.join(name);
        let temporary = self.path.join(format!("{name}.tmp"));
        let written = write_synced(&temporary, payload);
        if let Err(error) = written {
            // A half-written file would keep a full disk full.
            let _ = fs::remove_file(&temporary);
            return Err(error);
        }
        if rotate && path.exists() {
            fs::rename(&path, self.path.join(format!("{name}.1")))?;
        }
        fs::rename(&temporary, &path)?;
        File::open(&self.path)?.sync_all()
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        for name in [name.to_owned(), format!("{name}.1")] {
            match fs::remove_file(self.path.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        File::open(&self.path)?.sync_all()
    }
}

fn write_synced(path: &Path, payload: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(MAGIC)?;
    file.write_all(checksum(payload).as_bytes())?;
    file.write_all(b"\n")?;
    file.write_all(payload)?;
    file.sync_all()
}

fn checksum(payload: &[u8]) -> String {
    hex::encode(Sha256::digest(payload))
}

/// The payload of a file that is ours and whole, else what is wrong with it.
pub fn open_envelope(bytes: &[u8]) -> Result<&[u8], &'static str> {
    if bytes.is_empty() {
        return Err("is empty");
    }
    let rest = bytes
        .strip_prefix(MAGIC)
        .ok_or("was not written by mesh-agent, or its head is damaged")?;
    let (stated, payload) = rest.split_at_checked(CHECKSUM).ok_or("is cut short")?;
    if stated == [checksum(payload).as_bytes(), b"\n"].concat() {
        Ok(payload)
    } else {
        Err("does not match its checksum: it is cut short or damaged")
    }
}
