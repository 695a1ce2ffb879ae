//! One ICMP echo through the mesh (RFC 792, RFC 4443 section 4).
//!
//! A real packet by the same road as everybody's: policy and encryption included. The raw socket
//! sees every echo reply of the host, so an answer must carry our number, our payload and the
//! address that was asked.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use rand_core::RngCore as _;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto};
use tokio::net::UdpSocket;
use tonic::Status;

/// What the echo carries, so that an answer is known for one to it.
const PAYLOAD: usize = 16;

/// Sends one echo from `from` to `to`; the time until it was answered.
pub async fn once(from: IpAddr, to: IpAddr, timeout: Duration) -> Result<Duration, Status> {
    let socket = open(from).map_err(|error| {
        Status::internal(format!(
            "open a raw socket: {error} (the agent needs CAP_NET_RAW, and its interface must be up)"
        ))
    })?;
    let mut seed = [0; PAYLOAD + 2];
    rand_core::OsRng.fill_bytes(&mut seed);
    let echo = request(from, to, seed);
    let sent = Instant::now();
    socket.send_to(&echo, (to, 0)).await.map_err(|error| {
        Status::unavailable(match error.kind() {
            io::ErrorKind::PermissionDenied => {
                format!("{to}: this node's own policy or firewall does not let the packet out")
            }
            _ => format!("{to}: {error}"),
        })
    })?;
    match tokio::time::timeout(timeout, answer(&socket, &echo, to)).await {
        Ok(Ok(())) => Ok(sent.elapsed()),
        Ok(Err(error)) => Err(Status::unavailable(format!("{to}: {error}"))),
        Err(_) => Err(Status::deadline_exceeded(format!(
            "{to}: no answer within {} ms",
            timeout.as_millis()
        ))),
    }
}

/// A raw ICMP socket behind tokio's datagram interface: the same calls serve both.
fn open(from: IpAddr) -> io::Result<UdpSocket> {
    let (family, protocol) = match from {
        IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP),
        IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6),
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::RAW, flags, Some(protocol))?;
    rustix::net::bind(&socket, &SocketAddr::new(from, 0))?;
    UdpSocket::from_std(socket.into())
}

/// Type, code, checksum, identifier, sequence, payload.
fn request(from: IpAddr, to: IpAddr, seed: [u8; PAYLOAD + 2]) -> Vec<u8> {
    let kind = match to {
        IpAddr::V4(_) => 8,
        IpAddr::V6(_) => 128,
    };
    let (identifier, payload) = seed.split_at(2);
    let mut echo = vec![kind, 0, 0, 0];
    echo.extend_from_slice(identifier);
    echo.extend_from_slice(&1_u16.to_be_bytes());
    echo.extend_from_slice(payload);
    // The kernel fills in ICMPv6's own, which covers a pseudo-header (RFC 3542, section 3.1).
    if let (IpAddr::V4(_), IpAddr::V4(_)) = (from, to) {
        let sum = checksum(&echo);
        echo[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    echo
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|word| {
        let low = word.get(1).copied().unwrap_or(0);
        u32::from(u16::from_be_bytes([word[0], low]))
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

async fn answer(socket: &UdpSocket, echo: &[u8], from: IpAddr) -> io::Result<()> {
    let mut buffer = [0; 1500];
    loop {
        let (length, source) = socket.recv_from(&mut buffer).await?;
        if same(source.ip(), from) && answers(&buffer[..length], echo) {
            return Ok(());
        }
    }
}

fn same(a: IpAddr, b: IpAddr) -> bool {
    let wide = |address| match address {
        IpAddr::V4(v4) => Ipv6Addr::to_canonical(&v4.to_ipv6_mapped()),
        IpAddr::V6(v6) => v6.to_canonical(),
    };
    wide(a) == wide(b)
}

/// Whether `packet` is the reply to `echo`. IPv4 raw sockets hand over the IP header too.
fn answers(packet: &[u8], echo: &[u8]) -> bool {
    let (reply, message) = if echo[0] == 128 {
        (129, packet)
    } else {
        let header = packet
            .first()
            .map_or(0, |first| usize::from(first & 15) * 4);
        (0, packet.get(header..).unwrap_or_default())
    };
    message.len() == echo.len() && message[0] == reply && message[4..] == echo[4..]
}

#[cfg(test)]
mod tests {
    use super::*;

    const V4: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
    const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

    #[test]
    fn an_echo_checks_out() {
        let echo = request(V4, V4, [0xab; PAYLOAD + 2]);
        assert_eq!(checksum(&echo), 0);
        assert_eq!(echo.len(), 8 + PAYLOAD);
    }

    #[test]
    fn only_the_reply_to_this_very_echo_counts() {
        let echo = request(V4, V4, [7; PAYLOAD + 2]);
        let mut reply = vec![0x45; 20];
        reply.extend_from_slice(&echo);
        assert!(!answers(&reply, &echo), "our own request, seen by loopback");
        reply[20] = 0;
        assert!(answers(&reply, &echo));
        reply[24] ^= 1;
        assert!(!answers(&reply, &echo));
        for short in 0..reply.len() {
            assert!(!answers(&reply[..short], &echo));
        }
        let echo = request(V6, V6, [7; PAYLOAD + 2]);
        let mut reply = echo.clone();
        reply[0] = 129;
        assert!(answers(&reply, &echo));
    }
}
