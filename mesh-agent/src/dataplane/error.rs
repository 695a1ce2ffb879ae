//! Why no programs filter on a device.

use std::io;
use std::path::PathBuf;

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
        source: Box<aya::maps::MapError>,
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
        source: Box<aya::maps::MapError>,
    },
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
