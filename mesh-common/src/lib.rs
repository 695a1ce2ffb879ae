//! What the mesh shares with the kernel: map keys and values, drop reasons, the one verdict function.
//!
//! Everything here is read by programs that a verifier checked against one layout, so the layout is
//! the hard part: every type is `repr(C)` without padding, addresses and ports are big-endian byte
//! arrays (an LPM trie compares bits in memory order), and numbers are only ever appended.
#![no_std]

pub mod identity;
pub mod policy;

pub use identity::Identity;
pub use policy::{Direction, RuleId};
