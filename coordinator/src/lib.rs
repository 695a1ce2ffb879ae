//! The control plane of the mesh: who is a node, and who may talk to whom.
//!
//! ```text
//! nodes ── listener ── api::control ──┐                      ┌── store (one transaction)
//! operators ────────── api::admin ────┼─► registry ─► world ─┤
//! time ─────────────── janitor ───────┘                      └── watch ─► netmap_stream, per node
//! ```
//! One writer decides every change, makes it durable, and publishes the new world whole. Whoever
//! serves a node works from a published world and a compiled policy, never from the database, so a
//! database that fails can delay a change but cannot take anything away.
#![forbid(unsafe_code)]

pub mod api;
pub mod app;
pub mod cli;
pub mod clock;
pub mod config;
pub mod janitor;
pub mod listener;
pub mod metrics;
pub mod netmap_stream;
pub mod preauth;
pub mod registry;
pub mod sessions;
pub mod state_dir;
pub mod store;
pub mod world;
