//! What the mesh shares with the kernel: map keys and values, drop reasons, the one verdict function.
//!
//! Everything here is read by programs that a verifier checked against one layout, so the layout is
//! the hard part: every map type is `repr(C)` without padding, addresses and ports lie in memory in
//! network order (an LPM trie compares bits in memory order), and numbers are only ever appended.
//!
//! Reading order: [`addr`], [`identity`] and [`policy`] are what user space writes, [`packet`] turns
//! bytes into [`Facts`], [`flow`] and [`tcp`] say what a flow remembers, [`half_open`] and [`place`]
//! where it lies until it is confirmed, [`budget`] how many a peer may have, and [`verdict`] decides, for
//! a [`reason`]. [`event`] is what user space is told.
#![no_std]

pub mod addr;
pub mod budget;
pub mod event;
pub mod flow;
pub mod half_open;
pub mod identity;
pub mod maps;
pub mod packet;
pub mod place;
#[cfg(feature = "user")]
mod pod;
pub mod policy;
pub mod proto;
pub mod reason;
pub mod tcp;
pub mod verdict;

pub use addr::{Address, Be16, Be32};
pub use identity::{Identity, IdentityEntry, SIDES, Sides, next_generation, side};
pub use packet::Facts;
pub use policy::{Direction, PolicyEntry, PolicyKey, RuleId};
pub use reason::DropReason;
pub use verdict::{Effect, Verdict, decide};
