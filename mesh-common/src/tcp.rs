//! TCP as far as a filter must know it: who may send which flags when, and the MSS option.
//!
//! A flow counts as established only when its *opener* has acknowledged: neither a flood of SYNs nor
//! one of SYN-ACKs or RSTs fills the table of established flows.

use crate::flow::flags;

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

/// A combination of flags that no TCP sends: SYN with FIN or RST; or without ACK what neither opens nor resets,
/// which RFC 9293 (3.10.7.4) has the receiver drop.
#[inline(always)]
pub const fn is_nonsense(tcp: u8) -> bool {
    (tcp & SYN != 0 && tcp & (FIN | RST) != 0) || tcp & (SYN | ACK | RST) == 0
}

/// The one packet that opens a connection.
#[inline(always)]
pub const fn opens(tcp: u8) -> bool {
    tcp & (SYN | ACK | RST | FIN) == SYN
}

/// An acknowledgement with or without data, as nearly all packets are: it changes nothing.
#[inline(always)]
pub const fn is_plain(tcp: u8) -> bool {
    tcp & (SYN | ACK | RST | FIN) == ACK
}

/// A packet of a connection that both ends have agreed on, and that goes on.
#[inline(always)]
pub const fn is_running(tcp: u8) -> bool {
    tcp & (SYN | ACK | RST) == ACK
}

/// Which end of the flow a packet comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    Opener,
    Responder,
}

/// What a packet does to the state of its flow ([`flags`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    pub flags: u32,
    /// The opener has acknowledged the answer: the flow is established.
    pub confirms: bool,
}

/// `None`: the packet does not fit the flow. `state` is neither closing nor expired, or `tcp` does
/// not open.
#[inline(always)]
pub const fn step(state: u32, from: End, tcp: u8) -> Option<Step> {
    let mut next = state;
    let mut confirms = false;
    match from {
        End::Opener => {
            // A SYN-ACK answers, and the opener is not asked anything.
            if tcp & SYN != 0 && tcp & ACK != 0 {
                return None;
            }
            confirms = state & flags::REPLIED != 0 && tcp & ACK != 0 && tcp & RST == 0;
            if tcp & FIN != 0 {
                next |= flags::FIN_OPENER;
            }
        }
        End::Responder => {
            // It may answer, never ask: what it wants to open is another flow.
            if tcp & (ACK | RST) == 0 {
                return None;
            }
            if tcp & SYN != 0 {
                next |= flags::REPLIED;
            }
            if tcp & FIN != 0 {
                next |= flags::FIN_RESPONDER;
            }
        }
    }
    if tcp & RST != 0 {
        next |= flags::RESET;
    }
    Some(Step {
        flags: next,
        confirms,
    })
}

/// Options, padding included, before we stop looking for the MSS: no TCP sends half as many in a SYN.
pub const MAX_OPTION_STEPS: usize = 12;
const END: u8 = 0;
const NO_OPERATION: u8 = 1;
const MSS: u8 = 2;

/// What a walk over the options does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OptionStep {
    /// The MSS option starts here, its value two bytes on.
    Mss,
    /// The next option starts so many bytes on.
    Skip(u8),
    /// No option follows, or none that can be read.
    Stop,
}

/// Reads one option from its first two bytes.
#[inline(always)]
pub const fn option(kind: u8, length: u8) -> OptionStep {
    match kind {
        END => OptionStep::Stop,
        NO_OPERATION => OptionStep::Skip(1),
        MSS if length == 4 => OptionStep::Mss,
        _ if length < 2 => OptionStep::Stop,
        _ => OptionStep::Skip(length),
    }
}

/// The greatest MSS that fits a mesh MTU, without the fixed IP and TCP headers.
pub const fn max_mss(mtu: u16, v6: bool) -> u16 {
    mtu.saturating_sub(if v6 { 60 } else { 40 })
}

/// Lowers the MSS option of the SYN whose TCP header starts at `at`; true if it did.
pub fn clamp(packet: &mut [u8], at: usize, max: u16) -> bool {
    let Some((option, value)) = find_mss(packet, at) else {
        return false;
    };
    if value <= max || max == 0 {
        return false;
    }
    let checksum = at + 16;
    let old = u16::from_be_bytes([packet[checksum], packet[checksum + 1]]);
    // A sum over 16-bit words sees a value at an odd offset with its bytes swapped.
    let (from, to) = if (option + 2 - at).is_multiple_of(2) {
        (value, max)
    } else {
        (value.swap_bytes(), max.swap_bytes())
    };
    packet[option + 2..option + 4].copy_from_slice(&max.to_be_bytes());
    packet[checksum..checksum + 2].copy_from_slice(&replace(old, from, to).to_be_bytes());
    true
}

/// Offset and value of the MSS option.
fn find_mss(packet: &[u8], at: usize) -> Option<(usize, u16)> {
    let header = usize::from(*packet.get(at + 12)? >> 4) * 4;
    let end = at + header;
    let options = packet.get(..end)?;
    let mut here = at + 20;
    for _ in 0..MAX_OPTION_STEPS {
        if here + 4 > end {
            return None;
        }
        match option(options[here], options[here + 1]) {
            OptionStep::Mss => {
                let value = u16::from_be_bytes([options[here + 2], options[here + 3]]);
                return Some((here, value));
            }
            OptionStep::Skip(length) => here += usize::from(length),
            OptionStep::Stop => return None,
        }
    }
    None
}

/// The Internet checksum after one word changed (RFC 1624, equation 3).
pub const fn replace(checksum: u16, from: u16, to: u16) -> u16 {
    let mut sum = !checksum as u32 + !from as u32 + to as u32;
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Replays packets of (from opener?, flags); the state and whether each fits and confirms.
    fn play(packets: &[(End, u8)]) -> (u32, bool) {
        let mut state = 0;
        let mut confirmed = false;
        for (from, tcp) in packets {
            let Some(next) = step(state, *from, *tcp) else {
                panic!("{from:?} {tcp:#x} does not fit {state:#x}");
            };
            state = next.flags;
            confirmed |= next.confirms;
        }
        (state, confirmed)
    }

    #[test]
    fn only_the_openers_acknowledgement_confirms() {
        use End::{Opener, Responder};
        assert!(!play(&[(Opener, SYN), (Responder, SYN | ACK)]).1);
        assert!(!play(&[(Opener, SYN), (Responder, RST | ACK)]).1);
        assert!(!play(&[(Opener, SYN), (Opener, ACK)]).1);
        assert!(!play(&[(Opener, SYN), (Responder, ACK), (Opener, RST)]).1);
        assert!(play(&[(Opener, SYN), (Responder, SYN | ACK), (Opener, ACK)]).1);
    }

    #[test]
    fn a_responder_cannot_open_in_the_flow_of_another() {
        assert_eq!(step(0, End::Responder, SYN), None);
        assert_eq!(step(flags::REPLIED, End::Responder, SYN), None);
        assert_eq!(step(flags::REPLIED, End::Responder, FIN), None);
        assert_eq!(step(flags::REPLIED, End::Opener, SYN | ACK), None);
    }

    #[test]
    fn both_fins_close() {
        use End::{Opener, Responder};
        let (state, _) = play(&[(Opener, FIN | ACK), (Responder, FIN | ACK)]);
        assert_eq!(state, flags::FIN_OPENER | flags::FIN_RESPONDER);
    }

    #[test]
    fn scans_are_nonsense() {
        for bad in [0, FIN, FIN | 0x28, SYN | FIN, SYN | RST, SYN | RST | ACK, 8] {
            assert!(is_nonsense(bad), "{bad:#x}");
        }
        for good in [SYN, SYN | ACK, ACK, RST, RST | ACK, FIN | ACK] {
            assert!(!is_nonsense(good), "{good:#x}");
        }
    }

    fn checksum(bytes: &[u8]) -> u16 {
        let mut sum = 0_u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        }
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    #[test]
    fn clamping_keeps_the_checksum_right_wherever_the_option_stands() {
        for options in [
            [2, 4, 0x05, 0xb4, 1, 1, 1, 0],
            [1, 2, 4, 0x05, 0xb4, 1, 1, 0],
            [1, 1, 1, 2, 4, 0x05, 0xb4, 0],
        ] {
            let mut packet = [0_u8; 48];
            packet[20..28].copy_from_slice(&[0x12, 0x34, 0, 22, 1, 2, 3, 4]);
            packet[32] = 7 << 4;
            packet[33] = SYN;
            packet[40..].copy_from_slice(&options);
            let sum = checksum(&packet[20..]);
            packet[36..38].copy_from_slice(&sum.to_be_bytes());
            assert!(clamp(&mut packet, 20, 1240));
            assert_eq!(checksum(&packet[20..]), 0, "{options:?}");
            assert_eq!(find_mss(&packet, 20).unwrap().1, 1240);
            assert!(!clamp(&mut packet, 20, 1240));
        }
    }

    #[test]
    fn a_broken_option_list_is_left_alone() {
        for options in [[2, 3, 5, 0xb4], [8, 0, 2, 4], [0, 2, 4, 5], [8, 200, 2, 4]] {
            let mut packet = [0_u8; 24];
            packet[12] = 6 << 4;
            packet[20..].copy_from_slice(&options);
            assert!(!clamp(&mut packet, 0, 536));
        }
        assert!(!clamp(&mut [0; 13], 0, 536));
    }
}
