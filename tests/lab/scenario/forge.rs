//! A node that writes another node's address into its packets.
//!
//! ```text
//!   sandbox ── from: operator's address, UDP 9000 ──► node        operator may, sandbox may not
//! ```

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::net::{AddressFamily, SendFlags, SocketType, ipproto};

use crate::mesh::{Family, Mesh};
use crate::silence;

use super::Check;

const PORT: u16 = 9000;
const ROUNDS: usize = 20;

/// Opens the port to the operator alone, and lets the sandbox pretend.
pub fn run(mesh: &mut Mesh, check: &mut Check) -> Result<()> {
    let policy = mesh.coordinator.policy()?;
    let open = policy.replacen(
        "\"acls\": [",
        "\"acls\": [{\"action\": \"accept\", \"proto\": \"udp\", \"src\": [\"tag:operator\"], \"dst\": [\"tag:node:9000\"]},",
        1,
    );
    mesh.coordinator.set_policy(&open)?;
    mesh.settle()?;
    let outcome = forge_all(mesh, check);
    mesh.coordinator.set_policy(&policy)?;
    mesh.settle()?;
    outcome
}

fn forge_all(mesh: &mut Mesh, check: &mut Check) -> Result<()> {
    check.that("a forged inner source address gets nothing through", || {
        Family::BOTH
            .into_iter()
            .try_for_each(|family| forge(mesh, family))
    })?;
    check.that("nor when its sender has disarmed its own programs", || {
        mesh.node("sandbox").disarm()?;
        Family::BOTH
            .into_iter()
            .try_for_each(|family| forge(mesh, family))
    })?;
    // Arms them again.
    let sandbox = mesh.node_mut("sandbox");
    sandbox.kill()?;
    sandbox.restart()
}

fn forge(mesh: &Mesh, family: Family) -> Result<()> {
    let (node, operator, sandbox) = (
        mesh.node("node"),
        mesh.node("operator"),
        mesh.node("sandbox"),
    );
    let to = SocketAddr::new(node.address(family)?, PORT);
    let victim = operator.address(family)?;
    let server = node
        .host
        .inside(|| UdpSocket::bind(to))?
        .context("listen")?;
    server
        .set_read_timeout(Some(silence(Duration::from_millis(500))))
        .context("limit waiting")?;

    // The control: the same packet from its rightful sender arrives.
    let mut arrived = false;
    for _ in 0..ROUNDS {
        operator.host.inside(|| send(victim, to))??;
        let mut buffer = [0; 64];
        if let Ok((_, from)) = server.recv_from(&mut buffer) {
            ensure!(from.ip() == victim, "{from} instead of {victim}");
            arrived = true;
            break;
        }
    }
    ensure!(arrived, "the operator's own packet does not arrive");
    while server.recv_from(&mut [0; 64]).is_ok() {}

    for _ in 0..ROUNDS {
        // A refusal to send is as good as a drop.
        let _ = sandbox.host.inside(|| send(victim, to))?;
    }
    let mut buffer = [0; 64];
    if let Ok((length, from)) = server.recv_from(&mut buffer) {
        anyhow::bail!("{length} bytes arrived, as if from {from}");
    }
    Ok(())
}

/// A whole IP packet through a raw socket, whatever its source address says.
fn send(from: IpAddr, to: SocketAddr) -> Result<()> {
    let (family, packet) = match (from, to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to_ip)) => (
            AddressFamily::INET,
            ipv4(from.octets(), to_ip.octets(), to.port()),
        ),
        (IpAddr::V6(from), IpAddr::V6(to_ip)) => (
            AddressFamily::INET6,
            ipv6(from.octets(), to_ip.octets(), to.port()),
        ),
        _ => anyhow::bail!("{from} and {to} are of two families"),
    };
    let socket = rustix::net::socket(family, SocketType::RAW, Some(ipproto::RAW))
        .context("make a raw socket")?;
    // The port of a raw socket's destination is the protocol's business, not ours.
    let target = SocketAddr::new(to.ip(), 0);
    rustix::net::sendto(&socket, &packet, SendFlags::empty(), &target).context("send")?;
    Ok(())
}

const PAYLOAD: &[u8; 4] = b"mine";

/// Ports, length, no checksum yet.
fn udp(port: u16) -> [u8; 12] {
    let mut udp = [0; 12];
    udp[..2].copy_from_slice(&40_000_u16.to_be_bytes());
    udp[2..4].copy_from_slice(&port.to_be_bytes());
    udp[4..6].copy_from_slice(&12_u16.to_be_bytes());
    udp[8..].copy_from_slice(PAYLOAD);
    udp
}

/// RFC 791; the kernel fills in length, identification and checksum. UDP over IPv4 may go without
/// a checksum.
fn ipv4(from: [u8; 4], to: [u8; 4], port: u16) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend(from);
    packet.extend(to);
    packet.extend(udp(port));
    packet
}

/// RFC 8200, with the checksum that UDP must have there (section 8.1).
fn ipv6(from: [u8; 16], to: [u8; 16], port: u16) -> Vec<u8> {
    let mut datagram = udp(port);
    let mut pseudo: Vec<u8> = from.into_iter().chain(to).collect();
    pseudo.extend([0, 0, 0, 12, 0, 0, 0, 17]);
    pseudo.extend(datagram);
    let sum: u32 = pseudo
        .chunks_exact(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    let checksum = !u16::try_from(folded).unwrap_or(0);
    datagram[6..8].copy_from_slice(&checksum.to_be_bytes());
    let mut packet = vec![0x60, 0, 0, 0, 0, 12, 17, 64];
    packet.extend(from);
    packet.extend(to);
    packet.extend(datagram);
    packet
}
