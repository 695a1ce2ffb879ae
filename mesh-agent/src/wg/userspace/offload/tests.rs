//! What is split and joined again is what it was.

use proptest::prelude::*;

use super::*;

/// A TCP packet with these flags and payload, checksums right.
fn packet(v6: bool, sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
    let ip = if v6 { 40 } else { 20 };
    // With twelve bytes of options, as timestamps are.
    let mut packet = vec![0; ip + 32];
    if v6 {
        packet[0] = 0x60;
        (packet[6], packet[7]) = (TCP, 64);
        (packet[23], packet[39]) = (1, 2);
    } else {
        packet[0] = 0x45;
        (packet[8], packet[9]) = (64, TCP);
        (packet[15], packet[19]) = (1, 2);
    }
    packet[ip..ip + 4].copy_from_slice(&[0x10, 0, 0, 80]);
    packet[ip + 4..ip + 8].copy_from_slice(&sequence.to_be_bytes());
    (packet[ip + 12], packet[ip + 13]) = (8 << 4, flags);
    packet[ip + 20..ip + 32].copy_from_slice(b"\x01\x01\x08\x0aTIMESTAM");
    packet.extend_from_slice(payload);
    set_ip_length(&mut packet, ip);
    fix_tcp_checksum(&mut packet, ip);
    packet
}

fn fix_tcp_checksum(packet: &mut [u8], ip: usize) {
    let at = ip + TCP_CHECKSUM;
    packet[at..at + 2].fill(0);
    let sum = pseudo_header(packet, ip, packet.len() - ip);
    let sum = checksum::finish(checksum::add(sum, &packet[ip..]));
    packet[at..at + 2].copy_from_slice(&sum);
}

fn join(packets: &[Vec<u8>]) -> Vec<(Header, Vec<u8>)> {
    let mut joiner = Joiner::new();
    let mut written = Vec::new();
    let mut write = |header: &Header, packet: &[u8]| written.push((*header, packet.to_vec()));
    for packet in packets {
        joiner.push(packet, &mut write);
    }
    joiner.flush(&mut write);
    written
}

fn split_all(written: &[(Header, Vec<u8>)]) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    let mut scratch = vec![0; 70_000];
    for (header, packet) in written {
        let mut packet = packet.clone();
        let len = packet.len();
        split(header, &mut packet, len, &mut scratch, |segment, len| {
            packets.push(segment[..len].to_vec());
        });
    }
    packets
}

/// Consecutive packets of one stream with consecutive identifications.
fn stream(v6: bool, count: u32, size: usize) -> Vec<Vec<u8>> {
    let one = |n: u32| {
        let payload: Vec<u8> = (0..size).map(|i| (i as u32 ^ n) as u8).collect();
        let mut packet = packet(v6, 1000 + n * size as u32, ACK, &payload);
        if !v6 {
            packet[4..6].copy_from_slice(&(n as u16).to_be_bytes());
            set_ip_length(&mut packet, 20);
        }
        packet
    };
    (0..count).map(one).collect()
}

#[test]
fn a_header_survives_the_wire_form() {
    let header = Header {
        flags: 1,
        gso_type: 4,
        hdr_len: 72,
        gso_size: 1208,
        csum_start: 40,
        csum_offset: 16,
    };
    assert_eq!(Header::decode(header.encode()), header);
}

#[test]
fn a_stream_is_one_write() {
    for v6 in [false, true] {
        let packets = stream(v6, 40, 1208);
        let written = join(&packets);
        assert_eq!(written.len(), 1);
        assert_eq!(written[0].0.gso_size, 1208);
        assert_eq!(split_all(&written), packets);
    }
}

#[test]
fn a_packet_never_grows_beyond_what_ip_can_say() {
    let packets = stream(false, 100, 1208);
    let written = join(&packets);
    assert_eq!(written.len(), 2);
    assert!(written.iter().all(|(_, packet)| packet.len() <= 65535));
}

#[test]
fn what_is_not_plain_data_is_written_as_it_is() {
    let one = packet(false, 1, ACK, b"data");
    let next = |flags| packet(false, 5, flags, b"more");
    let mut corrupt = next(ACK);
    *corrupt.last_mut().unwrap() ^= 1;
    let mut fragment = next(ACK);
    fragment[6] |= 0x20;
    set_ip_length(&mut fragment, 20);
    let empty = packet(false, 5, ACK, b"");
    let gap = packet(false, 6, ACK, b"more");
    let mut other_port = next(ACK);
    other_port[21] ^= 1;
    fix_tcp_checksum(&mut other_port, 20);
    let mut other_ttl = next(ACK);
    other_ttl[8] = 63;
    set_ip_length(&mut other_ttl, 20);
    let longer = packet(false, 5, ACK, b"longer");
    for second in [
        next(ACK | FIN),
        next(ACK | 0x02),
        next(ACK | 0x04),
        next(ACK | CWR),
        corrupt,
        fragment,
        empty,
        gap,
        other_port,
        other_ttl,
        longer,
    ] {
        let packets = [one.clone(), second];
        let written: Vec<Vec<u8>> = join(&packets).into_iter().map(|(_, p)| p).collect();
        assert_eq!(written, packets);
    }
}

#[test]
fn a_push_ends_what_is_held() {
    let packets = [
        packet(false, 1, ACK, b"data"),
        packet(false, 5, ACK | PSH, b"more"),
        packet(false, 9, ACK, b"next"),
    ];
    assert_eq!(join(&packets).len(), 2);
}

#[test]
fn an_unfinished_checksum_is_finished() {
    let right = packet(false, 1, ACK, b"data");
    let mut partial = right.clone();
    let sum = checksum::partial(pseudo_header(&right, 20, right.len() - 20));
    partial[36..38].copy_from_slice(&sum);
    let header = Header {
        flags: NEEDS_CSUM,
        csum_start: 20,
        csum_offset: 16,
        ..Header::default()
    };
    assert_eq!(split_all(&[(header, partial)]), [right]);
}

/// RFC 1071, section 3, with its own numbers.
#[test]
fn the_checksum_is_the_internets() {
    let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
    assert_eq!(checksum::finish(checksum::add(0, &bytes)), [0x22, 0x0d]);
    assert_eq!(checksum::finish(checksum::add(0, &[0xff])), [0x00, 0xff]);
}

proptest! {
    #[test]
    fn splitting_undoes_joining(
        v6: bool,
        sizes in prop::collection::vec((1..200_usize, 0..8_u8, any::<bool>()), 1..40),
    ) {
        let mut sequence = u32::MAX - 1000;
        let mut packets = Vec::new();
        for (n, (size, kind, push)) in sizes.into_iter().enumerate() {
            // Mostly of one size and in a row, so that there is something to join.
            let size = if kind < 6 { 100 } else { size };
            let flags = if push && kind == 5 { ACK | PSH } else { ACK };
            let payload: Vec<u8> = (0..size).map(|i| (i * 7 + n) as u8).collect();
            packets.push(packet(v6, sequence, flags, &payload));
            sequence = sequence.wrapping_add(size as u32);
        }
        let mut again = split_all(&join(&packets));
        // Identifications are counted from the first of what was joined.
        for packets in [&mut packets, &mut again] {
            for packet in packets.iter_mut().filter(|_| !v6) {
                packet[4..6].fill(0);
                set_ip_length(packet, 20);
            }
        }
        prop_assert_eq!(again, packets);
    }

    #[test]
    fn no_bytes_make_it_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..120),
        header in any::<[u8; HEADER_LEN]>(),
        version in prop::sample::select(vec![0x45_u8, 0x60, 0x4f, 0x00]),
    ) {
        let mut bytes = bytes;
        if let Some(first) = bytes.first_mut() {
            *first = version;
        }
        let mut header = header;
        header[1] %= 6;
        split_all(&[(Header::decode(header), bytes.clone())]);
        join(&[bytes.clone(), bytes]);
    }
}
