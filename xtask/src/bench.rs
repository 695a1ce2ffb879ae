//! Measurements that take a quiet machine, and so are no tests.

use anyhow::Result;
use clap::Parser;

use crate::{setup, shell};

#[derive(Debug, Parser)]
pub(crate) struct Options {
    /// What to measure and how: passed on; `cargo xtask bench -- --help` shows what there is.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

impl Options {
    pub(crate) fn run(self) -> Result<()> {
        setup::prepare(setup::Purpose::Test)?;
        shell::run(shell::cargo().args([
            "build",
            "--release",
            "--package",
            "mesh-tests",
            "--bin",
            "mesh-bench",
        ]))?;
        shell::become_it(
            std::process::Command::new(shell::target_dir().join("release/mesh-bench"))
                .args(self.arguments),
        )
    }
}
