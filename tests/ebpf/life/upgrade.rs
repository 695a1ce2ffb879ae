//! Another layout of the maps: filtering never stops, and flows come along.

use aya::maps::{HashMap, MapData};
use aya::{TestRun as _, TestRunOptions};
use mesh_agent::dataplane::{Dataplane, Only, Options};
use mesh_common::flow::{FlowEntry, FlowKey};
use mesh_common::maps;
use mesh_core::Direction;
use mesh_core::dataplane::vigil::Standing;

use super::chain::{each_chain, on};
use super::layout;
use crate::scene::*;

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
        let programs = on("lo", options);
        assert!(options.pin_dir.join("v0").exists(), "it filters still");
        new.apply(&tables()).unwrap();
        assert_eq!(new.standing().unwrap(), Standing::First);
        assert_eq!(on("lo", options), programs, "one program, in its place");
        assert!(!options.pin_dir.join("v0").exists());
        let carried = new.kernel().established().get(&flow).unwrap();
        assert_eq!((carried.state.generation, carried.bytes), (0, [3, 4]));
        drop(new);
        // And its successor finds nothing of the old.
        let mut new = Dataplane::attach("lo", options).unwrap();
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
        assert_eq!(on("lo", options), ["mesh_in"]);
        assert!(!options.pin_dir.join("v0").exists());
    });
}
