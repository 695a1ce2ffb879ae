//! Ring 4: other rings on Debian's kernels, in virtual machines without KVM or network.
//!
//! The host's kernel need not have WireGuard, and is one of the many that agents meet.

#![expect(clippy::print_stdout, reason = "passes on what runs inside")]

mod report;
mod suites;

use std::{
    env,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, ValueEnum as _};
use mesh_tests::vm::{Guest, Kernel};
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
    /// What to run, as often as wanted; otherwise everything.
    #[arg(long = "suite", value_enum)]
    suites: Vec<Suite>,
    /// Everything but the longest suite, which another ring runs on the host's kernel.
    #[arg(long, conflicts_with = "suites")]
    brief: bool,
    /// Understood because every test program is told it; inside, tests run one by one anyway.
    #[arg(long, hide = true)]
    test_threads: Option<usize>,
    /// Only tests whose name contains this.
    filter: Option<String>,
}

fn main() -> Result<ExitCode> {
    let mut options = Options::parse();
    if options.suites.is_empty() {
        options.suites = Suite::value_variants().to_vec();
        options
            .suites
            .retain(|suite| !options.brief || *suite != Suite::Dataplane);
    }
    let target = target()?;
    let cache = target.join("vm");
    let (alone, together): (Vec<_>, Vec<_>) = options
        .suites
        .iter()
        .copied()
        .partition(|suite| suite.goes_by_the_clock());
    let build = |suites: &[Suite]| suites::build(suites, options.filter.as_deref(), &target);
    let (alone, together) = (build(&alone)?, build(&together)?);

    let machines = options
        .kernels
        .iter()
        .map(|series| Ok((series, Kernel::newest(series, &cache)?)))
        .collect::<Result<Vec<_>>>()?;
    // All at once: most of their time they wait for timers of their own.
    let mut results = thread::scope(|scope| {
        let running: Vec<_> = machines
            .iter()
            .filter(|_| !together.steps.is_empty())
            .map(|(series, kernel)| scope.spawn(|| run(series, kernel, &together, &cache)))
            .collect();
        let ended = running.into_iter().map(|machine| {
            machine
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        ended.collect::<Result<Vec<_>>>()
    })?;
    for (series, kernel) in machines.iter().filter(|_| !alone.steps.is_empty()) {
        results.push(run(series, kernel, &alone, &cache)?);
    }
    ensure!(!results.is_empty(), "the filter leaves nothing to run");
    for line in results.iter().flat_map(|(closing, _)| closing) {
        println!("{line}");
    }
    Ok(if results.iter().all(|(_, success)| *success) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// One kernel from boot to end: what to say of it, and whether all passed.
fn run(series: &str, kernel: &Kernel, guest: &Guest, cache: &Path) -> Result<(Vec<String>, bool)> {
    let start = Instant::now();
    let mut report = Report::default();
    let success = guest.boot(kernel, cache, &mut |line| {
        println!("{series} | {line}");
        report.read(line);
    })?;
    let seconds = start.elapsed().as_secs();
    Ok((report.closing(&kernel.release, success, seconds), success))
}

/// Cargo's target folder; this program lies in its `debug/deps`.
fn target() -> Result<PathBuf> {
    let program = env::current_exe().context("find this program")?;
    let target = program.ancestors().nth(3);
    Ok(target.context("find the target folder")?.to_owned())
}
