//! Who talks to whom, and what the policy says of it.

use super::Lookup;
use crate::flow::{FlowKey, FlowState};
use crate::policy::{Direction, PolicyEntry, PolicyKey, RuleId};
use crate::{DropReason, Identity, proto};

/// Deny beats accept, whichever is wider; of two that say the same, the one for this very remote
/// speaks.
#[inline(always)]
pub const fn prevailing(exact: PolicyEntry, any: PolicyEntry) -> PolicyEntry {
    if exact.is_deny() || !any.is_deny() && exact.is_accept() {
        exact
    } else {
        any
    }
}

/// What the entry that prevails says. Without any the default denies.
#[inline(always)]
pub const fn outcome(entry: PolicyEntry) -> (Option<DropReason>, RuleId) {
    if entry.is_deny() {
        (Some(DropReason::DeniedByRule), entry.rule)
    } else if entry.is_accept() {
        (None, entry.rule)
    } else {
        (Some(DropReason::NoRule), RuleId::NONE)
    }
}

/// What the policy says of a flow, and of whom it spoke.
#[derive(Clone, Copy)]
pub(super) struct Judged {
    pub(super) drop: Option<DropReason>,
    pub(super) rule: RuleId,
    pub(super) remote: Identity,
    pub(super) local: Identity,
    pub(super) peer: u32,
}

impl Judged {
    pub(super) const NOBODY: Self = Self {
        drop: None,
        rule: RuleId::NONE,
        remote: Identity::UNKNOWN,
        local: Identity::UNKNOWN,
        peer: 0,
    };

    #[inline(always)]
    pub(super) const fn remembered(state: &FlowState) -> Self {
        Self {
            drop: None,
            rule: state.rule,
            remote: state.remote,
            local: state.local,
            peer: state.peer,
        }
    }
}

/// Who talks to whom. Whoever is unknown never meets [`Identity::ANY`].
#[inline(always)]
pub(super) fn ends(tables: &impl Lookup, key: &FlowKey) -> Judged {
    let remote = tables.identity(&key.remote);
    let mut judged = Judged {
        remote: remote.identity,
        peer: remote.peer,
        ..Judged::NOBODY
    };
    if !remote.is_known() {
        judged.drop = Some(DropReason::UnknownIdentity);
        return judged;
    }
    if remote.is_local() {
        judged.drop = Some(DropReason::OwnAddress);
        return judged;
    }
    let local = tables.local(&key.local);
    judged.local = local.identity;
    if !local.is_known() {
        judged.drop = Some(DropReason::UnknownLocal);
    }
    judged
}

/// May a flow between these ends be opened in this direction?
#[inline(always)]
pub(super) fn ask(
    tables: &impl Lookup,
    ends: &Judged,
    proto: u8,
    opened: Direction,
    port: u16,
) -> Judged {
    let mut judged = *ends;
    if judged.drop.is_none() {
        let key = PolicyKey::new(ends.remote, ends.local, opened, proto, port);
        (judged.drop, judged.rule) = outcome(tables.policy(&key));
    }
    judged
}

/// The port that policy sees when the flow is opened.
#[inline(always)]
pub fn policy_port(key: &FlowKey, opened: Direction) -> u16 {
    match key.proto {
        proto::ICMP => 8,
        proto::ICMPV6 => 128,
        _ => match opened {
            Direction::Ingress => key.local_port.get(),
            Direction::Egress => key.remote_port.get(),
        },
    }
}
