//! An agent's life around the programs: first start, death, adoption, and what must be refused.

use aya::maps::{Array, MapData};
use aya::programs::{SchedClassifier, TcAttachType};
use mesh_agent::dataplane::{AttachError, Dataplane, Options, probe};
use mesh_common::flow::{FlowEntry, FlowKey};
use mesh_common::maps;
use mesh_core::dataplane::Tables;
use mesh_core::dataplane::vigil::Standing;
use mesh_core::desired::MTU;
use mesh_core::netmap::{Action, Entry, EntryKey, Netmap, NodePolicy, PortRange};
use mesh_core::{Direction, Identity, RuleId};

use crate::kernel::{Kernel, options, own_network};
use crate::packet::{Body, Packet};
use crate::random::{self, Random};
use crate::scratch::Bpffs;

pub(crate) const ME: [u8; 4] = [100, 64, 0, 1];
pub(crate) const PEER: [u8; 4] = [100, 64, 0, 2];

pub(crate) fn tcp(direction: Direction, flags: u8) -> Vec<u8> {
    let (source, destination, ports) = match direction {
        Direction::Ingress => (PEER, ME, [40_000, 22]),
        Direction::Egress => (ME, PEER, [22, 40_000]),
    };
    let body = Body::Tcp {
        source: ports[0],
        destination: ports[1],
        flags,
    };
    Packet::new(direction, source.into(), destination.into(), body).bytes()
}

/// Peer 2 may open TCP port 22 here, or nothing.
pub(crate) fn netmap(allowed: bool) -> Netmap {
    let mut netmap = random::netmap(&mut Random(1));
    let (me, peer) = (Identity(16), Identity(18));
    let key = EntryKey {
        remote: peer,
        local: me,
        direction: Direction::Ingress,
        proto: Some(6),
        ports: PortRange {
            first: 22,
            last: 22,
        },
    };
    let entry = Entry {
        action: Action::Accept,
        rule: RuleId(1),
    };
    netmap.policy = NodePolicy {
        identities: [
            (std::net::IpAddr::from(ME).into(), me),
            (std::net::IpAddr::from(PEER).into(), peer),
        ]
        .into(),
        entries: if allowed {
            [(key, entry)].into()
        } else {
            [].into()
        },
        ..NodePolicy::default()
    };
    netmap
}

pub(crate) fn tables(allowed: bool) -> Tables {
    Tables::of(&netmap(allowed), MTU)
}

pub(crate) const SYN: u8 = 2;
const SYN_ACK: u8 = 18;
pub(crate) const ACK: u8 = 16;

/// Opens the connection that the policy allows.
pub(crate) fn connect(kernel: &Kernel) {
    assert!(
        kernel
            .run(Direction::Ingress, &tcp(Direction::Ingress, SYN))
            .0
    );
    assert!(
        kernel
            .run(Direction::Egress, &tcp(Direction::Egress, SYN_ACK))
            .0
    );
    assert!(
        kernel
            .run(Direction::Ingress, &tcp(Direction::Ingress, ACK))
            .0
    );
    assert_eq!(kernel.established().iter().count(), 1);
}

#[test]
fn without_a_policy_everything_is_dropped() {
    let mut kernel = Kernel::new();
    assert!(
        !kernel
            .run(Direction::Ingress, &tcp(Direction::Ingress, SYN))
            .0
    );
    assert!(
        !kernel
            .run(Direction::Egress, &tcp(Direction::Egress, SYN))
            .0
    );
    let counters = kernel.dataplane().counters().unwrap();
    let reasons: Vec<_> = counters
        .dropped
        .keys()
        .map(|(_, reason)| reason.name())
        .collect();
    assert_eq!(reasons, ["no policy", "no policy"]);
    assert_eq!(kernel.dataplane().standing().unwrap(), Standing::First);
}

#[test]
fn a_dead_agents_policy_goes_on_and_its_successor_adopts_it() {
    let mut kernel = Kernel::new();
    kernel.apply(&tables(true));
    connect(&kernel);
    kernel.kill();
    // The second agent's programs, in place of the first's, over the same maps.
    kernel.start();
    assert_eq!(kernel.dataplane().standing().unwrap(), Standing::First);
    assert!(
        kernel
            .run(Direction::Egress, &tcp(Direction::Egress, ACK))
            .0
    );
    assert_eq!(kernel.established().iter().count(), 1);
    kernel.apply(&tables(true));
    assert!(
        kernel
            .run(Direction::Egress, &tcp(Direction::Egress, ACK))
            .0
    );
    kernel.kill();
    kernel.start();
    kernel.apply(&tables(false));
    assert!(
        !kernel
            .run(Direction::Egress, &tcp(Direction::Egress, ACK))
            .0
    );
    assert!(
        !kernel
            .run(Direction::Ingress, &tcp(Direction::Ingress, SYN))
            .0
    );
}

/// Both ways in which programs hang, whatever the kernel's own.
fn each_chain(check: impl Fn(&Options)) {
    for clsact in [true, false] {
        if !clsact && !probe::has_tcx() {
            continue;
        }
        own_network();
        let bpffs = Bpffs::mount().unwrap();
        check(&Options {
            clsact,
            ..options(&bpffs)
        });
    }
}

#[test]
fn a_successor_takes_the_place_of_the_dead_and_leaves_one_program() {
    each_chain(|options| {
        for _ in 0..3 {
            let dataplane = Dataplane::attach("lo", options).unwrap();
            assert_eq!(dataplane.standing().unwrap(), Standing::First);
            if !options.clsact {
                assert_eq!(on_loopback(), ["mesh_in"]);
            }
        }
        let dataplane = Dataplane::attach("lo", options).unwrap();
        dataplane.detach().unwrap();
        assert_eq!(std::fs::read_dir(&options.pin_dir).unwrap().count(), 0);
    });
}

#[test]
fn programs_that_were_taken_off_are_missed_and_put_back() {
    each_chain(|options| {
        let mut dataplane = Dataplane::attach("lo", options).unwrap();
        let thief = Dataplane::attach("lo", options).unwrap();
        thief.detach().unwrap();
        assert_eq!(dataplane.standing().unwrap(), Standing::Gone);
        dataplane.pin().unwrap();
        dataplane.hang().unwrap();
        assert_eq!(dataplane.standing().unwrap(), Standing::First);
    });
}

/// Another agent's programs, pinned elsewhere, for somebody else's.
fn foreign(bpffs: &Bpffs, options: &Options) -> Dataplane {
    let options = Options {
        pin_dir: bpffs.folder("foreign"),
        ..options.clone()
    };
    Dataplane::attach("lo", &options).unwrap()
}

#[test]
fn a_foreign_program_before_ours_is_seen_and_one_behind_is_no_matter() {
    if !probe::has_tcx() {
        // Before 6.6 none can come before ours.
        return;
    }
    own_network();
    let bpffs = Bpffs::mount().unwrap();
    let options = options(&bpffs);
    let behind = foreign(&bpffs, &options);
    let dataplane = Dataplane::attach("lo", &options).unwrap();
    assert_eq!(dataplane.standing().unwrap(), Standing::First);
    behind.detach().unwrap();
    let before = foreign(&bpffs, &options);
    assert_eq!(dataplane.standing().unwrap(), Standing::Behind);
    before.detach().unwrap();
    assert_eq!(dataplane.standing().unwrap(), Standing::First);
}

#[test]
fn programs_without_pins_go_on_and_are_known_as_orphans() {
    if !probe::has_tcx() {
        return;
    }
    own_network();
    let bpffs = Bpffs::mount().unwrap();
    let first = options(&bpffs);
    assert!(!Dataplane::is_orphaned("lo", &first).unwrap());
    drop(Dataplane::attach("lo", &first).unwrap());
    assert!(!Dataplane::is_orphaned("lo", &first).unwrap());
    drop(bpffs);
    assert_eq!(
        on_loopback(),
        ["mesh_in"],
        "nothing holds it there but itself"
    );
    let bpffs = Bpffs::mount().unwrap();
    assert!(Dataplane::is_orphaned("lo", &options(&bpffs)).unwrap());
}

#[test]
fn pins_that_were_taken_away_are_made_again() {
    let mut kernel = Kernel::new();
    kernel.apply(&tables(true));
    connect(&kernel);
    let folder = kernel.options().pin_dir.join(layout());
    for pin in std::fs::read_dir(&folder).unwrap() {
        std::fs::remove_file(pin.unwrap().path()).unwrap();
    }
    std::fs::remove_dir(&folder).unwrap();
    assert!(!kernel.dataplane().is_pinned());
    kernel.dataplane().pin().unwrap();
    assert!(kernel.dataplane().is_pinned());
    kernel.kill();
    kernel.start();
    assert_eq!(kernel.established().iter().count(), 1);
}

pub(crate) fn layout() -> String {
    format!("v{}", maps::LAYOUT_VERSION)
}

/// The folder of the running layout becomes another's, as an upgrade finds it.
fn age_layout(options: &Options) {
    let (now, before) = (options.pin_dir.join(layout()), options.pin_dir.join("v0"));
    std::fs::rename(now, before).unwrap();
}

#[test]
fn an_upgrade_to_another_layout_keeps_filtering_and_carries_flows_over() {
    each_chain(|options| {
        let mut old = Dataplane::attach("lo", options).unwrap();
        old.apply(&tables(true)).unwrap();
        let flow = FlowKey {
            proto: 6,
            ..FlowKey::NONE
        };
        let entry = FlowEntry {
            state: mesh_common::flow::FlowState {
                generation: 7,
                ..Default::default()
            },
            bytes: [3, 4],
            ..FlowEntry::default()
        };
        old.kernel().established().insert(flow, entry, 0).unwrap();
        drop(old);
        age_layout(options);

        let mut new = Dataplane::attach("lo", options).unwrap();
        assert_eq!(new.standing().unwrap(), Standing::First);
        let programs = (!options.clsact).then(on_loopback);
        assert!(options.pin_dir.join("v0").exists(), "it filters still");
        new.apply(&tables(true)).unwrap();
        assert_eq!(new.standing().unwrap(), Standing::First);
        assert_eq!(
            (!options.clsact).then(on_loopback),
            programs,
            "one program, in its place"
        );
        assert!(!options.pin_dir.join("v0").exists());
        let carried = new.kernel().established().get(&flow, 0).unwrap();
        assert_eq!((carried.state.generation, carried.bytes), (0, [3, 4]));
        drop(new);
        // And its successor finds nothing of the old.
        let new = Dataplane::attach("lo", options).unwrap();
        assert_eq!(new.standing().unwrap(), Standing::First);
    });
}

#[test]
fn an_upgrade_that_dies_half_way_is_taken_up_again() {
    each_chain(|options| {
        let mut old = Dataplane::attach("lo", options).unwrap();
        old.apply(&tables(true)).unwrap();
        drop(old);
        age_layout(options);
        drop(Dataplane::attach("lo", options).unwrap());
        let mut new = Dataplane::attach("lo", options).unwrap();
        new.apply(&tables(true)).unwrap();
        assert_eq!(new.standing().unwrap(), Standing::First);
        if !options.clsact {
            assert_eq!(on_loopback(), ["mesh_in"]);
        }
        assert!(!options.pin_dir.join("v0").exists());
    });
}

#[test]
fn an_edit_cuts_both_directions_at_once() {
    let mut kernel = Kernel::new();
    kernel.apply(&tables(true));
    connect(&kernel);
    kernel.apply(&tables(false));
    assert!(
        !kernel
            .run(Direction::Ingress, &tcp(Direction::Ingress, ACK))
            .0
    );
    assert!(
        !kernel
            .run(Direction::Egress, &tcp(Direction::Egress, ACK))
            .0
    );
    // Who reverts in time has cut nothing for good.
    kernel.apply(&tables(true));
    assert!(
        kernel
            .run(Direction::Ingress, &tcp(Direction::Ingress, ACK))
            .0
    );
}

#[test]
fn a_map_of_another_layout_is_refused() {
    let mut kernel = Kernel::new();
    kernel.dataplane.take().unwrap().detach().unwrap();
    let folder = kernel
        .options()
        .pin_dir
        .join(format!("v{}", maps::LAYOUT_VERSION));
    std::fs::create_dir_all(&folder).unwrap();
    let other = Array::<MapData, u64>::create(1, 0).unwrap();
    other.pin(folder.join(maps::CFG)).unwrap();
    match Dataplane::attach("lo", &kernel.options()) {
        Err(AttachError::Layout { map, .. }) => assert_eq!(map, maps::CFG),
        other => panic!("{other:?}"),
    }
}

#[test]
fn without_a_bpf_file_system_nothing_is_attached() {
    own_network();
    let folder = tempfile::tempdir().unwrap();
    let options = Options {
        pin_dir: folder.path().join("mesh"),
        ..Options::default()
    };
    assert!(matches!(
        Dataplane::attach("lo", &options),
        Err(AttachError::NoBpffs { .. })
    ));
}

#[test]
fn detaching_leaves_nothing_behind() {
    let mut kernel = Kernel::new();
    kernel.dataplane.take().unwrap().detach().unwrap();
    let left = std::fs::read_dir(kernel.options().pin_dir).unwrap().count();
    assert_eq!(left, 0);
}

#[test]
fn a_syn_gets_an_mss_that_fits_the_mesh() {
    let mut kernel = Kernel::new();
    kernel.apply(&tables(true));
    let mut packet = tcp(Direction::Ingress, SYN);
    packet[32] = 6 << 4;
    packet.extend([2, 4, 0x05, 0xb4]);
    let sum = checksum(&packet[20..]);
    packet[36..38].copy_from_slice(&sum.to_be_bytes());
    let (passes, out) = kernel.run(Direction::Ingress, &packet);
    assert!(passes);
    assert_eq!(u16::from_be_bytes([out[42], out[43]]), MTU - 40);
    assert_eq!(checksum(&out[20..]), 0, "the checksum follows");
}

fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let mut sum: u32 = words.sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[test]
fn the_guard_lets_nothing_in_to_our_mesh_address() {
    let mut kernel = Kernel::new();
    kernel.apply(&tables(true));
    let frame = |packet: &[u8]| {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00]);
        frame.extend(packet);
        frame
    };
    let to = |destination: [u8; 4]| {
        let body = Body::Udp {
            source: 1,
            destination: 2,
        };
        let source = [192, 168, 1, 2].into();
        frame(&Packet::new(Direction::Ingress, source, destination.into(), body).bytes())
    };
    const NEXT: u32 = u32::MAX;
    assert_eq!(kernel.run_program("guard", &to(ME), 1).0, 2);
    assert_eq!(kernel.run_program("guard", &to(PEER), 1).0, NEXT);
    assert_eq!(
        kernel.run_program("guard", &to([192, 168, 1, 1]), 1).0,
        NEXT
    );
    let mut arp = vec![0; 42];
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    assert_eq!(kernel.run_program("guard", &arp, 1).0, NEXT);
}

/// Programs on the ingress of loopback, by name, in their order.
fn on_loopback() -> Vec<String> {
    let (_, programs) = SchedClassifier::query_tcx("lo", TcAttachType::Ingress).unwrap();
    let names = programs
        .iter()
        .map(|program| program.name_as_str().unwrap().to_owned());
    names.collect()
}

#[test]
fn guards_follow_the_set_that_they_are_told() {
    if !probe::has_tcx() {
        // One filter of our priority and handle has room there, and the mesh's own has it.
        return;
    }
    let mut kernel = Kernel::new();
    kernel.dataplane().guard(["lo"]).unwrap();
    assert_eq!(on_loopback(), ["guard", "mesh_in"]);
    kernel.dataplane().guard(["lo", "gone0"]).unwrap();
    assert_eq!(on_loopback(), ["guard", "mesh_in"]);
    kernel.kill();
    kernel.start();
    assert_eq!(on_loopback(), ["guard", "mesh_in"]);
    kernel.dataplane().guard(["lo"]).unwrap();
    assert_eq!(on_loopback(), ["guard", "mesh_in"]);
    kernel.kill();
    kernel.start();
    kernel.dataplane().guard([]).unwrap();
    assert_eq!(
        on_loopback(),
        ["mesh_in"],
        "a predecessor's guard is taken away too"
    );
}

#[test]
fn a_pin_dir_that_goes_with_its_file_system_is_no_trap() {
    own_network();
    let bpffs = Bpffs::mount().unwrap();
    drop(Dataplane::attach("lo", &options(&bpffs)).unwrap());
    drop(bpffs);
    let bpffs = Bpffs::mount().unwrap();
    let dataplane = Dataplane::attach("lo", &options(&bpffs)).unwrap();
    assert_eq!(dataplane.standing().unwrap(), Standing::First);
}

/// A filter that matches everything, on the ingress of the thread's own loopback.
fn tc(verb: &str, priority: &str) {
    let program = ["bytecode", "1,6 0 0 4294967295,", "flowid", "1:1"];
    let done = std::process::Command::new("tc")
        .args(["filter", verb, "dev", "lo", "ingress"])
        .args(["protocol", "all", "pref", priority, "handle", "1", "bpf"])
        .args(if verb == "add" { &program[..] } else { &[] })
        .status();
    assert!(done.unwrap().success(), "tc filter {verb} pref {priority}");
}

#[test]
fn a_clsact_filter_before_ours_is_seen_and_one_behind_is_no_matter() {
    own_network();
    let bpffs = Bpffs::mount().unwrap();
    let options = Options {
        clsact: true,
        ..options(&bpffs)
    };
    let dataplane = Dataplane::attach("lo", &options).unwrap();
    tc("add", "2");
    assert_eq!(dataplane.standing().unwrap(), Standing::First);
    // Of one priority, whoever comes last is first.
    tc("add", "1");
    assert_eq!(dataplane.standing().unwrap(), Standing::Behind);
    tc("del", "1");
    assert_eq!(dataplane.standing().unwrap(), Standing::First);
}
