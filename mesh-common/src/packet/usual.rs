//! The quick reader, for packets as nearly all are.

use super::network::Network;
use super::transport::Upper;
use super::{Bytes, Fragment, Kind, proto};
use crate::flow::FlowKey;
use crate::policy::Direction;
use crate::{Address, Be16};

/// Reads a packet as most are: IPv4 without options and whole, or IPv6 without extension headers, and
/// in it TCP or UDP. Asks `then` about its flow, its kind and its TCP flags as [`parse`] would give
/// them. False for any other packet, which only [`parse`] can tell apart.
///
/// Both families ask for themselves: where their ways met, a compiler would have to keep two addresses
/// in more registers than BPF has.
#[inline(always)]
pub fn usual<B: Bytes>(
    bytes: &B,
    direction: Direction,
    then: impl Fn(&FlowKey, Kind, u8) -> bool,
) -> bool {
    let Some([first]) = bytes.words::<0, 1>() else {
        return false;
    };
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
            usual_transport::<B, 24, 32>(bytes, direction, &network, h[5], then)
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
            usual_transport::<B, 44, 52>(bytes, direction, &network, h[10], then)
        }
        _ => false,
    }
}

/// `LENGTH` is where UDP has its length, `FLAGS` where TCP has the word with its flags.
#[inline(always)]
fn usual_transport<B: Bytes, const LENGTH: usize, const FLAGS: usize>(
    bytes: &B,
    direction: Direction,
    network: &Network,
    ports: u32,
    then: impl Fn(&FlowKey, Kind, u8) -> bool,
) -> bool {
    let (kind, tcp) = match network.proto {
        proto::TCP => {
            let Some([word]) = bytes.words::<FLAGS, 1>() else {
                return false;
            };
            let word = u32::from_be(word);
            if word >> 28 < 5 {
                return false;
            }
            (Kind::Tcp, (word >> 16) as u8)
        }
        proto::UDP if bytes.words::<LENGTH, 1>().is_some() => (Kind::Datagram, 0),
        _ => return false,
    };
    let upper = Upper::with_ports(kind, ports);
    let (remote, local, remote_port, local_port) = match direction {
        Direction::Ingress => (
            network.source,
            network.destination,
            upper.source,
            upper.destination,
        ),
        Direction::Egress => (
            network.destination,
            network.source,
            upper.destination,
            upper.source,
        ),
    };
    let key = FlowKey {
        remote,
        local,
        remote_port: Be16::new(remote_port),
        local_port: Be16::new(local_port),
        proto: network.proto,
        pad: 0,
        pad2: 0,
    };
    then(&key, kind, tcp)
}
