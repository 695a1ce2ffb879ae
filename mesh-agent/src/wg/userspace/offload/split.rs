//! Large packets into small ones.

use super::checksum;
use super::{
    CWR, FIN, GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, Header, NEEDS_CSUM, PSH, TCP_CHECKSUM,
    pseudo_header, set_ip_length, tcp_lengths, u32_at,
};

/// Calls `each` with every packet that `packet` stands for, checksums complete. Each lies at the
/// start of a buffer, with whatever follows free to be overwritten; the second argument is its
/// length.
///
/// `scratch` must have room for the longest. What makes no sense is dropped: the kernel is the only
/// one to write these headers.
pub(in super::super) fn split(
    header: &Header,
    packet: &mut [u8],
    len: usize,
    scratch: &mut [u8],
    mut each: impl FnMut(&mut [u8], usize),
) {
    match header.gso_type & !GSO_ECN {
        GSO_NONE => {
            if header.flags & NEEDS_CSUM != 0 && complete(header, &mut packet[..len]).is_none() {
                return;
            }
            each(packet, len);
        }
        GSO_TCPV4 | GSO_TCPV6 => segments(header, &packet[..len], scratch, each),
        _ => {}
    }
}

/// Completes a checksum of which only the pseudo header was summed.
fn complete(header: &Header, packet: &mut [u8]) -> Option<()> {
    let start = usize::from(header.csum_start);
    let at = start + usize::from(header.csum_offset);
    let sum = checksum::add(0, packet.get(start..)?);
    let mut value = checksum::finish(sum);
    if value == [0, 0] {
        // UDP means "none" by zero, and one's complement has two of them (RFC 768).
        value = [0xff, 0xff];
    }
    packet.get_mut(at..at + 2)?.copy_from_slice(&value);
    Some(())
}

fn segments(
    header: &Header,
    packet: &[u8],
    scratch: &mut [u8],
    mut each: impl FnMut(&mut [u8], usize),
) {
    let Some(lengths) = tcp_lengths(packet) else {
        return;
    };
    let (headers, payload) = packet.split_at(lengths.headers);
    let size = usize::from(header.gso_size);
    let (ip, tcp) = (lengths.ip, lengths.ip);
    if size == 0 || scratch.len() < headers.len() + size.min(payload.len()) {
        return;
    }
    let (Some(sequence), Some(id)) = (u32_at(packet, tcp + 4), super::u16_at(packet, 4)) else {
        return;
    };
    let last = payload.chunks(size).len().saturating_sub(1);
    for (number, chunk) in payload.chunks(size).enumerate() {
        let len = headers.len() + chunk.len();
        let segment = &mut scratch[..len];
        segment[..headers.len()].copy_from_slice(headers);
        segment[headers.len()..].copy_from_slice(chunk);
        if ip == 20 {
            // As the kernel does: each datagram has an identification of its own.
            let id = id.wrapping_add(number as u16);
            segment[4..6].copy_from_slice(&id.to_be_bytes());
        }
        set_ip_length(segment, ip);
        let sequence = sequence.wrapping_add((number * size) as u32);
        segment[tcp + 4..tcp + 8].copy_from_slice(&sequence.to_be_bytes());
        if number > 0 {
            segment[tcp + 13] &= !CWR;
        }
        if number < last {
            segment[tcp + 13] &= !(FIN | PSH);
        }
        let at = tcp + TCP_CHECKSUM;
        segment[at..at + 2].fill(0);
        let sum = pseudo_header(segment, ip, len - ip);
        let sum = checksum::finish(checksum::add(sum, &segment[tcp..]));
        segment[at..at + 2].copy_from_slice(&sum);
        each(scratch, len);
    }
}
