//! The coordinator over real sockets on loopback, with agents made of mesh-api alone.
//!
//! ```text
//! agent ── TLS, raw public keys ──► coordinator (in this process, or a process of its own)
//! admin ── unix socket ───────────►      │
//!                                     state directory
//! ```
#![expect(clippy::unwrap_used, reason = "tests panic freely")]

mod admin;
mod damage;
mod enrolment;
mod garbage;
mod people;
mod restart;
mod scale;
mod session;
pub mod support;
