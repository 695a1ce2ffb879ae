//! A netmap: everything one node must know, at one generation, and nothing more.
//!
//! A map is a handful of keyed collections, so the change between two maps is the same handful of
//! upserts and removals ([`delta`]), and the digest of a map is the digest of its items. Neither
//! side has to keep the other's history: who holds a map can prove which by its digest.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::key::NodePublic;
use crate::node::{Addresses, Epoch, Generation, Name, NodeId, Tag, UnixTime, UserName};
use crate::world::Mesh;
use crate::{Direction, Identity, RuleId};

pub mod build;
pub mod delta;
pub mod digest;

pub use delta::{NetmapDelta, StaleGeneration};
pub use digest::Digest;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Netmap {
    pub mesh: Mesh,
    pub epoch: Epoch,
    pub generation: Generation,
    pub me: Me,
    pub peers: BTreeMap<NodeId, Peer>,
    pub policy: NodePolicy,
}

/// The node that the map is for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Me {
    pub id: NodeId,
    pub name: Name,
    pub key: NodePublic,
    pub addresses: Addresses,
    pub tags: BTreeSet<Tag>,
    pub user: Option<UserName>,
    pub expires: Option<UnixTime>,
    /// The node key has expired: the map holds no peers, and `mesh up` must run again.
    pub expired: bool,
}

/// Another node, as seen from the map's own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Peer {
    pub id: NodeId,
    pub name: Name,
    pub key: NodePublic,
    pub addresses: Addresses,
    pub endpoints: BTreeSet<SocketAddr>,
    /// Subnet routes through this peer: with its addresses, exactly WireGuard's allowed IPs.
    pub routes: BTreeSet<IpNet>,
    pub tags: BTreeSet<Tag>,
    pub user: Option<UserName>,
}

impl Peer {
    /// What this peer may send from and be sent to.
    pub fn allowed_ips(&self) -> impl Iterator<Item = IpNet> {
        self.addresses
            .prefixes()
            .into_iter()
            .chain(self.routes.iter().copied())
    }
}

/// The compiled policy, cut down to the flows that this node is an end of.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NodePolicy {
    /// Who stands behind an address: longest prefix wins. Holds peers, their routes, and this node.
    pub identities: BTreeMap<IpNet, Identity>,
    pub entries: BTreeMap<EntryKey, Entry>,
    /// Every rule that an entry names.
    pub rules: BTreeMap<RuleId, Rule>,
}

/// Which new flows an entry is about.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct EntryKey {
    /// [`Identity::ANY`] stands for every known one.
    pub remote: Identity,
    pub local: Identity,
    pub direction: Direction,
    /// IP protocol number; `None` is every protocol, then `ports` is [`PortRange::ALL`].
    pub proto: Option<u8>,
    pub ports: PortRange,
}

/// First and last port, both included. For ICMP the port is the message type.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PortRange {
    pub first: u16,
    pub last: u16,
}

impl PortRange {
    pub const ALL: Self = Self {
        first: 0,
        last: u16::MAX,
    };

    pub fn contains(&self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    pub action: Action,
    /// The first rule in the text that decides this.
    pub rule: RuleId,
}

/// What a rule says of a flow that it matches. A deny beats every accept.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Action {
    Accept,
    Deny,
}

/// Where a rule stands in the policy text, for people.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Rule {
    /// The policy file's name, as the operator gave it.
    pub file: Arc<str>,
    /// Line of the policy file, from 1.
    pub line: u32,
    /// One line of text: `accept tag:operator -> tag:node:22`.
    pub summary: String,
}

impl Rule {
    /// As an editor opens it: `policy.hujson:12`.
    pub fn place(&self) -> String {
        format!("{}:{}", self.file, self.line)
    }
}
