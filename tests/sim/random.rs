//! Random histories of a mesh, and a few that were worth writing down.

use std::time::Duration;

use proptest::prelude::*;

use crate::mesh::{Fault, Simulation};
use crate::model::{Model, Pairs, TAGS};

const MOST_AGENTS: usize = 8;

#[derive(Clone, Debug)]
enum Step {
    Enroll {
        tag: usize,
    },
    /// `mesh up --auth-key` once more, as after expiry or deletion.
    EnrollAgain {
        agent: usize,
    },
    Policy(Pairs),
    Rename {
        agent: usize,
        name: String,
    },
    Expire {
        agent: usize,
    },
    Delete {
        agent: usize,
    },
    Roam {
        agent: usize,
        host: u8,
    },
    Restart {
        agent: usize,
    },
    Cut {
        agent: usize,
    },
    Fault(Fault),
    Forge {
        agent: usize,
    },
    Replay {
        which: usize,
    },
    CoordinatorGone,
    CoordinatorBack,
    BackUp,
    Restore,
    Wait {
        milliseconds: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let agent = || 0..MOST_AGENTS;
    prop_oneof![
        4 => (0..TAGS).prop_map(|tag| Step::Enroll { tag }),
        2 => agent().prop_map(|agent| Step::EnrollAgain { agent }),
        4 => any::<u16>().prop_map(|bits| Step::Policy(Pairs(bits))),
        2 => (agent(), "[a-z][a-z0-9]{0,6}").prop_map(|(agent, name)| Step::Rename { agent, name }),
        1 => agent().prop_map(|agent| Step::Expire { agent }),
        1 => agent().prop_map(|agent| Step::Delete { agent }),
        2 => (agent(), 1..=254_u8).prop_map(|(agent, host)| Step::Roam { agent, host }),
        3 => agent().prop_map(|agent| Step::Restart { agent }),
        3 => agent().prop_map(|agent| Step::Cut { agent }),
        5 => prop_oneof![Just(Fault::Lose), Just(Fault::Repeat), Just(Fault::Delay)]
            .prop_map(Step::Fault),
        1 => agent().prop_map(|agent| Step::Forge { agent }),
        2 => (0..1_000_usize).prop_map(|which| Step::Replay { which }),
        1 => Just(Step::CoordinatorGone),
        2 => Just(Step::CoordinatorBack),
        1 => Just(Step::BackUp),
        1 => Just(Step::Restore),
        8 => (1..3_000_u64).prop_map(|milliseconds| Step::Wait { milliseconds }),
    ]
}

fn take(mesh: &mut Simulation, step: &Step) {
    let there = |agent: usize| (agent < mesh.agents.len()).then_some(agent);
    match step {
        Step::Enroll { tag } => {
            if mesh.agents.len() < MOST_AGENTS {
                mesh.add_agent(*tag);
            }
        }
        Step::EnrollAgain { agent } => {
            if let Some(agent) = there(*agent) {
                mesh.enroll(agent);
            }
        }
        Step::Policy(pairs) => mesh.coordinator.set_policy(*pairs),
        Step::Rename { agent, name } => {
            if let Some(id) = there(*agent).and_then(|agent| mesh.node(agent)) {
                mesh.coordinator.rename(id, name);
            }
        }
        Step::Expire { agent } => {
            if let Some(id) = there(*agent).and_then(|agent| mesh.node(agent)) {
                mesh.coordinator.expire(id);
            }
        }
        Step::Delete { agent } => {
            if let Some(agent) = there(*agent) {
                mesh.delete(agent);
            }
        }
        Step::Roam { agent, host } => {
            if let Some(agent) = there(*agent) {
                mesh.roam(agent, *host);
            }
        }
        Step::Restart { agent } => {
            if let Some(agent) = there(*agent) {
                mesh.restart(agent);
            }
        }
        Step::Cut { agent } => {
            if let Some(agent) = there(*agent) {
                mesh.cut(agent);
            }
        }
        Step::Fault(fault) => mesh.fault(*fault),
        Step::Forge { agent } => {
            if let Some(agent) = there(*agent) {
                mesh.forge(agent);
            }
        }
        Step::Replay { which } => mesh.replay(*which),
        Step::CoordinatorGone => mesh.set_reachable(false),
        Step::CoordinatorBack => mesh.set_reachable(true),
        Step::BackUp => mesh.back_up(),
        Step::Restore => mesh.restore(),
        Step::Wait { milliseconds } => mesh.run(Duration::from_millis(*milliseconds)),
    }
}

/// The model of what the coordinator's world says now.
fn model(mesh: &Simulation) -> Model {
    let mut model = Model::default();
    for (number, agent) in mesh.agents.iter().enumerate() {
        let Some(id) = mesh.node(number) else {
            continue;
        };
        if mesh.coordinator.world.nodes[&id].expired {
            model.expired.insert(number);
        } else {
            model.valid.insert(number, agent.tag);
        }
    }
    model
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, max_shrink_iters: 4_000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happened_a_healed_mesh_agrees_with_the_model(
        pairs in any::<u16>(),
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let mut mesh = Simulation::new(Pairs(pairs));
        for step in &steps {
            take(&mut mesh, step);
        }
        mesh.heal();
        mesh.check_at_rest(&model(&mesh));
    }
}

/// A mesh of `count` agents that are allowed to know each other, at rest.
fn settled(count: usize) -> Simulation {
    let mut mesh = Simulation::new(Pairs(u16::MAX));
    for number in 0..count {
        mesh.add_agent(number % TAGS);
    }
    mesh.run(Duration::from_secs(5));
    mesh.check_at_rest(&model(&mesh));
    mesh
}

#[test]
fn a_policy_edit_reaches_everybody_within_a_second() {
    let mut mesh = settled(12);
    mesh.coordinator.set_policy(Pairs(0));
    mesh.run(Duration::from_secs(1));
    mesh.check_at_rest(&model(&mesh));
    assert!(
        mesh.agents
            .iter()
            .all(|agent| agent.kernel.as_ref().unwrap().wireguard.peers.is_empty())
    );
}

#[test]
fn without_a_coordinator_restarted_agents_go_on_as_before() {
    let mut mesh = settled(6);
    mesh.set_reachable(false);
    for agent in 0..6 {
        mesh.restart(agent);
    }
    mesh.run(Duration::from_secs(1));
    for agent in &mesh.agents {
        assert_eq!(agent.kernel.as_ref().unwrap().wireguard.peers.len(), 5);
    }
}

#[test]
fn a_restored_backup_starts_a_new_epoch_that_all_follow() {
    let mut mesh = settled(4);
    mesh.back_up();
    mesh.coordinator.set_policy(Pairs(0));
    mesh.run(Duration::from_secs(1));
    mesh.restore();
    mesh.run(Duration::from_secs(60));
    mesh.check_at_rest(&model(&mesh));
    let netmap = mesh.agents[0].state.netmap().unwrap();
    assert_eq!(netmap.epoch.0, 2);
    assert_eq!(netmap.peers.len(), 3);
}

#[test]
fn whom_a_restored_world_knows_again_needs_no_new_key() {
    let mut mesh = settled(2);
    mesh.back_up();
    mesh.delete(0);
    mesh.run(Duration::from_secs(1));
    assert!(mesh.agents[0].state.netmap().is_none());
    mesh.restore();
    mesh.heal();
    mesh.check_at_rest(&model(&mesh));
    assert_eq!(mesh.agents[0].state.netmap().unwrap().peers.len(), 1);
}

#[test]
fn a_restarted_coordinator_has_everybody_back_within_half_a_minute() {
    let mut mesh = settled(32);
    mesh.set_reachable(false);
    mesh.run(Duration::from_secs(10));
    mesh.set_reachable(true);
    mesh.run(Duration::from_secs(30));
    assert!(mesh.agents.iter().all(|agent| agent.state.is_connected()));
    mesh.check_at_rest(&model(&mesh));
}

#[test]
fn forged_and_replayed_updates_change_nothing() {
    let mut mesh = settled(4);
    mesh.coordinator.set_policy(Pairs(0));
    mesh.run(Duration::from_secs(1));
    for which in 0..40 {
        mesh.replay(which);
        mesh.forge(which % 4);
        mesh.run(Duration::from_millis(50));
        for agent in &mesh.agents {
            assert!(agent.state.netmap().unwrap().peers.is_empty());
        }
    }
    assert!(mesh.agents.iter().any(|agent| agent.state.refused() > 0));
    mesh.heal();
    mesh.check_at_rest(&model(&mesh));
}
