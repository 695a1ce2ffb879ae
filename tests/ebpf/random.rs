//! Random worlds that are small enough for packets to meet each other.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_core::key::NodeKey;
use mesh_core::netmap::{Action, Entry, EntryKey, Me, Netmap, NodePolicy, Peer, PortRange, Rule};
use mesh_core::node::{Addresses, Epoch, Generation, MeshId, Name, NodeId};
use mesh_core::world::{Mesh, Pools};
use mesh_core::{Direction, Identity, RuleId};

use crate::packet::{Body, Extension, Fragment, Packet};

/// SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Clone, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize].clone()
    }
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn addresses(n: u8) -> Addresses {
    Addresses {
        v4: [100, 64, 0, n].into(),
        v6: [0xfd00, 0xa, 0xb, 0xc, 0xd, 0xe, 0xf, u16::from(n)].into(),
    }
}

/// Far ends: peers 2 to 5, what lies behind peer 3, a stranger, ourselves, and a group address.
const FAR_V4: [&str; 8] = [
    "100.64.0.2",
    "100.64.0.3",
    "100.64.0.4",
    "100.64.0.5",
    "10.1.0.7",
    "100.64.0.9",
    "100.64.0.1",
    "224.0.0.251",
];
const FAR_V6: [&str; 8] = [
    "fd00:a:b:c:d:e:f:2",
    "fd00:a:b:c:d:e:f:3",
    "fd00:a:b:c:d:e:f:4",
    "fd00:a:b:c:d:e:f:5",
    "fd99::7",
    "fd00:a:b:c:d:e:f:9",
    "fd00:a:b:c:d:e:f:1",
    "ff02::fb",
];
/// Near ends: this node, what it routes to, and an address that is nobody's.
const NEAR_V4: [&str; 3] = ["100.64.0.1", "192.168.7.7", "172.16.0.1"];
const NEAR_V6: [&str; 3] = ["fd00:a:b:c:d:e:f:1", "fd77::7", "fd55::1"];
const PORTS: [u16; 5] = [22, 80, 443, 1024, 5000];

/// A netmap of node 1 with four peers, and a policy that nobody sane would write.
pub(crate) fn netmap(random: &mut Random) -> Netmap {
    let mesh = Mesh {
        id: MeshId([7; 16]),
        domain: "mesh.internal".into(),
        pools: Pools {
            v4: Pools::default_v4(),
            v6: Pools::ula([0, 0, 0xa, 0, 0xb]),
        },
    };
    let name = |n: u8| Name::parse(&format!("n{n}")).unwrap();
    let key = |n: u8| NodeKey::from_seed([n; 32]).public();
    let peers = (2..=5).map(|n| {
        let routes: &[&str] = if n == 3 {
            &["10.1.0.0/16", "fd99::/16"]
        } else {
            &[]
        };
        let peer = Peer {
            id: NodeId(n.into()),
            name: name(n),
            key: key(n),
            addresses: addresses(n),
            endpoints: BTreeSet::new(),
            routes: routes.iter().map(|net| net.parse().unwrap()).collect(),
            tags: BTreeSet::new(),
            user: None,
        };
        (peer.id, peer)
    });
    Netmap {
        mesh,
        epoch: Epoch(1),
        generation: Generation(1),
        me: Me {
            id: NodeId(1),
            name: name(1),
            key: key(1),
            addresses: addresses(1),
            tags: BTreeSet::new(),
            user: None,
            expires: None,
            expired: false,
        },
        peers: peers.collect(),
        policy: policy(random),
    }
}

fn policy(random: &mut Random) -> NodePolicy {
    let mut identities: BTreeMap<IpNet, Identity> = BTreeMap::new();
    let near = [Identity(16), Identity(17)];
    let far = [Identity(18), Identity(19), Identity(20)];
    for net in addresses(1).prefixes() {
        identities.insert(net, near[0]);
    }
    for net in ["192.168.0.0/16", "fd77::/16"] {
        identities.insert(net.parse().unwrap(), near[1]);
    }
    for n in 2..=5 {
        // Now and then a peer is taken out of the policy.
        if random.one_in(8) {
            continue;
        }
        let identity = random.pick(&far);
        for net in addresses(n).prefixes() {
            identities.insert(net, identity);
        }
    }
    for net in ["10.1.0.0/16", "fd99::/16", "10.1.0.0/24"] {
        if !random.one_in(4) {
            identities.insert(net.parse().unwrap(), random.pick(&far));
        }
    }
    let mut entries = BTreeMap::new();
    let mut rules = BTreeMap::new();
    for n in 1..=4 + random.below(16) as u32 {
        let remote = random.pick(&[far[0], far[1], far[2], Identity::ANY]);
        let proto = random.pick(&[
            None,
            Some(1),
            Some(58),
            Some(6),
            Some(6),
            Some(17),
            Some(17),
            Some(47),
            Some(132),
        ]);
        let (a, b) = (random.pick(&PORTS), random.pick(&PORTS));
        let ports = match proto {
            Some(6 | 17 | 132) if !random.one_in(3) => PortRange {
                first: a.min(b),
                last: a.max(b),
            },
            _ => PortRange::ALL,
        };
        let key = EntryKey {
            remote,
            local: random.pick(&near),
            direction: random.pick(&Direction::ALL),
            proto,
            ports,
        };
        let action = if random.one_in(5) {
            Action::Deny
        } else {
            Action::Accept
        };
        entries.insert(
            key,
            Entry {
                action,
                rule: RuleId(n),
            },
        );
        rules.insert(
            RuleId(n),
            Rule {
                file: "policy".into(),
                line: 100 - n,
                summary: format!("rule {n}"),
            },
        );
    }
    NodePolicy {
        identities,
        entries,
        rules,
    }
}

/// Who sends from where, read straight from the netmap.
pub(crate) fn senders(netmap: &Netmap) -> HashMap<IpNet, u32> {
    let of = |peer: &Peer| {
        let number = peer.id.0 as u32;
        peer.allowed_ips()
            .map(move |net| (net, number))
            .collect::<Vec<_>>()
    };
    netmap.peers.values().flat_map(of).collect()
}

/// A packet that often has to do with one before it.
pub(crate) fn packet(random: &mut Random, earlier: &[Packet]) -> Packet {
    if !earlier.is_empty() && !random.one_in(3) {
        let before = random.pick(earlier);
        // Errors about errors would soon be all that is left.
        if !matches!(before.body, Body::IcmpError { .. }) || random.one_in(4) {
            return related(random, &before);
        }
    }
    let v4 = random.one_in(2);
    let (far, near) = if v4 {
        (&FAR_V4, &NEAR_V4)
    } else {
        (&FAR_V6, &NEAR_V6)
    };
    let far = if random.one_in(5) {
        random.pick(far)
    } else {
        random.pick(&far[..5])
    };
    let near = if random.one_in(10) {
        random.pick(near)
    } else {
        random.pick(&near[..2])
    };
    let (mut far, near) = (address(far), address(near));
    if !v4 && random.one_in(50) {
        far = address("::ffff:100.64.0.2");
    }
    let direction = random.pick(&Direction::ALL);
    let (source, destination) = match direction {
        Direction::Ingress => (far, near),
        Direction::Egress => (near, far),
    };
    let body = body(random, v4);
    let mut packet = Packet::new(direction, source, destination, body);
    decorate(random, &mut packet);
    packet
}

fn body(random: &mut Random, v4: bool) -> Body {
    let (source, destination) = (40_000 + random.below(2) as u16, random.pick(&PORTS));
    match random.below(12) {
        0..=4 => Body::Tcp {
            source,
            destination,
            flags: if random.one_in(4) { flags(random) } else { 2 },
        },
        5..=7 => Body::Udp {
            source,
            destination,
        },
        8 => Body::Echo {
            request: !random.one_in(4),
            id: random.below(2) as u16,
        },
        9 => Body::Icmp(random.pick(if v4 {
            &[5, 9, 13, 17]
        } else {
            &[130, 133, 137, 143]
        })),
        10 => Body::Sctp {
            source,
            destination,
        },
        _ => Body::Other(random.pick(&[47, 50, 99])),
    }
}

fn flags(random: &mut Random) -> u8 {
    random.pick(&[2, 18, 16, 16, 24, 17, 4, 20, 1, 0, 3, 6, 41])
}

fn decorate(random: &mut Random, packet: &mut Packet) {
    if packet.is_v4() && random.one_in(10) {
        packet.options = 4 * (1 + random.below(10) as usize);
    }
    if !packet.is_v4() && random.one_in(5) {
        let kinds = [
            Extension::HopByHop,
            Extension::Destination,
            Extension::Destination,
            Extension::Routing(4),
            Extension::Routing(0),
            Extension::Mobility,
        ];
        for _ in 0..=random.below(5) {
            let known = if random.one_in(3) { 6 } else { 4 };
            packet.extensions.push(random.pick(&kinds[..known]));
        }
    }
    if random.one_in(8) {
        let first = random.one_in(2);
        packet.fragment = Some(Fragment {
            id: random.below(3) as u16,
            offset: if first {
                0
            } else {
                random.pick(&[1, 2, 3, 100])
            },
            more: first || random.one_in(2),
        });
    }
}

/// An answer, a repetition, an error about it, or a later fragment of it.
fn related(random: &mut Random, before: &Packet) -> Packet {
    let mut packet = before.clone();
    let answer = !random.one_in(3);
    if answer {
        packet.direction = before.direction.reverse();
        (packet.source, packet.destination) = (before.destination, before.source);
    }
    packet.fragment = None;
    packet.extensions.clear();
    packet.options = 0;
    match &mut packet.body {
        Body::Tcp {
            source,
            destination,
            flags: now,
        } => {
            if answer {
                (*source, *destination) = (*destination, *source);
            }
            *now = match random.below(8) {
                0 => flags(random),
                1 => 17,
                _ if answer && *now == 2 => 18,
                _ if *now == 2 && !random.one_in(3) => 16,
                _ if *now == 18 => 16,
                same => {
                    if same == 2 {
                        20
                    } else {
                        *now
                    }
                }
            };
        }
        Body::Udp {
            source,
            destination,
        }
        | Body::Sctp {
            source,
            destination,
        } if answer => {
            (*source, *destination) = (*destination, *source);
        }
        Body::Echo { request, .. } if answer && !random.one_in(4) => *request = !*request,
        _ => {}
    }
    if random.one_in(8) && !matches!(before.body, Body::IcmpError { .. }) {
        // Somebody reports on the earlier packet to who sent it.
        packet = before.clone();
        packet.direction = before.direction.reverse();
        packet.destination = before.source;
        let v4 = before.is_v4();
        let reporter = if v4 {
            "100.64.0.4"
        } else {
            "fd00:a:b:c:d:e:f:4"
        };
        packet.source = if random.one_in(4) {
            address(reporter)
        } else {
            before.destination
        };
        let mut quoted = before.clone();
        quoted.extensions.clear();
        if random.one_in(10) {
            quoted.source = address(if v4 {
                "100.64.0.77"
            } else {
                "fd00:a:b:c:d:e:f:77"
            });
        }
        packet.extensions.clear();
        packet.fragment = None;
        packet.options = 0;
        let kind = random.pick(if v4 { &[3, 11, 12, 4] } else { &[1, 2, 3, 4] });
        packet.body = Body::IcmpError {
            kind,
            code: random.pick(&[0, 1, 4]),
            quoted: Box::new(quoted),
        };
        return packet;
    }
    if random.one_in(6) {
        decorate(random, &mut packet);
    }
    packet
}
