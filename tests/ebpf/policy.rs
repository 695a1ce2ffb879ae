//! Recorded policy cases in the packet path: what the service answered, the kernel answers.
//!
//! ```text
//!   case ── compile ── netmap of a node ── Tables ──► maps
//!   (source, destination, protocol, port) ── packet ──► BPF_PROG_TEST_RUN ──► pass exactly where recorded
//! ```
//! Each probe is a new flow, at the receiver, and at the sender where that is a node. Ports are
//! asked at and beside the ends of every recorded range.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use mesh_core::Direction;
use mesh_core::dataplane::Tables;
use mesh_core::desired::MTU;
use mesh_core::netmap::build;
use mesh_core::node::{Epoch, Generation, MeshId, NodeId};
use mesh_core::world::{Mesh, World};

use crate::kernel::{Kernel, SHORTEST};
use crate::packet::{Body, Packet};

#[allow(dead_code, reason = "what packets do not show is compared elsewhere")]
#[path = "../../mesh-core/tests/policy_cases/case.rs"]
mod case;
#[path = "../../mesh-core/tests/support/mod.rs"]
mod support;

use case::{Approval, Case, Scene};

/// Of the accepted cases that say who reaches whom, every so many is tried: all of them take minutes.
const STRIDE: usize = 9;

#[test]
fn the_kernel_answers_recorded_cases_as_recorded() {
    let Some(folder) = case::folder() else {
        return;
    };
    let sets = case::read(&folder);
    let told = |case: &&Case| case.accepted && !case.optional && case.reach.is_some();
    let mut kernel = Kernel::new();
    let (mut tried, mut nodes, mut probes) = (0, 0, 0);
    let start = Instant::now();
    for case in sets.values().flatten().filter(told).step_by(STRIDE) {
        let scene = case.scene(Approval::AsRecorded);
        let world = world(&scene);
        let policy = scene.mesh.policy(&case.policy_text);
        for (name, id) in &scene.ids {
            let netmap = build::build(&world, &policy, *id).unwrap();
            kernel.apply(&Tables::of(&netmap, MTU));
            let mut asker = Asker {
                kernel: &kernel,
                case,
                me: name,
                probes: 0,
            };
            asker.ask(&scene, *id);
            probes += asker.probes;
            nodes += 1;
        }
        tried += 1;
    }
    println!(
        "{tried} cases, {nodes} nodes, {probes} probes in {:.1} s",
        start.elapsed().as_secs_f64()
    );
    assert!(probes > 1_000, "too few probes to say anything: {probes}");
}

fn world(scene: &Scene) -> World {
    World {
        mesh: Arc::new(Mesh {
            id: MeshId([7; 16]),
            domain: "mesh.internal".to_owned(),
            pools: scene.mesh.pools,
        }),
        epoch: Epoch(1),
        generation: Generation(1),
        users: scene.mesh.users.clone(),
        nodes: scene.mesh.nodes.clone(),
    }
}

/// Asks a node that is loaded about every flow that the case knows of.
struct Asker<'a> {
    kernel: &'a Kernel,
    case: &'a Case,
    me: &'a str,
    probes: u32,
}

impl Asker<'_> {
    fn ask(&mut self, scene: &Scene, id: NodeId) {
        let reach = self.case.reach.as_ref().expect("chosen for it");
        let exit = scene.mesh.nodes[&id].is_exit_node();
        let receives = |label: &str| {
            case::owner(label) == Some(self.me) || (exit && label.starts_with("EXT/"))
        };
        let is_own =
            |label: &str| !label.starts_with("ROUTE:") && case::owner(label) == Some(self.me);
        for (dst, &to) in &reach.addrs {
            for (src, &from) in &reach.addrs {
                if case::owner(src) == case::owner(dst) || from.is_ipv4() != to.is_ipv4() {
                    continue;
                }
                let recorded = |receiver: &str| {
                    let spec = reach.allow.get(receiver)?.get(dst);
                    // A node that was not there to be asked says nothing; one that was, all of it.
                    Some(
                        spec.and_then(|allow| allow.get(src))
                            .map_or("", String::as_str),
                    )
                };
                if receives(dst)
                    && let Some(spec) = recorded(self.me)
                {
                    self.probe(Direction::Ingress, from, to, spec);
                }
                // Where a node's own packets to another's own address end up needs no election.
                if is_own(src)
                    && !dst.starts_with("ROUTE:")
                    && let Some(receiver) = case::owner(dst)
                    && let Some(spec) = recorded(receiver)
                {
                    self.probe(Direction::Egress, from, to, spec);
                }
            }
        }
    }

    fn probe(&mut self, direction: Direction, source: IpAddr, destination: IpAddr, spec: &str) {
        for (proto, port) in questions(spec) {
            self.probes += 1;
            // From another port each time: no flow of an earlier question answers this one.
            let from = 1024 + (self.probes % 60_000) as u16;
            let body = match proto {
                6 => Body::Tcp {
                    source: from,
                    destination: port,
                    flags: 0x02,
                },
                17 => Body::Udp {
                    source: from,
                    destination: port,
                },
                132 => Body::Sctp {
                    source: from,
                    destination: port,
                },
                ECHO => Body::Echo {
                    request: true,
                    id: from,
                },
                other => Body::Other(other),
            };
            let packet = Packet::new(direction, source, destination, body);
            let mut bytes = packet.bytes();
            bytes.resize(bytes.len().max(SHORTEST), 0);
            let (passed, _) = self.kernel.run(direction, &bytes);
            assert_eq!(
                passed,
                allows(spec, proto, port),
                "{} at {}, {}: {source} -> {destination} protocol {proto} port {port}, recorded {spec:?}",
                self.case.id,
                self.me,
                direction.name(),
            );
        }
    }
}

/// Stands for an echo of the packet's family, as the cases ask for it.
const ECHO: u8 = 1;

/// Where the answer of a spec may change, and where it may not.
fn questions(spec: &str) -> BTreeSet<(u8, u16)> {
    let mut questions: BTreeSet<(u8, u16)> =
        [(ECHO, 0), (6, 22), (6, 443), (17, 53), (132, 7), (47, 0)].into();
    for (proto, first, last) in ranges(spec) {
        questions.extend([(proto, first), (proto, last)]);
        questions.extend(first.checked_sub(1).map(|port| (proto, port)));
        questions.extend(last.checked_add(1).map(|port| (proto, port)));
    }
    questions
}

/// The parts of a spec that name a protocol.
fn ranges(spec: &str) -> impl Iterator<Item = (u8, u16, u16)> {
    spec.split(';').flat_map(|part| {
        let (proto, ports) = part.split_once(':').unwrap_or(("0", ""));
        let proto: u8 = proto.parse().unwrap();
        let ports = ports.split(',').filter(|range| !range.is_empty());
        ports.map(move |range| match range.split_once('-') {
            _ if range == "*" => (proto, 0, u16::MAX),
            Some((first, last)) => (proto, first.parse().unwrap(), last.parse().unwrap()),
            None => (proto, range.parse().unwrap(), range.parse().unwrap()),
        })
    })
}

fn allows(spec: &str, proto: u8, port: u16) -> bool {
    match proto {
        ECHO => spec.split(';').any(|part| part == "icmp"),
        _ => ranges(spec).any(|(p, first, last)| p == proto && (first..=last).contains(&port)),
    }
}
