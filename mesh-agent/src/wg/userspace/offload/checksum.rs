//! The Internet checksum (RFC 1071).
//!
//! A one's complement sum does not care for byte order as long as all of it has the same one, so
//! words are added as this machine has them, eight bytes at a time.

/// Adds `bytes`, which start at an even offset of what is summed; an odd end is padded.
pub(super) fn add(sum: u64, bytes: &[u8]) -> u64 {
    let mut chunks = bytes.chunks_exact(4);
    let mut sum = chunks.by_ref().fold(sum, |sum, chunk| {
        // 65535 bytes of them stay far below the range.
        sum + u64::from(u32::from_ne_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]))
    });
    let rest = chunks.remainder();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    sum += u64::from(u32::from_ne_bytes(last));
    sum
}

/// The sum as it stands in a pseudo header that hardware will add to.
pub(super) fn partial(sum: u64) -> [u8; 2] {
    fold(sum).to_ne_bytes()
}

/// The checksum itself.
pub(super) fn finish(sum: u64) -> [u8; 2] {
    (!fold(sum)).to_ne_bytes()
}

/// Whether a sum that includes the checksum is that of intact bytes.
pub(super) fn is_intact(sum: u64) -> bool {
    fold(sum) == u16::MAX
}

fn fold(mut sum: u64) -> u16 {
    while sum > u64::from(u16::MAX) {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
