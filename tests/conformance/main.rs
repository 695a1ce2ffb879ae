//! Conformance: one set of scenarios for every WireGuard backend, and the routing around it.
//!
//! `MESH_BACKEND=kernel` runs them against the kernel's WireGuard, which a virtual machine has;
//! without it they run against ours. Needs root: `cargo xtask test netns` sees to it.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by a panic")]

mod wg;
