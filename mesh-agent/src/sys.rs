//! Every `unsafe` of the agent: raw system calls that no crate wraps.
//!
//! Each function is safe to call with any argument; what the kernel is told about lengths is
//! derived here from slices and never taken from a caller.
#![expect(unsafe_code, reason = "the one place for raw system calls")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use tokio::io::unix::AsyncFd;

pub(crate) mod bpf;
pub(crate) mod maps;
pub(crate) mod tun;
pub(crate) mod udp;

/// Registers `fd` with the runtime of the caller, which it must be called in.
pub(crate) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open, and is one and the same file, for as long as it lives; the
    // `AsyncFd` owns it.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}

/// Sets an option whose value is a C `int`.
pub(crate) fn set_option(fd: impl AsFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: pointer and length describe `value`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    check(result).map(drop)
}

/// The supplementary groups that the process at the other end of a unix socket had when it
/// connected (`SO_PEERGROUPS`, unix(7)). More than a process may have (NGROUPS_MAX) is an error.
pub(crate) fn peer_groups(socket: &impl AsFd) -> io::Result<Vec<u32>> {
    const MOST: usize = 65_536;
    let mut groups: Vec<libc::gid_t> = vec![0; 64];
    loop {
        let mut length = size_of_val(groups.as_slice()) as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes, which is the size of the buffer.
        let result = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let held = length as usize / size_of::<libc::gid_t>();
        if result == 0 {
            groups.truncate(held);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        // ERANGE tells how much there is.
        if error.raw_os_error() != Some(libc::ERANGE) || held <= groups.len() || held > MOST {
            return Err(error);
        }
        groups.resize(held, 0);
    }
}

fn check(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}
