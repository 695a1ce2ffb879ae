//! A mesh of the four roles of the example policy, by its real programs.
//!
//! ```text
//!   coordinator      node       operator      sandbox      developer
//!        └─────────────┴────────────┴────────────┴────────────┘
//!                              underlay
//! ```
//! The demo runs the same scenarios one after the other on one mesh; here each has its own.

use mesh_tests::Lab;
use mesh_tests::mesh::{Backend, Mesh};
use mesh_tests::scenario::{self, Check};

fn mesh() -> Mesh {
    let lab = Lab::of_release_build().unwrap();
    Mesh::of_roles(lab, mesh_core::policy::EXAMPLE, Backend::Auto).unwrap()
}

fn hold(scenario: impl FnOnce(&mut Mesh, &mut Check) -> anyhow::Result<()>) {
    hold_on(mesh(), scenario);
}

pub(crate) fn hold_on(
    mut mesh: Mesh,
    scenario: impl FnOnce(&mut Mesh, &mut Check) -> anyhow::Result<()>,
) {
    if let Err(error) = scenario(&mut mesh, &mut Check::quiet()) {
        panic!("{error:?}\n{}", mesh.logs());
    }
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
fn a_new_machine_enrolls_and_a_deleted_node_is_gone() {
    hold(scenario::enrol::run);
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
fn a_one_off_key_makes_one_node_of_fifty_enrolments() {
    hold(scenario::keys::crowd);
}

#[test]
fn bad_keys_get_one_clear_error_each() {
    hold(scenario::keys::bad);
}

#[test]
fn a_killed_coordinator_loses_no_write_and_no_packet() {
    hold(scenario::restart::run);
}

#[test]
fn agents_start_from_disk_without_a_coordinator() {
    hold(scenario::agent::run);
}

#[test]
fn a_killed_agent_lets_nothing_through_and_is_back_at_once() {
    hold(scenario::agent::killed);
}

#[test]
fn agents_are_not_root() {
    hold(|mesh, check| scenario::agent::rights(mesh, check));
}

#[test]
fn a_damaged_database_is_refused() {
    hold(scenario::damage::database);
}

#[test]
fn a_flipped_bit_never_becomes_truth() {
    hold(scenario::damage::every_row);
}

#[test]
fn damaged_agent_state_never_makes_a_new_node() {
    hold(scenario::damage::agent_state);
}

#[test]
fn a_full_disk_degrades_and_heals() {
    hold(scenario::damage::full_disk);
}

#[test]
fn garbage_on_every_socket_harms_nobody() {
    hold(scenario::garbage::run);
}
