//! An agent's life around the programs: first start, death, adoption, and what must be refused.

mod chain;
mod upgrade;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use aya::maps::{Array, MapData};
use aya::programs::SchedClassifier;
use aya::{TestRun as _, TestRunOptions};
use mesh_agent::dataplane::{AttachError, Dataplane, Options};
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

#[test]
fn a_pin_dir_that_goes_with_its_file_system_is_no_trap() {
    own_network();
    let bpffs = Bpffs::mount().unwrap();
    drop(Dataplane::attach("lo", &options(&bpffs)).unwrap());
    drop(bpffs);
    let bpffs = Bpffs::mount().unwrap();
    let mut dataplane = Dataplane::attach("lo", &options(&bpffs)).unwrap();
    assert_eq!(dataplane.standing().unwrap(), Standing::First);
}
