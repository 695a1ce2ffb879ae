//! The two-command promise: everything built, a mesh of four nodes running.

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;

use crate::{build_ebpf, setup, shell};

#[derive(Debug, Parser)]
pub(crate) struct Options {
    /// Judge instead of waiting: one line per assertion, non-zero at the first that fails.
    #[arg(long)]
    check: bool,
    /// Write the figures seen, as an array of `{"name", "value", "unit"}`.
    #[arg(long, value_name = "FILE", requires = "check")]
    json: Option<PathBuf>,
}

impl Options {
    pub(crate) fn run(self) -> Result<()> {
        setup::prepare(setup::Purpose::Demo)?;
        build_ebpf::build()?;
        build_release()?;
        let mut demo = std::process::Command::new(shell::target_dir().join("release/mesh-demo"));
        if self.check {
            demo.arg("--check");
        }
        if let Some(file) = &self.json {
            demo.arg("--json").arg(std::path::absolute(file)?);
        }
        demo.current_dir(shell::root());
        shell::become_it(&mut demo)
    }
}

/// The binaries that laboratories and benchmarks run, in one build: of fewer packages cargo would unify features
/// differently, and compile their dependencies anew.
pub(crate) fn build_release() -> Result<()> {
    shell::step("build the release binaries", || {
        shell::run(shell::cargo().args([
            "build",
            "--locked",
            "--release",
            "--package",
            "mesh-agent",
            "--package",
            "coordinator",
            "--package",
            "mesh-tests",
            "--bins",
        ]))
    })
}
