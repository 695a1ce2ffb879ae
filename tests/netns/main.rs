//! Ring 3: real programs in network namespaces.
//!
//! Each scenario opens with its topology and is a laboratory of its own. Needs root and the
//! release binaries: `cargo xtask test netns [FILTER]` sees to both.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test says what is wrong by a panic, and what it measured on its output"
)]

mod dataplane;
mod deploy;
mod dns;
mod in_process;
mod laboratory;
mod mesh;
