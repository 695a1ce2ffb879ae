//! Ring 4: other rings on Debian's kernels, in virtual machines without KVM or network.
//!
//! The host's kernel need not have WireGuard, and is one of the many that agents meet.

#![expect(clippy::print_stdout, reason = "passes on what runs inside")]

mod report;
mod suites;

use std::{env, path::PathBuf, process::ExitCode, time::Instant};

use anyhow::{Context as _, Result};
use clap::Parser;
use mesh_tests::vm::Kernel;
use report::Report;
use suites::Suite;

/// Runs test rings on other kernels, in emulated machines.
#[derive(Debug, Parser)]
struct Options {
    /// Series of kernels to run on.
    #[arg(
        long = "kernel",
        env = "MESH_VM_KERNELS",
        value_delimiter = ',',
        default_value = "6.1,6.12"
    )]
    kernels: Vec<String>,
    /// What to run, as often as wanted; otherwise what was seen whole on every kernel.
    #[arg(long = "suite", value_enum)]
    suites: Vec<Suite>,
    /// Understood because every test program is told it; inside, tests run one by one anyway.
    #[arg(long, hide = true)]
    test_threads: Option<usize>,
    /// Only tests whose name contains this.
    filter: Option<String>,
}

fn main() -> Result<ExitCode> {
    let mut options = Options::parse();
    if options.suites.is_empty() {
        options.suites = Suite::usual();
    }
    let target = target()?;
    let cache = target.join("vm");
    let guest = suites::build(&options.suites, options.filter.as_deref(), &target)?;

    let mut closing = Vec::new();
    let mut passed = true;
    for series in &options.kernels {
        let start = Instant::now();
        let kernel = Kernel::newest(series, &cache)?;
        let mut report = Report::default();
        let success = guest.boot(&kernel, &cache, &mut |line| {
            println!("{series} | {line}");
            report.read(line);
        })?;
        passed &= success;
        let seconds = start.elapsed().as_secs();
        closing.extend(report.closing(&kernel.release, success, seconds));
    }
    for line in closing {
        println!("{line}");
    }
    Ok(if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Cargo's target folder; this program lies in its `debug/deps`.
fn target() -> Result<PathBuf> {
    let program = env::current_exe().context("find this program")?;
    let target = program.ancestors().nth(3);
    Ok(target.context("find the target folder")?.to_owned())
}
