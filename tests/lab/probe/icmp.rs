//! Echo requests over an unprivileged ICMP socket: the kernel fills in identifier and checksum.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, ipproto};

#[derive(Debug)]
pub(super) struct Socket {
    socket: OwnedFd,
    request: u8,
}

const HEADER: usize = 8;

impl Socket {
    /// A socket whose answers come from this address only.
    pub(super) fn to(address: IpAddr) -> Result<Self> {
        // Types of echo requests: RFC 792, RFC 4443 section 4.1.
        let (family, protocol, request) = match address {
            IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP, 8),
            IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6, 128),
        };
        let socket = rustix::net::socket(family, SocketType::DGRAM, Some(protocol))
            .context("make an ICMP socket")?;
        rustix::net::connect(&socket, &SocketAddr::new(address, 0))
            .with_context(|| format!("find a way to {address}"))?;
        Ok(Self { socket, request })
    }

    /// What cannot be sent is as good as lost.
    pub(super) fn send(&self, number: u32) {
        let mut packet = [0; HEADER + 4];
        packet[0] = self.request;
        packet[6..HEADER].copy_from_slice(&number.to_be_bytes()[2..]);
        packet[HEADER..].copy_from_slice(&number.to_be_bytes());
        let _ = rustix::net::send(&self.socket, &packet, SendFlags::empty());
    }

    /// The number of the next reply.
    pub(super) fn receive(&self, limit: Duration) -> Option<u32> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.checked_duration_since(Instant::now())?;
            let timeout = Timespec::try_from(left).ok()?;
            let mut ready = [PollFd::new(&self.socket, PollFlags::IN)];
            if poll(&mut ready, Some(&timeout)).ok()? == 0 {
                return None;
            }
            let mut packet = [0_u8; 64];
            // An error that came back for an earlier packet is reported here, once.
            let Ok((length, _)) = rustix::net::recv(&self.socket, &mut packet, RecvFlags::DONTWAIT)
            else {
                continue;
            };
            if let Some(number) = packet[..length].get(HEADER..HEADER + 4) {
                return Some(u32::from_be_bytes(number.try_into().ok()?));
            }
        }
    }
}
