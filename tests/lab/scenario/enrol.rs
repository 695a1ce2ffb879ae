//! A machine becomes a node and talks.

use std::time::Instant;

use anyhow::{Context, Result};

use crate::mesh::{Family, Key, Mesh, Node};
use crate::probe::{Kind, Probe};
use crate::{scaled, silence};

use super::{Check, reach};

/// From `mesh up` on a fresh machine to the first reply from a peer.
pub fn run(mesh: &mut Mesh, check: &mut Check) -> Result<()> {
    let visitor = Node::start(mesh.lab.host("visitor")?, mesh.backend)?;
    let key = mesh.coordinator.key(&Key::one_off().tag("developer"))?;
    let to = mesh.node("node").address(Family::V4)?;
    let begun = Instant::now();
    check.that(
        "a new machine enrolls with a pre-auth key and reaches a peer",
        || {
            visitor.up(mesh.coordinator.join(), &key)?;
            let probe = Probe {
                from: &visitor.host,
                to,
                kind: Kind::Icmp,
            };
            probe.ask(scaled(reach::LIMIT))?.context("no answer")
        },
    )?;
    check.seconds("enrol_to_first_reply", begun.elapsed());
    check.that("a deleted node is gone for its peers", || {
        mesh.coordinator.admin(&["node", "delete", "visitor"])?;
        mesh.settle()?;
        let probe = Probe {
            from: &visitor.host,
            to,
            kind: Kind::Icmp,
        };
        anyhow::ensure!(
            probe.ask(silence(reach::SILENCE))?.is_none(),
            "it is still answered"
        );
        Ok(())
    })
}
