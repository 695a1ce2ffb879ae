//! Ring 1: a whole mesh in one thread, without root and without time.
//!
//! ```text
//!   coordinator (World, policy, signatures) ══ channels ══ N × agent::State
//!                        ▲ the same netmap::build, policy::compile, Verifier as in the product
//! ```
//! The clock is a number that the test moves, and the network is a queue that may lose, repeat and
//! reorder what TCP never would. What is checked against is a model of a few lines that knows tags
//! and pairs of tags, and nothing of netmaps.
#![expect(clippy::unwrap_used, reason = "a test says what is wrong by a panic")]

mod agent;
mod coordinator;
mod mesh;
mod model;
mod random;
