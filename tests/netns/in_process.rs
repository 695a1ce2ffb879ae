//! Nodes that may load no programs into the kernel: the same verdict, in the agent.
//!
//! ```text
//!   node      operator      developer        judge in process
//!   sandbox                                  programs in the kernel, which a test may disarm
//! ```
//! The scenarios are those of a mesh whose nodes all have programs, and so are reasons and counters.

use mesh_tests::Lab;
use mesh_tests::mesh::Mesh;
use mesh_tests::scenario::{self, Check};

use crate::mesh::hold_on;

fn hold(scenario: impl FnOnce(&mut Mesh, &mut Check) -> anyhow::Result<()>) {
    let lab = Lab::of_release_build().unwrap();
    let mesh = Mesh::in_process(lab, mesh_core::policy::EXAMPLE).unwrap();
    hold_on(mesh, scenario);
}

#[test]
fn they_say_that_they_do_and_what_would_help() {
    hold(|mesh, _| {
        for node in &mesh.nodes {
            let status = node.status()?;
            let health = status["health"].as_array().unwrap();
            let told = health.iter().find(|c| c["name"] == "EbpfUnavailable");
            assert_eq!(told.is_some(), node.name() != "sandbox", "{status:#}");
            if let Some(told) = told {
                let step = told["next_step"].as_str().unwrap();
                assert!(step.contains("CAP_BPF"), "{told}");
            }
        }
        Ok(())
    });
}

#[test]
fn only_allowed_pairs_reach_each_other() {
    hold(|mesh, check| scenario::reach::run(mesh, check));
}

#[test]
fn counters_name_the_reason_and_the_rule() {
    hold(scenario::count::run);
}

#[test]
fn a_forged_inner_source_gets_nothing_through() {
    hold(scenario::forge::run);
}

#[test]
fn an_edit_cuts_running_flows_and_a_refused_one_changes_nothing() {
    hold(scenario::edit::run);
}

#[test]
fn a_killed_agent_lets_nothing_through_and_is_back_at_once() {
    hold(scenario::agent::killed);
}
