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
    /// Without `dataplane`, and of `ebpf` all on the first kernel and `figures` on the others.
    #[arg(long, conflicts_with = "suites")]
    brief: bool,
    /// Understood because every test program is told it; inside, each suite has its own number.
    #[arg(long, hide = true)]
    test_threads: Option<usize>,
    /// Only tests whose name contains this.
    filter: Option<String>,
}

impl Options {
    /// What runs on a kernel. Briefly, the packet filter is tried whole on the first alone, of two the older: the other
    /// has the hooks of the host's kernel, on which another ring tries it.
    fn suites(&self, first: bool) -> Vec<Suite> {
        if !self.suites.is_empty() {
            return self.suites.clone();
        }
        let mut suites = Suite::value_variants().to_vec();
        suites.retain(|suite| match suite {
            Suite::Kernel | Suite::Conformance | Suite::Demo => true,
            Suite::Ebpf => first || !self.brief,
            Suite::Figures => !first && self.brief,
            Suite::Dataplane => !self.brief,
        });
        suites
    }
}

/// One kernel, and what runs on it while others run, and after them.
struct Machine<'a> {
    series: &'a str,
    kernel: Kernel,
    together: Guest,
    alone: Guest,
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    let target = target()?;
    let cache = target.join("vm");
    let build = |suites: &[Suite]| suites::build(suites, options.filter.as_deref(), &target);
    let machines = options.kernels.iter().enumerate().map(|(number, series)| {
        let suites = options.suites(number == 0).into_iter();
        let (alone, together): (Vec<_>, Vec<_>) =
            suites.partition(|suite| suite.goes_by_the_clock());
        Ok(Machine {
            series,
            kernel: Kernel::newest(series, &cache)?,
            together: build(&together)?,
            alone: build(&alone)?,
        })
    });
    let machines = machines.collect::<Result<Vec<_>>>()?;

    // All at once: most of their time they wait for timers of their own.
    let mut results = thread::scope(|scope| {
        let running: Vec<_> = machines
            .iter()
            .filter(|machine| !machine.together.steps.is_empty())
            .map(|machine| scope.spawn(|| run(machine, &machine.together, &cache)))
            .collect();
        let ended = running.into_iter().map(|machine| {
            machine
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        ended.collect::<Vec<_>>()
    });
    for machine in machines
        .iter()
        .filter(|machine| !machine.alone.steps.is_empty())
    {
        results.push(run(machine, &machine.alone, &cache));
    }
    ensure!(!results.is_empty(), "the filter leaves nothing to run");
    let mut passed = true;
    for result in results {
        match result {
            Ok((closing, success)) => {
                passed &= success;
                for line in closing {
                    println!("{line}");
                }
            }
            Err(error) => {
                passed = false;
                println!("vm: {error:#}");
            }
        }
    }
    Ok(if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// One kernel from boot to end: what to say of it, and whether all passed.
fn run(machine: &Machine<'_>, guest: &Guest, cache: &Path) -> Result<(Vec<String>, bool)> {
    let Machine { series, kernel, .. } = machine;
    let start = Instant::now();
    let mut report = Report::default();
    let booted = guest.boot(kernel, cache, &mut |line| {
        println!("{series} | {line}");
        report.read(line);
    });
    let success = booted.with_context(|| format!("the machine of {series}"))?;
    let seconds = start.elapsed().as_secs();
    Ok((report.closing(&kernel.release, success, seconds), success))
}

/// Cargo's target folder; this program lies in its `debug/deps`.
fn target() -> Result<PathBuf> {
    let program = env::current_exe().context("find this program")?;
    let target = program.ancestors().nth(3);
    Ok(target.context("find the target folder")?.to_owned())
}
