//! The words of the conditions that the state itself raises, each with its next step.

use super::Actuator;
use crate::health::{Condition, Severity};

fn condition(severity: Severity, text: impl Into<String>, next_step: &'static str) -> Condition {
    Condition {
        severity,
        text: text.into(),
        next_step,
    }
}

pub(super) fn unreachable(reason: &str) -> Condition {
    condition(
        Severity::Warning,
        format!("the coordinator cannot be reached: {reason}"),
        "traffic goes on under the last policy; check that the coordinator runs and that its port is open",
    )
}

pub(super) fn stale() -> Condition {
    condition(
        Severity::Warning,
        "the policy in force is more than an hour old",
        "bring the coordinator back; policy edits do not reach this node until then",
    )
}

pub(super) fn expired() -> Condition {
    condition(
        Severity::Error,
        "the node key has expired: no peer talks to this node",
        "run `mesh up --auth-key KEY` with a fresh pre-auth key",
    )
}

pub(super) fn deleted(reason: &str) -> Condition {
    condition(
        Severity::Error,
        format!("this node left the mesh: {reason}"),
        "run `mesh up --auth-key KEY` with a fresh pre-auth key to enroll it again",
    )
}

pub(super) fn replaced(reason: &str) -> Condition {
    condition(
        Severity::Error,
        format!("another machine uses this node's keys: {reason}"),
        "if this machine was cloned, run `mesh down --logout` on the copy and enroll it as a node of its own",
    )
}

pub(super) fn refused(count: u64) -> Condition {
    condition(
        Severity::Warning,
        format!("{count} updates of the coordinator were refused since the agent's start"),
        "see the agent's log for the reason; after a restore from backup the coordinator starts a new epoch",
    )
}

pub(super) fn not_applied(
    actuator: Actuator,
    error: Option<&str>,
) -> (&'static str, Option<Condition>) {
    let (name, severity, next_step) = match actuator {
        Actuator::WireGuard => (
            "PeersNotApplied",
            Severity::Error,
            "the agent keeps trying; check that it has CAP_NET_ADMIN and that no other program owns the interface",
        ),
        Actuator::Routes => (
            "RoutesNotApplied",
            Severity::Error,
            "the agent keeps trying; check that it has CAP_NET_ADMIN and that no other program owns the addresses",
        ),
        Actuator::Dataplane => (
            "PolicyNotEnforced",
            Severity::Error,
            "the policy before stays in force; the agent keeps trying, its log has the reason",
        ),
        Actuator::Dns => (
            "DnsNotConfigured",
            Severity::Warning,
            "names of peers do not resolve; addresses work. See the agent's log for the reason",
        ),
    };
    let condition = error.map(|error| condition(severity, error, next_step));
    (name, condition)
}
