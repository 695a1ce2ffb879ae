//! "Something changed": netlink's multicast groups, debounced.
//!
//! What changed is not looked at. Whoever listens observes again and compares, so a notification
//! that the kernel dropped for want of room (ENOBUFS) is as good as any other.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::Context as _;
use rtnetlink::MulticastGroup;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout_at};

use crate::sys;

/// A change is reported when this long nothing further came: a roaming laptop's interface makes a
/// dozen notifications within some 50 ms.
const QUIET: Duration = Duration::from_millis(100);
/// And never later than this after the first, or a noisy host would hide everything.
const PATIENCE: Duration = Duration::from_millis(500);

const GROUPS: [MulticastGroup; 7] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
];

/// A stream of "something changed" in links, addresses, routes or rules.
#[derive(Debug)]
pub struct Monitor {
    socket: AsyncFd<OwnedFd>,
    /// When to report, and until when at most.
    due: Option<(Instant, Instant)>,
}

/// Starts to listen; changes from now on are reported.
pub fn monitor() -> anyhow::Result<Monitor> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    // Protocol 0 of this family is NETLINK_ROUTE.
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)
        .context("open a route netlink socket")?;
    let groups = GROUPS
        .iter()
        .fold(0, |set, group| set | 1 << (*group as u32 - 1));
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, groups))
        .context("listen to route netlink")?;
    Ok(Monitor {
        socket: sys::watch(socket)?,
        due: None,
    })
}

impl Monitor {
    /// Waits for the next change. Cancel-safe: a change that was seen is reported by the next call.
    pub async fn changed(&mut self) -> anyhow::Result<()> {
        loop {
            let Some((due, _)) = self.due else {
                self.drain().await?;
                continue;
            };
            match timeout_at(due, self.drain()).await {
                Ok(drained) => drained?,
                Err(_) => {
                    self.due = None;
                    return Ok(());
                }
            }
        }
    }

    /// Waits until the socket has something, throws it away and moves the time to report.
    async fn drain(&mut self) -> anyhow::Result<()> {
        let mut ready = self.socket.readable().await?;
        let mut seen = false;
        let mut buffer = [0_u8; 8192];
        loop {
            match rustix::net::recv(self.socket.get_ref(), &mut buffer, RecvFlags::DONTWAIT) {
                Ok(_) => seen = true,
                Err(rustix::io::Errno::NOBUFS) => seen = true,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => break,
                Err(error) => {
                    return Err(io::Error::from(error)).context("read route netlink");
                }
            }
        }
        ready.clear_ready();
        if seen {
            let now = Instant::now();
            let latest = self.due.map_or(now + PATIENCE, |(_, latest)| latest);
            self.due = Some(((now + QUIET).min(latest), latest));
        }
        Ok(())
    }
}
