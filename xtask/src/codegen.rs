//! What is generated and committed: the protocol's Rust, and the list of its numbers.

use anyhow::Result;
use clap::Parser;

use crate::{shell, tidy};

#[derive(Debug, Parser)]
pub(crate) struct Options {}

impl Options {
    pub(crate) fn run(self) -> Result<()> {
        shell::run(shell::cargo().env("UPDATE", "1").args([
            "test",
            "--package",
            "mesh-api",
            "--test",
            "codegen",
        ]))?;
        tidy::protocol::extend_lock(shell::root())
    }
}
