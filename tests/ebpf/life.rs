//! An agent's life around the programs: first start, death, adoption, and what must be refused.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use aya::maps::{Array, HashMap, MapData};
use aya::programs::{SchedClassifier, TcAttachType};
use aya::{TestRun as _, TestRunOptions};
use mesh_agent::dataplane::{AttachError, Dataplane, Only, Options, probe};
use mesh_common::flow::{FlowEntry, FlowKey};
use mesh_common::maps;
use mesh_core::dataplane::Tables;
use mesh_core::dataplane::vigil::Standing;
use mesh_core::desired::MTU;
use mesh_core::{Direction, Identity};

use crate::kernel::{Kernel, options, own_network};
use crate::scene::*;
use crate::scratch::Bpffs;

#[test]
fn without_a_policy_everything_is_dropped() {
    let mut kernel = Kernel::new();
    assert!(!passes(&kernel, Direction::Ingress, SYN));
    assert!(!passes(&kernel, Direction::Egress, SYN));
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
    kernel.apply(&tables());
    handshake(&mut kernel);
    kernel.kill();
    // The second agent's programs, in place of the first's, over the same maps.
    kernel.start();
    assert_eq!(kernel.dataplane().standing().unwrap(), Standing::First);
    assert!(passes(&kernel, Direction::Egress, ACK));
    assert_eq!(kernel.established().len(), 1);
    kernel.apply(&tables());
    assert!(passes(&kernel, Direction::Egress, ACK));
    kernel.kill();
    kernel.start();
    kernel.apply(&revoked());
    assert!(!passes(&kernel, Direction::Egress, ACK));
    assert!(!passes(&kernel, Direction::Ingress, SYN));
}

/// What both policies allow passes at every moment of the change from one to the other.
#[test]
fn who_changed_while_no_agent_ran_costs_nobody_else_a_packet() {
    let mut kernel = kernel();
    kernel.kill();
    let mut renamed = netmap();
    let other = renamed.policy.identities.values_mut();
    for identity in other.filter(|identity| **identity == Identity(19)) {
        *identity = Identity(20);
    }
    kernel.start();
    let folder = kernel.options().pin_dir.join(layout());
    let mut pins = std::fs::read_dir(folder)
        .unwrap()
        .map(|pin| pin.unwrap().path());
    let is_ours = |pin: &std::path::PathBuf| pin.to_str().unwrap().contains("prog_in_");
    let program = SchedClassifier::from_pin(pins.find(is_ours).unwrap()).unwrap();
    let stop = AtomicBool::new(false);
    let sent = AtomicU32::new(0);
    let dropped = std::thread::scope(|scope| {
        let opener = scope.spawn(|| {
            let mut dropped = 0_u32;
            while !stop.load(Ordering::Relaxed) {
                let number = sent.load(Ordering::Relaxed);
                let ports = [1 + (number % 60_000) as u16, 22];
                let options = TestRunOptions {
                    data_in: Some(&tcp_between(PEER, ports, Direction::Ingress, SYN)),
                    ..TestRunOptions::default()
                };
                let passes = program.test_run(options).unwrap().return_value == u32::MAX;
                sent.store(number + 1, Ordering::Relaxed);
                dropped += u32::from(!passes);
            }
            dropped
        });
        while sent.load(Ordering::Relaxed) < 100 && !opener.is_finished() {
            std::thread::yield_now();
        }
        kernel.apply(&Tables::of(&renamed, MTU));
        stop.store(true, Ordering::Relaxed);
        opener.join().unwrap()
    });
    println!("{sent:?} flows opened meanwhile, {dropped} denied");
    assert_eq!(dropped, 0);
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

#[test]
fn what_became_of_the_programs_of_the_dead_is_found() {
    each_chain(|options| {
        let found = || Dataplane::attach("lo", options).unwrap().found();
        assert_eq!(found(), None);
        assert_eq!(found(), Some(Standing::First));
        if options.clsact {
            let done = std::process::Command::new("tc")
                .args(["qdisc", "del", "dev", "lo", "clsact"])
                .status();
            assert!(done.unwrap().success());
            assert_eq!(found(), Some(Standing::Gone));
            assert_eq!(found(), Some(Standing::First));
        } else {
            let bpffs = Bpffs::mount().unwrap();
            let foreign = foreign(&bpffs, options);
            assert_eq!(found(), Some(Standing::Behind));
            foreign.detach().unwrap();
            assert_eq!(found(), Some(Standing::First));
        }
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
    kernel.apply(&tables());
    handshake(&mut kernel);
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
    assert_eq!(kernel.established().len(), 1);
}

/// Without one of them the next agent would take the programs that hang for somebody else's.
#[test]
fn the_pin_of_a_program_is_missed_as_a_maps_is() {
    let mut kernel = Kernel::new();
    let folder = kernel.options().pin_dir.join(layout());
    let mut pins = 0;
    for pin in std::fs::read_dir(&folder).unwrap() {
        let pin = pin.unwrap().path();
        let name = pin.file_name().unwrap().to_str().unwrap();
        if !name.starts_with("prog_") {
            continue;
        }
        std::fs::remove_file(&pin).unwrap();
        assert!(!kernel.dataplane().is_pinned(), "{}", pin.display());
        kernel.dataplane().pin().unwrap();
        assert!(kernel.dataplane().is_pinned(), "{}", pin.display());
        pins += 1;
    }
    assert_eq!(pins, 3);
}

/// By it flows have their places, so without it nobody would find them, nor take them away.
#[test]
fn with_the_secret_the_flows_are_gone() {
    let mut kernel = Kernel::new();
    kernel.apply(&tables());
    handshake(&mut kernel);
    kernel.kill();
    std::fs::remove_file(kernel.pin(maps::CFG)).unwrap();
    kernel.start();
    assert_eq!(kernel.established().len(), 0);
    assert_ne!(kernel.config().pickup_until, 0);
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
        old.apply(&tables()).unwrap();
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
        old.kernel()
            .established()
            .put(flow, entry, Only::New)
            .unwrap();
        drop(old);
        age_layout(options);

        let mut new = Dataplane::attach("lo", options).unwrap();
        assert_eq!(new.standing().unwrap(), Standing::First);
        let programs = (!options.clsact).then(on_loopback);
        assert!(options.pin_dir.join("v0").exists(), "it filters still");
        new.apply(&tables()).unwrap();
        assert_eq!(new.standing().unwrap(), Standing::First);
        assert_eq!(
            (!options.clsact).then(on_loopback),
            programs,
            "one program, in its place"
        );
        assert!(!options.pin_dir.join("v0").exists());
        let carried = new.kernel().established().get(&flow).unwrap();
        assert_eq!((carried.state.generation, carried.bytes), (0, [3, 4]));
        drop(new);
        // And its successor finds nothing of the old.
        let new = Dataplane::attach("lo", options).unwrap();
        assert_eq!(new.standing().unwrap(), Standing::First);
    });
}

#[test]
fn an_upgrade_to_another_layout_ends_no_handshake() {
    each_chain(|options| {
        let send = |dataplane: &Dataplane, name, packet: &[u8]| {
            let options = TestRunOptions {
                data_in: Some(packet),
                ..TestRunOptions::default()
            };
            let program = dataplane.program(name).unwrap();
            program.test_run(options).unwrap().return_value == u32::MAX
        };
        let mut old = Dataplane::attach("lo", options).unwrap();
        old.apply(&tables()).unwrap();
        let ours = |direction, flags| tcp_between(PEER, [443, 50_000], direction, flags);
        assert!(send(&old, "mesh_eg", &ours(Direction::Egress, SYN)));
        drop(old);
        age_layout(options);
        let mut new = Dataplane::attach("lo", options).unwrap();
        new.apply(&tables()).unwrap();
        assert!(send(&new, "mesh_in", &ours(Direction::Ingress, SYN_ACK)));
        assert!(send(&new, "mesh_eg", &ours(Direction::Egress, ACK)));
        assert_eq!(new.kernel().established().flows().unwrap().len(), 1);
    });
}

#[test]
fn flows_that_lay_under_their_keys_are_carried_over() {
    each_chain(|options| {
        drop(Dataplane::attach("lo", options).unwrap());
        age_layout(options);
        let pin = options.pin_dir.join("v0").join(maps::CT_EST);
        std::fs::remove_file(&pin).unwrap();
        let mut flows = HashMap::<MapData, FlowKey, FlowEntry>::create(4, 0).unwrap();
        let key = FlowKey {
            proto: 6,
            ..FlowKey::NONE
        };
        let entry = FlowEntry {
            bytes: [3, 4],
            ..FlowEntry::default()
        };
        flows.insert(key, entry, 0).unwrap();
        flows.pin(&pin).unwrap();
        let mut new = Dataplane::attach("lo", options).unwrap();
        new.apply(&tables()).unwrap();
        let carried = new.kernel().established().get(&key).unwrap();
        assert_eq!(carried.bytes, [3, 4]);
    });
}

#[test]
fn an_upgrade_that_dies_half_way_is_taken_up_again() {
    each_chain(|options| {
        let mut old = Dataplane::attach("lo", options).unwrap();
        old.apply(&tables()).unwrap();
        drop(old);
        age_layout(options);
        drop(Dataplane::attach("lo", options).unwrap());
        let mut new = Dataplane::attach("lo", options).unwrap();
        new.apply(&tables()).unwrap();
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
    kernel.apply(&tables());
    handshake(&mut kernel);
    kernel.apply(&revoked());
    assert!(!passes(&kernel, Direction::Ingress, ACK));
    assert!(!passes(&kernel, Direction::Egress, ACK));
    // Who reverts in time has cut nothing for good.
    kernel.apply(&tables());
    assert!(passes(&kernel, Direction::Ingress, ACK));
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

fn ip(arguments: &[&str]) {
    let done = std::process::Command::new("ip").args(arguments).status();
    assert!(done.unwrap().success(), "ip {}", arguments.join(" "));
}

#[test]
fn a_guard_stays_with_an_interface_that_gets_another_name() {
    each_chain(|options| {
        ip(&["link", "add", "one0", "type", "veth", "peer", "two0"]);
        let mut dataplane = Dataplane::attach("lo", options).unwrap();
        dataplane.guard(["one0", "two0"]).unwrap();
        ip(&["link", "set", "one0", "name", "new0"]);
        dataplane.guard(["new0", "two0"]).unwrap();
        let behind = |dataplane: &mut Dataplane| dataplane.mend_guards().unwrap();
        assert_eq!(behind(&mut dataplane), [""; 0]);
        // Under its new name it is looked after as under its old one.
        if options.clsact {
            ip(&["link", "set", "new0", "up"]);
            tc_on("new0", "add", "1");
            assert_eq!(behind(&mut dataplane), ["new0"]);
            tc_on("new0", "del", "1");
        }
        assert_eq!(behind(&mut dataplane), [""; 0]);
        dataplane.guard([]).unwrap();
        dataplane.detach().unwrap();
    });
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
    tc_on("lo", verb, priority);
}

fn tc_on(interface: &str, verb: &str, priority: &str) {
    let program = ["bytecode", "1,6 0 0 4294967295,", "flowid", "1:1"];
    let done = std::process::Command::new("tc")
        .args(["filter", verb, "dev", interface, "ingress"])
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
