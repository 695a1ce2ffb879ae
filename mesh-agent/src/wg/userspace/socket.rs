//! The underlay socket, and the outbox in which a thread collects what it will send.
//!
//! One dual-stack socket serves both families; a host without IPv6 gets an IPv4 one. Replies leave
//! from the address that the peer sent to (packet info), or a host with several addresses would
//! answer from one that the peer's NAT has never seen.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use rustix::net::{
    AddressFamily, SocketFlags, SocketType, bind, getsockname, socket_with, sockopt,
};
use tracing::debug;

use crate::sys;
use crate::sys::udp::{self, Outgoing};

/// Kernel buffers of the socket, both ways: what a gigabit brings in the 30 ms that a busy host may
/// leave a thread waiting. The defaults (208 KiB) overflow on every burst.
const BUFFER: usize = 4 << 20;

/// Bytes that an outbox holds before it must be flushed.
const ARENA: usize = 256 << 10;

/// Messages that an outbox holds before it must be flushed: three buffers of 64 KiB at the usual
/// size.
const MAX_MESSAGES: usize = 150;

/// Datagrams that the kernel cuts one buffer into, and the buffer's length
/// (UDP_MAX_SEGMENTS of Linux 4.18; an IPv4 datagram without its headers).
const MAX_SEGMENTS: usize = 64;
const MAX_BUFFER: usize = 65507;

/// Room for the longest message: an IP packet, WireGuard's 32 bytes and padding around it.
pub(super) const MAX_MESSAGE: usize = 65535 + 64;

#[derive(Debug)]
pub(super) struct Socket {
    pub(super) fd: OwnedFd,
    /// Of AF_INET6, carrying IPv4 as mapped addresses.
    wide: bool,
    pub(super) port: u16,
    /// The kernel cuts one long buffer into datagrams (UDP_SEGMENT).
    segments: AtomicBool,
}

impl Socket {
    /// Binds `port` on every address; 0 takes any free one.
    pub(super) fn bind(port: u16, fwmark: u32) -> anyhow::Result<Self> {
        let any = |family| {
            // Sending waits for room, which slows the reader of the TUN device down to what the
            // underlay takes; receiving never waits.
            socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        };
        let (fd, wide) = match any(AddressFamily::INET6) {
            Ok(fd) => (fd, true),
            Err(error) => {
                debug!(%error, "no IPv6 here");
                (
                    any(AddressFamily::INET).context("create a UDP socket")?,
                    false,
                )
            }
        };
        if wide {
            sockopt::set_ipv6_v6only(&fd, false).context("make the socket dual-stack")?;
            sys::set_option(&fd, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1)?;
        }
        // Asked of both families: IPv4 arrives on an AF_INET6 socket as well.
        sys::set_option(&fd, libc::IPPROTO_IP, libc::IP_PKTINFO, 1)?;
        if let Err(error) = sys::set_option(&fd, libc::SOL_UDP, libc::UDP_GRO, 1) {
            debug!(%error, "datagrams arrive one by one");
        }
        // As the kernel's WireGuard: no DF bit, so that a path smaller than we think fragments.
        sockopt::set_ip_mtu_discover(&fd, sockopt::Ipv4PathMtuDiscovery::DONT)?;
        // Beyond the host's limit only with CAP_NET_ADMIN, which a test may lack.
        let forced = sockopt::set_socket_recv_buffer_size_force(&fd, BUFFER)
            .and_then(|()| sockopt::set_socket_send_buffer_size_force(&fd, BUFFER));
        if let Err(error) = forced {
            debug!(%error, "keep the default socket buffers");
        }
        let socket = Self {
            fd,
            wide,
            port,
            segments: AtomicBool::new(true),
        };
        if fwmark != 0 {
            socket.set_fwmark(fwmark)?;
        }
        let address: SocketAddr = match wide {
            true => (Ipv6Addr::UNSPECIFIED, port).into(),
            false => (Ipv4Addr::UNSPECIFIED, port).into(),
        };
        bind(&socket.fd, &address).with_context(|| format!("bind UDP port {port}"))?;
        let bound: SocketAddr = getsockname(&socket.fd)?
            .try_into()
            .context("read the socket's own address")?;
        Ok(Self {
            port: bound.port(),
            ..socket
        })
    }

    pub(super) fn set_fwmark(&self, mark: u32) -> anyhow::Result<()> {
        sys::set_option(
            &self.fd,
            libc::SOL_SOCKET,
            libc::SO_MARK,
            mark.cast_signed(),
        )
        .context("mark encrypted packets: this needs CAP_NET_ADMIN")
    }
}

/// Where a peer is reached, and from which of our addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Endpoint {
    pub(super) to: SocketAddr,
    /// The address that the peer sent to; `None` until it has.
    pub(super) source: Option<IpAddr>,
}

impl Endpoint {
    pub(super) fn new(to: SocketAddr) -> Self {
        Self { to, source: None }
    }
}

/// Messages waiting to be sent, packed one behind the other.
#[derive(Debug)]
pub(super) struct Outbox {
    arena: Vec<u8>,
    used: usize,
    messages: Vec<Message>,
}

#[derive(Debug, Clone, Copy)]
struct Message {
    start: usize,
    len: usize,
    endpoint: Endpoint,
    /// Not to be sent together with others.
    alone: bool,
}

impl Outbox {
    pub(super) fn new() -> Self {
        Self {
            arena: vec![0; ARENA],
            used: 0,
            messages: Vec::with_capacity(MAX_MESSAGES),
        }
    }

    /// Room to write the next message to, at least [`MAX_MESSAGE`] long unless the outbox is full.
    pub(super) fn room(&mut self) -> &mut [u8] {
        &mut self.arena[self.used..]
    }

    /// Takes the first `len` bytes of [`Outbox::room`] as a message to `endpoint`.
    pub(super) fn push(&mut self, len: usize, endpoint: Endpoint) {
        let message = Message {
            start: self.used,
            len,
            endpoint,
            alone: false,
        };
        self.messages.push(message);
        self.used += len;
    }

    pub(super) fn is_full(&self) -> bool {
        self.messages.len() >= MAX_MESSAGES || self.used + 2 * MAX_MESSAGE > ARENA
    }

    /// Sends everything. What the socket does not take is lost, as UDP is.
    pub(super) fn flush(&mut self, socket: &Socket) {
        let mut next = 0;
        while next < self.messages.len() {
            let first = next..next + self.run(next, socket);
            match self.send_from(next, socket) {
                Ok(0) => break,
                Ok(sent) => next = self.skip(next, sent, socket),
                Err(error) if may_be_the_source(&error) && self.forget_source(first.clone()) => {}
                Err(error) if first.len() > 1 => {
                    debug!(%error, "one by one");
                    if error.raw_os_error() == Some(libc::EIO) {
                        // The device cannot, and will not be able to next time.
                        socket.segments.store(false, Ordering::Relaxed);
                    }
                    for message in &mut self.messages[first] {
                        message.alone = true;
                    }
                }
                Err(error) => {
                    debug!(%error, endpoint = %self.messages[next].endpoint.to, "send");
                    next += 1;
                }
            }
        }
        self.messages.clear();
        self.used = 0;
    }

    /// How many messages from `first` on go in one buffer: equally long ones to one endpoint, and
    /// perhaps a shorter one at the end.
    fn run(&self, first: usize, socket: &Socket) -> usize {
        let head = self.messages[first];
        if head.alone || !socket.segments.load(Ordering::Relaxed) {
            return 1;
        }
        let (mut count, mut bytes) = (1, head.len);
        for message in &self.messages[first + 1..] {
            bytes += message.len;
            let joins = count < MAX_SEGMENTS
                && bytes <= MAX_BUFFER
                && message.len <= head.len
                && message.endpoint == head.endpoint
                && !message.alone;
            if !joins {
                break;
            }
            count += 1;
            if message.len < head.len {
                break;
            }
        }
        count
    }

    /// The message after the `runs` that start at `next`.
    fn skip(&self, next: usize, runs: usize, socket: &Socket) -> usize {
        (0..runs).fold(next, |next, _| next + self.run(next, socket))
    }

    fn send_from(&self, first: usize, socket: &Socket) -> io::Result<usize> {
        const NOTHING: Outgoing<'static> = Outgoing {
            bytes: &[],
            to: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
            source: None,
            segment: 0,
        };
        let mut batch = [NOTHING; udp::BATCH];
        let (mut count, mut next) = (0, first);
        for slot in &mut batch {
            let Some(head) = self.messages.get(next) else {
                break;
            };
            let run = self.run(next, socket);
            let last = self.messages[next + run - 1];
            *slot = Outgoing {
                bytes: &self.arena[head.start..last.start + last.len],
                to: head.endpoint.to,
                source: head.endpoint.source,
                // A run is of messages that an IPv4 datagram holds.
                segment: if run > 1 { head.len as u16 } else { 0 },
            };
            (count, next) = (count + 1, next + run);
        }
        udp::send_batch(&socket.fd, socket.wide, &batch[..count])
    }

    /// What would be sent, and where to.
    #[cfg(test)]
    pub(super) fn take_messages(&mut self) -> Vec<(Vec<u8>, Endpoint)> {
        self.used = 0;
        let copy = |message: Message| {
            let bytes = &self.arena[message.start..message.start + message.len];
            (bytes.to_vec(), message.endpoint)
        };
        std::mem::take(&mut self.messages)
            .into_iter()
            .map(copy)
            .collect()
    }

    /// Leaves the source of these messages to routing; false if it already is.
    fn forget_source(&mut self, messages: Range<usize>) -> bool {
        let mut forgot = false;
        for message in &mut self.messages[messages] {
            forgot |= message.endpoint.source.take().is_some();
        }
        forgot
    }
}

/// An address that this host no longer has: it roamed since the peer was last heard.
fn may_be_the_source(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EADDRNOTAVAIL | libc::ENETUNREACH | libc::EHOSTUNREACH)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_is_gone_is_left_to_routing() {
        let socket = Socket::bind(0, 0).unwrap();
        let heard = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut outbox = Outbox::new();
        outbox.room()[..2].copy_from_slice(b"hi");
        let endpoint = Endpoint {
            to: heard.local_addr().unwrap(),
            source: Some([192, 0, 2, 77].into()),
        };
        outbox.push(2, endpoint);
        outbox.flush(&socket);
        let mut buffer = [0; 8];
        heard
            .set_read_timeout(Some(std::time::Duration::from_secs(5)))
            .unwrap();
        let (len, from) = heard.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..len], from.port()), (&b"hi"[..], socket.port));
    }

    #[test]
    fn messages_of_one_length_go_in_one_buffer_and_arrive_one_by_one() {
        let socket = Socket::bind(0, 0).unwrap();
        let heard = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let endpoint = Endpoint::new(heard.local_addr().unwrap());
        let mut outbox = Outbox::new();
        let lengths = [[100; 70].as_slice(), &[60, 200, 200, 100]].concat();
        for (n, len) in lengths.iter().enumerate() {
            outbox.room()[..*len].fill(n as u8);
            outbox.push(*len, endpoint);
        }
        let runs: Vec<usize> = [0, 64, 71].map(|at| outbox.run(at, &socket)).into();
        assert_eq!(runs, [64, 7, 3]);
        outbox.flush(&socket);
        heard
            .set_read_timeout(Some(std::time::Duration::from_secs(5)))
            .unwrap();
        for (n, len) in lengths.iter().enumerate() {
            let mut buffer = [0; 300];
            assert_eq!(heard.recv(&mut buffer).unwrap(), *len);
            assert!(buffer[..*len].iter().all(|byte| *byte == n as u8));
        }
    }

    #[test]
    fn one_bad_destination_does_not_hold_up_the_rest() {
        let socket = Socket::bind(0, 0).unwrap();
        let heard = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut outbox = Outbox::new();
        for to in [
            "255.255.255.255:9".parse().unwrap(),
            heard.local_addr().unwrap(),
        ] {
            outbox.room()[0] = b'x';
            outbox.push(1, Endpoint::new(to));
        }
        outbox.flush(&socket);
        heard
            .set_read_timeout(Some(std::time::Duration::from_secs(5)))
            .unwrap();
        assert_eq!(heard.recv_from(&mut [0; 8]).unwrap().0, 1);
    }
}
