//! The quick reader, for packets as nearly all are.

use super::network::Network;
use super::transport::{Upper, icmp_kind, key};
use super::{Bytes, Fragment, Kind};
use crate::flow::FlowKey;
use crate::policy::Direction;
use crate::{Address, proto};

/// Reads a packet as most are: IPv4 without options and whole, or IPv6 without extension headers, and
/// in it TCP, UDP or an ICMP echo. Asks `then` about its flow, its kind and its TCP flags as [`parse`]
/// would give them. False for any other packet, which only [`parse`] can tell apart.
///
/// Both families ask for themselves: where their ways met, a compiler would have to keep two addresses
/// in more registers than BPF has.
#[inline(always)]
pub fn usual<B: Bytes>(
    bytes: &B,
    direction: Direction,
    then: impl Fn(&FlowKey, Kind, u8) -> bool,
) -> bool {
    // Of no version, where there is nothing.
    let [first] = bytes.words::<0, 1>().unwrap_or_default();
    match u32::from_be(first) >> 24 {
        0x45 => {
            let Some(h) = bytes.words::<0, 6>() else {
                return false;
            };
            if u32::from_be(h[1]) & 0x3fff != 0 {
                return false;
            }
            let network = Network {
                source: Address::from_v4_word(h[3]),
                destination: Address::from_v4_word(h[4]),
                proto: (u32::from_be(h[2]) >> 16) as u8,
                fragment: Fragment::Whole,
                fragment_id: 0,
            };
            usual_transport::<B, 24, 32, { proto::ICMP }>(bytes, direction, &network, h[5], then)
        }
        0x60..=0x6f => {
            let Some(h) = bytes.words::<0, 11>() else {
                return false;
            };
            let network = Network {
                source: Address::from_words([h[2], h[3], h[4], h[5]]),
                destination: Address::from_words([h[6], h[7], h[8], h[9]]),
                proto: (u32::from_be(h[1]) >> 8) as u8,
                fragment: Fragment::Whole,
                fragment_id: 0,
            };
            // A flow's ends are of one family, so that one tells.
            if network.source.is_mapped() {
                return false;
            }
            usual_transport::<B, 44, 52, { proto::ICMPV6 }>(bytes, direction, &network, h[10], then)
        }
        _ => false,
    }
}

/// `SECOND` is where the transport header has its second word, `FLAGS` where TCP has the one with its
/// flags. `first` is the header's first word.
#[inline(always)]
fn usual_transport<B: Bytes, const SECOND: usize, const FLAGS: usize, const ICMP: u8>(
    bytes: &B,
    direction: Direction,
    network: &Network,
    first: u32,
    then: impl Fn(&FlowKey, Kind, u8) -> bool,
) -> bool {
    let upper = if network.proto == proto::TCP {
        let Some([word]) = bytes.words::<FLAGS, 1>() else {
            return false;
        };
        let word = u32::from_be(word);
        let header = (word >> 28) as usize * 4;
        if header < 20 || !bytes.has(FLAGS - 12 + header) {
            return false;
        }
        Upper {
            tcp: (word >> 16) as u8,
            ..Upper::with_ports(Kind::Tcp, first)
        }
    } else if network.proto == proto::UDP {
        if bytes.words::<SECOND, 1>().is_none() {
            return false;
        }
        Upper::with_ports(Kind::Datagram, first)
    } else if network.proto == ICMP {
        let Some([second]) = bytes.words::<SECOND, 1>() else {
            return false;
        };
        let first = u32::from_be(first);
        match icmp_kind(ICMP, (first >> 24) as u8, (first >> 16) as u8) {
            Some(kind @ (Kind::EchoRequest | Kind::EchoReply)) => {
                Upper::with_identifier(kind, second)
            }
            _ => return false,
        }
    } else {
        return false;
    };
    then(&key(direction, network, &upper), upper.kind, upper.tcp)
}
