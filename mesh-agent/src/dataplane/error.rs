//! Why no programs filter on a device, or not by the policy that they are given.

use std::io;
use std::path::PathBuf;

use aya::maps::MapError;
use mesh_common::maps::Shape;

/// Why no programs filter on the device. In every case the device must stay down, or packets be
/// filtered in process.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("this build carries no BPF object: run `cargo xtask build-ebpf` before building")]
    NoObject,
    #[error("read the BPF object {path}")]
    Object {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("make the folder {path} for maps and programs")]
    PinDir {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} is not on a BPF file system: mount one (mount -t bpf bpf /sys/fs/bpf)")]
    NoBpffs { path: PathBuf },
    #[error(
        "the pinned map {map} has {found}, this agent needs {wanted}: another layout under the same number"
    )]
    Layout {
        map: &'static str,
        found: Shape,
        wanted: Shape,
    },
    #[error("look at the pinned map {map}")]
    Pinned {
        map: &'static str,
        #[source]
        source: Box<MapError>,
    },
    #[error("load the BPF object")]
    Load(#[source] Box<aya::EbpfError>),
    #[error("the BPF object has no {0}")]
    Incomplete(&'static str),
    #[error("load the program {program}")]
    Program {
        program: &'static str,
        #[source]
        source: Box<aya::programs::ProgramError>,
    },
    #[error("attach {program} to {interface}")]
    Attach {
        program: &'static str,
        interface: String,
        #[source]
        source: anyhow::Error,
    },
    #[error("open the map {map}")]
    Map {
        map: &'static str,
        #[source]
        source: Box<MapError>,
    },
}

/// Why a policy is not in use, or not by every program.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    #[error("{count} {what}, and the kernel's table holds {capacity}: the old policy stands")]
    Full {
        what: &'static str,
        count: usize,
        capacity: u32,
    },
    #[error("{step}")]
    Kernel {
        step: &'static str,
        #[source]
        source: Box<MapError>,
    },
    /// The policy is loaded, and programs of another layout still filter under the one before.
    #[error("take over from another layout's programs")]
    TakeOver(#[source] anyhow::Error),
    #[error(transparent)]
    Load(AttachError),
    #[error("count the CPUs")]
    Cpus(#[source] io::Error),
}

impl ApplyError {
    pub(super) fn at(step: &'static str) -> impl FnOnce(MapError) -> Self {
        move |source| Self::Kernel {
            step,
            source: Box::new(source),
        }
    }
}

pub(super) fn failed(
    program: &'static str,
    interface: &str,
) -> impl FnOnce(anyhow::Error) -> AttachError {
    let interface = interface.to_owned();
    move |source| AttachError::Attach {
        program,
        interface,
        source,
    }
}
