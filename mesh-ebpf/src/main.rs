//! The packet path in the kernel: its parts, and nothing else.
//!
//! Another object, `bench.rs`, has the same parts and what only the benchmark runs.
#![no_std]
#![no_main]
#![feature(core_intrinsics, stmt_expr_attributes)]
#![expect(
    internal_features,
    reason = "atomic addition: core has no AtomicU64 for a target without compare-and-swap"
)]

mod detour;
mod entry;
mod established;
mod events;
mod filter;
mod guard;
mod half_open;
mod maps;
mod meta;
mod mss;
mod peers;
mod policy;
mod scratch;
mod skb;
mod stats;
mod tables;
mod tc;
