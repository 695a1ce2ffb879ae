//! Entries of maps: taken from an object, made only where there is none, missing without harm.

use std::io;

use aya::Ebpf;
use aya::maps::{Map, MapError};

use super::error::AttachError;

/// `BPF_NOEXIST`: do not overwrite.
pub(super) const ONLY_NEW: u64 = 1;

pub(super) fn take<M: TryFrom<Map, Error = MapError>>(
    ebpf: &mut Ebpf,
    map: &'static str,
) -> Result<M, AttachError> {
    let found = ebpf.take_map(map).ok_or(AttachError::Incomplete(map))?;
    M::try_from(found).map_err(|source| AttachError::Map {
        map,
        source: Box::new(source),
    })
}

/// An answer to [`ONLY_NEW`].
pub(super) fn is_there(error: &MapError) -> bool {
    matches!(error, MapError::SyscallError(error) if error.io_error.raw_os_error() == Some(libc::EEXIST))
}

pub(super) fn ignore_missing(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
            Ok(())
        }
        Err(MapError::KeyNotFound) => Ok(()),
        other => other,
    }
}
