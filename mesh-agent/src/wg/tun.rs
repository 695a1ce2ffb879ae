//! A TUN device of our own: whole IP packets in and out of a file descriptor.
//!
//! The device exists as long as its descriptor is open, so an agent that dies takes the interface
//! with it: traffic stops, fail closed. It is created down, and stays down until policy hangs on it.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::Context as _;
use rustix::fs::OFlags;
use rustix::io::{readv, writev};
use tracing::debug;

use super::Interface;
use crate::sys;

const DEVICE: &str = "/dev/net/tun";

/// Length of the `struct virtio_net_hdr` that stands before every packet.
pub const HEADER_LEN: usize = 10;

/// What the kernel may leave to us: checksums, and cutting TCP streams into packets.
const OFFLOADS: u32 = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;

#[derive(Debug)]
pub struct Tun {
    file: File,
    interface: Interface,
}

/// Where udev runs everybody may open the device: the right that counts is asked for afterwards.
fn not_open(error: io::Error) -> anyhow::Error {
    let remedy = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "udev opens it to everybody; where there is no udev, chmod 0666 it"
        }
        _ => "the userspace backend needs the tun module (modprobe tun)",
    };
    anyhow::Error::new(error).context(format!("open {DEVICE}: {remedy}"))
}

impl Tun {
    /// Creates the device, down. Reads and writes never wait.
    pub fn create(name: &str) -> anyhow::Result<Self> {
        use std::os::unix::fs::OpenOptionsExt as _;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlags::NONBLOCK.union(OFlags::CLOEXEC).bits().cast_signed())
            .open(DEVICE)
            .map_err(not_open)?;
        let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        sys::tun::set_iff(&file, name, flags).with_context(|| {
            format!(
                "create the TUN device {name}: this needs CAP_NET_ADMIN and a name that is free"
            )
        })?;
        if let Err(error) = sys::tun::set_offload(&file, OFFLOADS) {
            debug!(%error, "packets of one size only");
        }
        let index = rustix::net::netdevice::name_to_index(socket()?, name)
            .with_context(|| format!("look {name} up"))?;
        let interface = Interface {
            name: name.to_owned(),
            index,
        };
        Ok(Self { file, interface })
    }

    pub fn interface(&self) -> &Interface {
        &self.interface
    }

    /// Reads one packet with its header and returns its length; `WouldBlock` if there is none.
    pub(crate) fn read(
        &self,
        header: &mut [u8; HEADER_LEN],
        packet: &mut [u8],
    ) -> io::Result<usize> {
        let mut parts = [IoSliceMut::new(header), IoSliceMut::new(packet)];
        let len = readv(&self.file, &mut parts)?;
        Ok(len.saturating_sub(HEADER_LEN))
    }

    /// Hands one packet to the kernel; an error if the device is down.
    pub fn write(&self, header: &[u8; HEADER_LEN], packet: &[u8]) -> io::Result<()> {
        writev(&self.file, &[IoSlice::new(header), IoSlice::new(packet)])?;
        Ok(())
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Any socket will do for a question about an interface.
fn socket() -> io::Result<rustix::fd::OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    let (family, kind) = (AddressFamily::UNIX, SocketType::DGRAM);
    Ok(rustix::net::socket_with(
        family,
        kind,
        SocketFlags::CLOEXEC,
        None,
    )?)
}
