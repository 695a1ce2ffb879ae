//! The programs under measurement, loaded as the agent loads them, in a network of their own.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use aya::programs::SchedClassifier;
use aya::{TestRun, TestRunOptions};
use mesh_agent::dataplane::{Dataplane, Foreign, Options};
use rustix::thread::{CpuSet, UnshareFlags, sched_getaffinity, sched_setaffinity};

use crate::scratch::Bpffs;

/// Leaves the host's network for good, and stays on one CPU.
#[expect(
    deprecated,
    reason = "unsafe only where descriptor tables are unshared, which this is not"
)]
pub(super) fn alone() -> Result<()> {
    rustix::thread::unshare(UnshareFlags::NEWNET).context("a network namespace: run as root")?;
    let allowed = sched_getaffinity(None)?;
    let last = (0..CpuSet::MAX_CPU).rev().find(|cpu| allowed.is_set(*cpu));
    let mut one = CpuSet::new();
    one.set(last.context("a CPU to run on")?);
    Ok(sched_setaffinity(None, &one)?)
}

#[derive(Debug)]
pub(super) struct Bench {
    pub(super) dataplane: Dataplane,
    /// Mounted until the bench ends.
    _bpffs: Bpffs,
}

impl Bench {
    /// With room for so many flows, and our filter on `interface`.
    pub(super) fn load(interface: &str, foreign: Option<Foreign>) -> Result<Self> {
        let bpffs = Bpffs::mount()?;
        let object = std::env::var_os("MESH_BENCH_OBJECT")
            .context("the object: run as `cargo xtask bench dataplane`")?;
        let options = Options {
            pin_dir: bpffs.folder("bench"),
            object_path: Some(PathBuf::from(object)),
            flow_capacity: Some(262_144),
            foreign,
            ..Options::default()
        };
        let mut dataplane = Dataplane::attach(interface, &options)?;
        for name in ["empty", "parse", "vary", "varied_in"] {
            let program = dataplane.object().program_mut(name);
            let program: &mut SchedClassifier = program.context("the bench object")?.try_into()?;
            program.load()?;
        }
        Ok(Self {
            dataplane,
            _bpffs: bpffs,
        })
    }

    /// Nanoseconds per run, the kernel's own share included.
    pub(super) fn time(&self, program: &str, packet: &[u8], repeat: u32) -> Result<f64> {
        let program = self
            .dataplane
            .program(program)
            .context("a loaded program")?;
        let mut out = vec![0; 2_048];
        let run = program.test_run(TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            repeat,
            ..TestRunOptions::default()
        })?;
        Ok(run.duration.as_secs_f64() * 1e9)
    }

    /// What the program returns for the packet.
    pub(super) fn verdict(&self, program: &str, packet: &[u8]) -> Result<i32> {
        let program = self
            .dataplane
            .program(program)
            .context("a loaded program")?;
        let mut out = vec![0; 2_048];
        let run = program.test_run(TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ..TestRunOptions::default()
        })?;
        Ok(run.return_value.cast_signed())
    }
}
