//! What the packet path costs here, printed: the verifier's count and nanoseconds per packet.

use mesh_core::Direction;
use mesh_core::dataplane::Tables;
use mesh_core::desired::MTU;
use mesh_core::netmap::{Action, Entry, EntryKey, NodePolicy, PortRange};
use mesh_core::{Identity, RuleId};

use crate::kernel::Kernel;
use crate::packet::{Body, Packet};
use crate::random::{self, Random};

#[test]
fn the_programs_are_small_and_an_established_flow_is_cheap() {
    let mut kernel = Kernel::new();
    for name in ["mesh_in", "mesh_eg", "guard"] {
        let program = kernel.dataplane().program(name).expect("a loaded program");
        let info = program.info().expect("info of a loaded program");
        let verified = info.verified_instruction_count().expect("since Linux 5.16");
        println!(
            "{name}: {verified} instructions verified, {} bytes of machine code",
            info.size_jitted()
        );
        assert!(
            verified < 200_000,
            "{name} is near the limit of older kernels: {verified}"
        );
    }
    let mut netmap = random::netmap(&mut Random(1));
    let key = EntryKey {
        remote: Identity::ANY,
        local: Identity(16),
        direction: Direction::Ingress,
        proto: None,
        ports: PortRange::ALL,
    };
    let entry = Entry {
        action: Action::Accept,
        rule: RuleId(1),
    };
    netmap.policy = NodePolicy {
        entries: [(key, entry)].into(),
        ..netmap.policy
    };
    let nets = netmap
        .peers
        .values()
        .flat_map(|peer| peer.addresses.prefixes());
    netmap
        .policy
        .identities
        .extend(nets.map(|net| (net, Identity(18))));
    kernel.apply(&Tables::of(&netmap, MTU));
    for (name, me, peer) in [
        ("v4", "100.64.0.1", "100.64.0.2"),
        ("v6", "fd00::1", "fd00::2"),
    ] {
        let (me, peer) = (me.parse().unwrap(), peer.parse().unwrap());
        let ingress = |flags| {
            let body = Body::Tcp {
                source: 40_000,
                destination: 80,
                flags,
            };
            Packet::new(Direction::Ingress, peer, me, body).bytes()
        };
        let body = Body::Tcp {
            source: 80,
            destination: 40_000,
            flags: 18,
        };
        let answer = Packet::new(Direction::Egress, me, peer, body).bytes();
        assert!(kernel.run(Direction::Ingress, &ingress(2)).0);
        assert!(kernel.run(Direction::Egress, &answer).0);
        assert!(kernel.run(Direction::Ingress, &ingress(16)).0);
        let best = (0..5)
            .map(|_| kernel.run_program("mesh_in", &ingress(16), 200_000).2)
            .min()
            .unwrap_or_default();
        println!("established {name}: {best} ns, TEST_RUN's own time included");
    }
}
