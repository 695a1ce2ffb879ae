//! The packet filter through an agent's life: killed, upgraded, robbed of its device, its programs
//! and its file system.
//!
//! ```text
//!   operator ── UDP 9000, allowed ──► node        counted where it arrives
//!   sandbox ─── UDP 9000, denied ───►             the sandbox's own programs are disarmed
//! ```
//! Everything holds with either backend: `MESH_BACKEND=kernel` takes the kernel's WireGuard, whose
//! device goes on without an agent, and then not one allowed packet may be lost over a restart.

mod connection;
mod detour;
mod edit;
mod field;
mod foreign;
mod forward;
mod guard;
mod life;
mod revoke;
mod see;
mod tags;
mod wire;
