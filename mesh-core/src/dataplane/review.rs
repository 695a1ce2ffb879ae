//! Which of many flows may stand on. There may be a million, each that ends is to be told of within a
//! second, and most share their ends and the port that is asked for with others.

use std::collections::HashMap;

use mesh_common::flow::FlowKey;
use mesh_common::verdict::{policy_port, precedence};
use mesh_common::{Address, Direction, Identity, IdentityEntry, PolicyKey};

use super::Tables;

/// What was asked of the tables is remembered; as large as the number of different flows at most.
#[derive(Debug)]
pub struct Review<'a> {
    tables: &'a Tables,
    identities: HashMap<Address, IdentityEntry>,
    allowed: HashMap<PolicyKey, bool>,
}

impl<'a> Review<'a> {
    pub fn new(tables: &'a Tables) -> Self {
        Self {
            tables,
            identities: HashMap::new(),
            allowed: HashMap::new(),
        }
    }

    /// Whether a flow that was opened in this direction may stand on: what the packet path asks before
    /// the flow's next packet passes.
    pub fn allows(&mut self, key: &FlowKey, opened: Direction) -> bool {
        let remote = self.identity(key.remote);
        let local = self.identity(key.local);
        if !remote.is_known() || remote.is_local() || !local.is_known() {
            return false;
        }
        let port = policy_port(key, opened);
        let asked = PolicyKey::new(remote.identity, local.identity, opened, key.proto, port);
        let tables = self.tables;
        *self.allowed.entry(asked).or_insert_with(|| {
            let ask = |remote| {
                let key = PolicyKey::new(remote, local.identity, opened, key.proto, port);
                tables.row(&key)
            };
            precedence(ask(remote.identity), ask(Identity::ANY))
                .0
                .is_none()
        })
    }

    fn identity(&mut self, address: Address) -> IdentityEntry {
        let tables = self.tables;
        let known = self.identities.entry(address);
        *known.or_insert_with(|| tables.identity(address.into()))
    }
}
