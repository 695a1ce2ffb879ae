//! TCP segmentation at the TUN device: large packets through the kernel, small ones through the
//! tunnel.
//!
//! The kernel hands out up to 64 KiB of one TCP stream in one read ([`split`] cuts it into packets
//! that fit the mesh), and takes as much in one write ([`Joiner`] glues packets that came in a row).
//! One system call and one walk through the network stack then serve some fifty packets. What must
//! not change is what the far end sees: every packet that leaves `split` is what the kernel would
//! have sent, and `Joiner` joins nothing that the kernel's own receive offload would not.
//!
//! The header between is `struct virtio_net_hdr` (linux/virtio_net.h).

use crate::wg::tun::HEADER_LEN;

mod checksum;
mod join;
mod split;

pub(super) use join::Joiner;
pub(super) use split::split;

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
/// Set beside the type when a stream uses ECN.
const GSO_ECN: u8 = 0x80;

/// `struct virtio_net_hdr`, in the byte order of this machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

impl Header {
    pub(super) fn decode(bytes: [u8; HEADER_LEN]) -> Self {
        let [flags, gso_type, rest @ ..] = bytes;
        let word = |at: usize| u16::from_ne_bytes([rest[at], rest[at + 1]]);
        Self {
            flags,
            gso_type,
            hdr_len: word(0),
            gso_size: word(2),
            csum_start: word(4),
            csum_offset: word(6),
        }
    }

    pub(super) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        (bytes[0], bytes[1]) = (self.flags, self.gso_type);
        let words = [
            self.hdr_len,
            self.gso_size,
            self.csum_start,
            self.csum_offset,
        ];
        for (to, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

// === TCP over IP, as far as segmentation is concerned ===

const TCP: u8 = 6;
/// Offset of the checksum in a TCP header (RFC 9293, section 3.1).
const TCP_CHECKSUM: usize = 16;

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const CWR: u8 = 0x80;

/// Lengths of a TCP packet's headers: IP's, and both together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Lengths {
    ip: usize,
    headers: usize,
}

/// The header lengths of an unfragmented TCP packet without IP options or extension headers, and
/// `None` for everything else.
fn tcp_lengths(packet: &[u8]) -> Option<Lengths> {
    let ip = match packet.first()? >> 4 {
        4 => {
            let whole = packet[0] == 0x45 && u16_at(packet, 6)? & 0x3fff == 0;
            let sized = usize::from(u16_at(packet, 2)?) == packet.len();
            (whole && sized && *packet.get(9)? == TCP).then_some(20)?
        }
        6 => {
            let sized = usize::from(u16_at(packet, 4)?) + 40 == packet.len();
            (sized && *packet.get(6)? == TCP).then_some(40)?
        }
        _ => return None,
    };
    let headers = ip + usize::from(*packet.get(ip + 12)? >> 4) * 4;
    (headers >= ip + 20 && headers <= packet.len()).then_some(Lengths { ip, headers })
}

fn u16_at(packet: &[u8], at: usize) -> Option<u16> {
    let bytes = packet.get(at..at + 2)?;
    bytes.try_into().ok().map(u16::from_be_bytes)
}

fn u32_at(packet: &[u8], at: usize) -> Option<u32> {
    let bytes = packet.get(at..at + 4)?;
    bytes.try_into().ok().map(u32::from_be_bytes)
}

/// Writes the packet's length where its IP header has it, and IPv4's checksum. `ip` is the length
/// of the IP header.
fn set_ip_length(packet: &mut [u8], ip: usize) {
    // Callers build packets of at most 65535 bytes.
    let length = |bytes: usize| u16::try_from(bytes).unwrap_or(u16::MAX).to_be_bytes();
    let total = packet.len();
    if packet[0] >> 4 == 4 {
        packet[2..4].copy_from_slice(&length(total));
        packet[10..12].fill(0);
        let sum = checksum::finish(checksum::add(0, &packet[..ip]));
        packet[10..12].copy_from_slice(&sum);
    } else {
        packet[4..6].copy_from_slice(&length(total - ip));
    }
}

/// The sum over the pseudo header of a TCP segment of `len` bytes (RFC 9293, section 3.1).
fn pseudo_header(packet: &[u8], ip: usize, len: usize) -> u64 {
    let addresses = if ip == 20 {
        &packet[12..20]
    } else {
        &packet[8..40]
    };
    let len = u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes();
    let sum = checksum::add(checksum::add(0, addresses), &len);
    checksum::add(sum, &[0, TCP])
}

#[cfg(test)]
mod tests;
