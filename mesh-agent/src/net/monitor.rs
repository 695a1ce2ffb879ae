//! "Something changed": netlink's multicast groups, debounced where looking again costs something.
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
    groups: Groups,
    /// When to report, and until when at most.
    due: Option<(Instant, Instant)>,
}

/// Starts to listen; changes from now on are reported.
pub fn monitor() -> anyhow::Result<Monitor> {
    Ok(Monitor {
        groups: Groups::join(&GROUPS)?,
        due: None,
    })
}

/// A stream of "something changed" in links alone, told at once: a new interface is open to its
/// neighbours until it is guarded.
#[derive(Debug)]
pub struct Links(Groups);

/// Starts to listen; changes from now on are reported.
pub fn links() -> anyhow::Result<Links> {
    Ok(Links(Groups::join(&[MulticastGroup::Link])?))
}

impl Links {
    /// Waits for the next change. Cancel-safe.
    pub async fn changed(&mut self) -> anyhow::Result<()> {
        self.0.heard().await
    }
}

impl Monitor {
    /// Waits for the next change. Cancel-safe: a change that was seen is reported by the next call.
    pub async fn changed(&mut self) -> anyhow::Result<()> {
        loop {
            let Some((due, _)) = self.due else {
                self.groups.heard().await?;
                self.postpone();
                continue;
            };
            match timeout_at(due, self.groups.heard()).await {
                Ok(heard) => {
                    heard?;
                    self.postpone();
                }
                Err(_) => {
                    self.due = None;
                    return Ok(());
                }
            }
        }
    }

    /// Moves the time to report.
    fn postpone(&mut self) {
        let now = Instant::now();
        let latest = self.due.map_or(now + PATIENCE, |(_, latest)| latest);
        self.due = Some(((now + QUIET).min(latest), latest));
    }
}

/// Multicast groups that we are in.
#[derive(Debug)]
struct Groups(AsyncFd<OwnedFd>);

impl Groups {
    fn join(groups: &[MulticastGroup]) -> anyhow::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // Protocol 0 of this family is NETLINK_ROUTE.
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)
            .context("open a route netlink socket")?;
        let set = groups
            .iter()
            .fold(0, |set, group| set | 1 << (*group as u32 - 1));
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, set))
            .context("listen to route netlink")?;
        Ok(Self(sys::watch(socket)?))
    }

    /// Waits for notifications and throws away all that are there. Cancel-safe: nothing is awaited
    /// after the first was read.
    async fn heard(&self) -> anyhow::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            let seen = drain(self.0.get_ref())?;
            ready.clear_ready();
            if seen {
                return Ok(());
            }
        }
    }
}

/// Whether there was anything.
fn drain(socket: &OwnedFd) -> anyhow::Result<bool> {
    let mut seen = false;
    let mut buffer = [0_u8; 8192];
    loop {
        match rustix::net::recv(socket, &mut buffer, RecvFlags::DONTWAIT) {
            Ok(_) => seen = true,
            Err(rustix::io::Errno::NOBUFS) => seen = true,
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(seen),
            Err(error) => return Err(io::Error::from(error)).context("read route netlink"),
        }
    }
}
