//! The words of a control session: what the shell says to the machine, and what it gets to do.
//!
//! None of them is a message of the wire: a node's private keys and the auth key are here, and neither is ever
//! written to a log.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use super::{Chain, Refused};
use crate::key::{MachineKey, NodeKey, NodeProof, NodePublic};
use crate::netmap::Netmap;
use crate::node::{Epoch, Generation, MeshId, NodeId, UnixTime};

/// The two private keys of a node.
#[derive(Clone, Debug)]
pub struct Keys {
    pub machine: MachineKey,
    pub node: NodeKey,
}

/// Which mesh, and which of its nodes, this machine is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Membership {
    pub mesh: MeshId,
    pub node: NodeId,
}

/// How to become a node.
#[derive(Clone, PartialEq, Eq)]
pub struct Enroll {
    pub auth_key: String,
    /// Wanted name; empty: the host's.
    pub name: String,
}

impl std::fmt::Debug for Enroll {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Enroll")
            .field("auth_key", &"redacted")
            .field("name", &self.name)
            .finish()
    }
}

/// The underlay as this node sees it, and what it offers to route.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    pub endpoints: BTreeSet<SocketAddr>,
    pub advertised_routes: BTreeSet<IpNet>,
}

/// How far this node has come in enforcing what it was told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Applied {
    pub epoch: Epoch,
    pub generation: Generation,
    /// `None`: enforced.
    pub error: Option<String>,
}

/// The coordinator's greeting, and what the channel itself says.
#[derive(Clone, Copy, Debug)]
pub struct Hello {
    pub challenge: NodePublic,
    pub exporter: [u8; 32],
    pub now: UnixTime,
    /// The node that this machine key belongs to, if any.
    pub node: Option<NodeId>,
}

/// The channel failed, or a step on it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Failure {
    /// Nobody there, cut off, timed out: try again.
    Unreachable(String),
    /// Answered, and the answer is no. Trying again the same way will not help.
    Denied(String),
}

impl Failure {
    pub fn text(&self) -> &str {
        match self {
            Self::Unreachable(text) | Self::Denied(text) => text,
        }
    }
}

/// Why the coordinator ended a session.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Notice {
    Deleted(String),
    Replaced(String),
    Shutdown { retry_after: Duration },
}

/// What the shell is to do on the channel.
#[derive(Clone, Debug)]
pub enum Transmit {
    /// Open a channel and say hello.
    Connect,
    Enroll {
        enroll: Enroll,
        proof: NodeProof,
    },
    /// Open the session's stream; `held` is what the coordinator need not send.
    Begin {
        proof: NodeProof,
        held: Option<Arc<Netmap>>,
    },
    Report(Report),
    Applied(Applied),
    Logout,
    /// Close the channel. Nothing more is expected from it.
    Close,
}

/// What became known.
#[derive(Clone, Debug)]
pub enum Event {
    /// The coordinator's clock, as of now.
    Clock(UnixTime),
    /// The session's stream is open.
    Connected,
    /// No session; the reason is for people.
    Disconnected(Failure),
    Enrolled(Membership),
    /// A netmap newer than all before it.
    Netmap(Chain),
    /// An update was not taken.
    Refused(Refused),
    /// The coordinator says that there is no such node any more.
    Deleted(String),
    /// Another session with the same machine key took over.
    Replaced(String),
}
