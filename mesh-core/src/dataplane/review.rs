//! Which of many flows have come to an end. There may be a million, each that ends is to be told of within a
//! second, and most share their ends and the port that is asked for with others.

use std::collections::HashMap;

use mesh_common::flow::{FlowKey, FlowState, flags};
use mesh_common::verdict::{outcome, policy_port, prevailing};
use mesh_common::{Address, DropReason, Identity, IdentityEntry, PolicyKey, RuleId};

use super::Tables;

/// What was asked of the tables is remembered; as much as there are different flows at most.
#[derive(Debug)]
pub struct Review<'a> {
    tables: &'a Tables,
    generation: u32,
    identities: HashMap<Address, IdentityEntry>,
    answers: HashMap<PolicyKey, (Option<DropReason>, RuleId)>,
}

impl<'a> Review<'a> {
    /// By the tables in force, which have this generation.
    pub fn new(tables: &'a Tables, generation: u32) -> Self {
        Self {
            tables,
            generation,
            identities: HashMap::new(),
            answers: HashMap::new(),
        }
    }

    /// What the flow's next packet would leave, if it is the first to be denied. A flow that may stand on or
    /// was judged already has none.
    pub fn tombstone(&mut self, key: &FlowKey, state: &FlowState) -> Option<FlowState> {
        if state.generation == self.generation || state.flags & flags::DENIED != 0 {
            return None;
        }
        let remote = self.identity(key.remote);
        let local = self.identity(key.local);
        let mut next = FlowState {
            generation: self.generation,
            flags: state.flags | flags::DENIED,
            rule: RuleId::NONE,
            ..*state
        };
        if !remote.is_known() || remote.is_local() || !local.is_known() {
            return Some(next);
        }
        let opened = state.opened();
        let port = policy_port(key, opened);
        let about = |remote| PolicyKey::new(remote, local.identity, opened, key.proto, port);
        let (drop, rule) = self.answer(about(remote.identity), about(Identity::ANY));
        drop?;
        next.rule = rule;
        next.remote = remote.identity;
        next.local = local.identity;
        next.peer = remote.peer;
        Some(next)
    }

    fn identity(&mut self, address: Address) -> IdentityEntry {
        let tables = self.tables;
        let known = self.identities.entry(address);
        *known.or_insert_with(|| tables.identity(address.into()))
    }

    fn answer(&mut self, exact: PolicyKey, any: PolicyKey) -> (Option<DropReason>, RuleId) {
        let tables = self.tables;
        let known = self.answers.entry(exact);
        *known.or_insert_with(|| outcome(prevailing(tables.row(&exact), tables.row(&any))))
    }
}
