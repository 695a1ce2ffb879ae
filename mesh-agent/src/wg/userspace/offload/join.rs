//! Small packets into large ones.

use super::checksum;
use super::{
    ACK, GSO_TCPV4, GSO_TCPV6, Header, Lengths, NEEDS_CSUM, PSH, TCP_CHECKSUM, pseudo_header,
    set_ip_length, tcp_lengths, u32_at,
};

/// The longest packet that IP can describe.
const MAX_PACKET: usize = 65535;

/// Holds back packets of one TCP stream as long as the next continues it.
///
/// Packets are written in the order in which they came. One with a wrong checksum is never joined:
/// joined, the kernel would trust it.
pub(in super::super) struct Joiner {
    buffer: Vec<u8>,
    held: Option<Held>,
}

#[derive(Debug, Clone, Copy)]
struct Held {
    lengths: Lengths,
    /// Payload of each packet but the last.
    size: usize,
    packets: usize,
    next_sequence: u32,
    /// The last packet was short, or asked to be pushed: nothing may follow.
    closed: bool,
}

impl Joiner {
    pub(in super::super) fn new() -> Self {
        Self {
            buffer: Vec::with_capacity(MAX_PACKET),
            held: None,
        }
    }

    /// Takes `packet`; calls `write` with what cannot wait any longer.
    pub(in super::super) fn push(&mut self, packet: &[u8], mut write: impl FnMut(&Header, &[u8])) {
        let Some(lengths) = joinable(packet) else {
            self.flush(&mut write);
            write(&Header::default(), packet);
            return;
        };
        if self.append(packet, lengths) {
            return;
        }
        self.flush(&mut write);
        let size = packet.len() - lengths.headers;
        self.buffer.clear();
        self.buffer.extend_from_slice(packet);
        self.held = Some(Held {
            lengths,
            size,
            packets: 1,
            next_sequence: sequence(packet, lengths).wrapping_add(size as u32),
            closed: packet[lengths.ip + 13] & PSH != 0,
        });
    }

    /// Writes what is held back.
    pub(in super::super) fn flush(&mut self, mut write: impl FnMut(&Header, &[u8])) {
        let Some(held) = self.held.take() else {
            return;
        };
        if held.packets == 1 {
            write(&Header::default(), &self.buffer);
            return;
        }
        let Lengths { ip, headers } = held.lengths;
        set_ip_length(&mut self.buffer, ip);
        let sum = checksum::partial(pseudo_header(&self.buffer, ip, self.buffer.len() - ip));
        let at = ip + TCP_CHECKSUM;
        self.buffer[at..at + 2].copy_from_slice(&sum);
        // All of these are lengths within one packet.
        let short = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
        let header = Header {
            flags: NEEDS_CSUM,
            gso_type: if ip == 20 { GSO_TCPV4 } else { GSO_TCPV6 },
            hdr_len: short(headers),
            gso_size: short(held.size),
            csum_start: short(ip),
            csum_offset: short(TCP_CHECKSUM),
        };
        write(&header, &self.buffer);
    }

    /// Whether `packet` could be joined to what is held.
    fn append(&mut self, packet: &[u8], lengths: Lengths) -> bool {
        let Some(held) = &mut self.held else {
            return false;
        };
        let payload = &packet[lengths.headers..];
        let fits = !held.closed
            && held.lengths == lengths
            && payload.len() <= held.size
            && self.buffer.len() + payload.len() <= MAX_PACKET
            && sequence(packet, lengths) == held.next_sequence
            && same_headers(&self.buffer, packet, lengths);
        if !fits {
            return false;
        }
        let pushed = packet[lengths.ip + 13] & PSH;
        self.buffer.extend_from_slice(payload);
        self.buffer[lengths.ip + 13] |= pushed;
        held.packets += 1;
        held.next_sequence = held.next_sequence.wrapping_add(payload.len() as u32);
        held.closed = pushed != 0 || payload.len() < held.size;
        true
    }
}

/// Header lengths of a TCP packet that carries data, nothing but data, and arrived intact.
fn joinable(packet: &[u8]) -> Option<Lengths> {
    let lengths = tcp_lengths(packet)?;
    let plain = packet[lengths.ip + 13] & !PSH == ACK;
    if !plain || packet.len() == lengths.headers {
        return None;
    }
    let segment = &packet[lengths.ip..];
    let sum = pseudo_header(packet, lengths.ip, segment.len());
    let mut intact = checksum::is_intact(checksum::add(sum, segment));
    if lengths.ip == 20 {
        intact &= checksum::is_intact(checksum::add(0, &packet[..20]));
    }
    intact.then_some(lengths)
}

fn sequence(packet: &[u8], lengths: Lengths) -> u32 {
    u32_at(packet, lengths.ip + 4).unwrap_or_default()
}

/// Equal but for what differs from packet to packet of one stream.
fn same_headers(first: &[u8], next: &[u8], lengths: Lengths) -> bool {
    let same = |range: std::ops::Range<usize>| first[range.clone()] == next[range];
    let (tcp, end) = (lengths.ip, lengths.headers);
    let ip = if lengths.ip == 20 {
        // Not compared: length, identification, checksum.
        same(0..2) && same(6..10) && same(12..20)
    } else {
        same(0..4) && same(6..40)
    };
    // Not compared: sequence, flags, checksum.
    ip && same(tcp..tcp + 4)
        && same(tcp + 8..tcp + 13)
        && same(tcp + 14..tcp + TCP_CHECKSUM)
        && same(tcp + 18..end)
}
