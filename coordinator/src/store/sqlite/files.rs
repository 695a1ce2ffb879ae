//! The file itself: what may be taken for ours, and what may lie beside it.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use mesh_core::node::MeshId;

use super::APPLICATION_ID;
use crate::state_dir::{StateDir, digest};
use crate::store::OpenError;

/// A start or a restore that died between its marker and its rename left a whole file: take it.
/// Without a marker, or beside a database, it is the rest of an attempt that never counted.
pub(super) fn finish_rename(state: &StateDir, marker: Option<MeshId>) -> Result<(), OpenError> {
    let (new, path) = (state.database_new(), state.database());
    if !exists(&new)? {
        return Ok(());
    }
    if marker.is_some() && !exists(&path)? {
        remove_side_files(&path)?;
        fs::rename(&new, &path).map_err(|error| OpenError::StateDir(error.into()))
    } else {
        remove_database(&new)
    }
}

pub(super) fn remove_database(path: &Path) -> Result<(), OpenError> {
    remove(path)?;
    remove_side_files(path)
}

/// A write-ahead log belongs to one file only; beside another it could be taken for its own.
fn remove_side_files(path: &Path) -> Result<(), OpenError> {
    for suffix in ["-wal", "-shm", "-journal"] {
        remove(&side_file(path, suffix))?;
    }
    Ok(())
}

pub(in crate::store) fn side_file(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

fn remove(path: &Path) -> Result<(), OpenError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(OpenError::StateDir(error.into()))
        }
        _ => Ok(()),
    }
}

pub(super) fn exists(path: &Path) -> Result<bool, OpenError> {
    // A link to nowhere exists too: somebody put it there.
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(OpenError::StateDir(error.into())),
    }
}

/// Looks at the bytes before SQLite may touch them.
pub(super) fn check_header(path: &Path) -> Result<(), OpenError> {
    let mut header = [0; 100];
    let io = |error: std::io::Error| OpenError::StateDir(error.into());
    let mut file = fs::File::open(path).map_err(io)?;
    let length = file.metadata().map_err(io)?.len();
    let read = file.read_exact(&mut header);
    // The page size is 1 for 65,536, which does not fit.
    let page = match u64::from(u16::from_be_bytes([header[16], header[17]])) {
        1 => 65_536,
        page => page,
    };
    let what = if read.is_err() {
        "it is shorter than a database's header"
    } else if &header[..16] != b"SQLite format 3\0" {
        "it is not an SQLite file"
    } else if header[68..72] != APPLICATION_ID.to_be_bytes() {
        "its header is not one of ours"
    } else if page == 0 || (length % page != 0 && log_length(path) == 0) {
        "it ends in the middle of a page"
    } else {
        return Ok(());
    };
    Err(OpenError::Damaged {
        path: show(path),
        what: what.to_owned(),
    })
}

fn log_length(path: &Path) -> u64 {
    fs::metadata(side_file(path, "-wal")).map_or(0, |log| log.len())
}

/// A database that was closed in good order is what it was, to the last bit, and has no log.
pub(super) fn check_seal(path: &Path, seal: &[u8; 32]) -> Result<(), OpenError> {
    let now = digest(path).map_err(|error| OpenError::StateDir(error.into()))?;
    if now == *seal && log_length(path) == 0 {
        return Ok(());
    }
    Err(OpenError::Damaged {
        path: show(path),
        what: "it changed after the coordinator had closed it".to_owned(),
    })
}

pub(super) fn show(path: &Path) -> String {
    path.display().to_string()
}
