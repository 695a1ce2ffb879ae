//! The mesh without wires: everything that is decided, and nothing that is done.
//!
//! No function here reads a clock, draws randomness or touches a file; time, seeds and text come
//! in as parameters, decisions go out as values. That is what lets a test run a whole mesh in one
//! thread and compare results byte for byte.
//!
//! Reading order: [`key`] and [`node`] name things, [`world`] holds the coordinator's truth,
//! [`policy`] turns text into who-may-reach-whom, [`netmap`] is one node's part of both. On the node,
//! [`control`] keeps the netmap current, [`desired`] says what the kernel should hold, [`flow`] what
//! became of packets there, and [`agent`] composes the machines into the one that the agent's event loop
//! drives.
#![forbid(unsafe_code)]

pub mod agent;
pub mod backoff;
mod changes;
pub mod control;
pub mod dataplane;
pub mod desired;
pub mod dns;
pub mod flow;
pub mod health;
pub mod ipam;
pub mod key;
pub mod netmap;
pub mod node;
pub mod policy;
pub mod routes;
pub mod wireguard;
pub mod world;

pub use mesh_common::{Direction, Identity, RuleId};
