//! Ring 2: the real programs in the kernel, run on packets without a network.
//!
//! ```text
//!   netmap ── Tables::of ── Dataplane::apply ──► maps        ┌─ BPF_PROG_TEST_RUN ─┐
//!   packet ──────────────────────── bytes ──────────────────►│ mesh_in, mesh_eg    │──► pass or drop
//!      └────────────── Oracle::judge ────────────────────────┴─────────────────────┴──► the same
//! ```
//! Each test has a network namespace and a BPF file system of its own.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, its helpers with it, and prints what it measured"
)]

mod budgets;
mod cpus;
mod detour;
mod events;
mod figures;
mod flood;
mod flows;
mod guard;
mod half_open;
mod headers;
mod icmp;
mod judged_anew;
mod kernel;
mod life;
mod model;
mod mss;
mod nonlinear;
mod oracle;
mod packet;
mod place;
mod policy;
mod random;
mod rows;
mod scene;
mod scratch;
mod short_way;
mod tables;
mod told;
