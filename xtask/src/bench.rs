//! Measurements that take a quiet machine, and so are no tests.

use anyhow::Result;
use clap::Parser;

use crate::{build_ebpf, demo, setup, shell};

/// What takes nothing but a compiler, and no root.
const UNPREPARED: [&str; 1] = ["policy"];

#[derive(Debug, Parser)]
pub(crate) struct Options {
    /// What to measure and how: passed on; `cargo xtask bench -- --help` shows what there is.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

impl Options {
    pub(crate) fn run(self) -> Result<()> {
        let verb = self.arguments.first().map_or("", String::as_str);
        let mut bench = std::process::Command::new(shell::target_dir().join("release/mesh-bench"));
        bench.args(&self.arguments);
        if !UNPREPARED.contains(&verb) {
            setup::prepare(setup::Purpose::Test)?;
            build_ebpf::build()?;
        }
        if verb == "dataplane" {
            bench.env("MESH_BENCH_OBJECT", build_ebpf::build_bench()?);
        }
        demo::build_release()?;
        shell::become_it(&mut bench)
    }
}
