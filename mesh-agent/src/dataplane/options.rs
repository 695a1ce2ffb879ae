//! How to load the packet filter; what is not said follows from the host.

use std::path::PathBuf;

use mesh_common::maps;

use super::attach::Chain;
use super::probe;

/// How to load.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A folder of our own on a BPF file system. Maps and programs are pinned in it, by layout.
    pub pin_dir: PathBuf,
    /// Where to note the numbers of our guards, for the case that all of their pins are lost.
    pub numbers: Option<PathBuf>,
    /// Another object than the embedded one.
    pub object_path: Option<PathBuf>,
    /// Established flows that a new table holds; by the host's memory if not said.
    pub flow_capacity: Option<u32>,
    /// Sets of half-open flows in a new table, a power of two; [`SETS`](mesh_common::half_open::SETS) if not said.
    pub half_open_sets: Option<u32>,
    /// Write new flows and drops through aya-log to the `log` crate's logger.
    pub log: bool,
    /// For a device that is not the mesh's.
    pub foreign: Option<Foreign>,
    /// Hang programs as on kernels before 6.6, so that any kernel can test it.
    pub clsact: bool,
}

impl Options {
    pub(super) fn chain(&self) -> Chain {
        if probe::has_tcx() && !self.clsact {
            Chain::Tcx
        } else {
            Chain::Clsact
        }
    }

    /// What a host of this size can hold: a four-hundredth of its memory, at 160 bytes for each.
    pub(super) fn flow_capacity(&self) -> u32 {
        let scaled = || {
            let system = rustix::system::sysinfo();
            let memory = system.totalram as u64 * u64::from(system.mem_unit);
            u32::try_from(memory / 400 / 160).unwrap_or(u32::MAX)
        };
        let wanted = self.flow_capacity.unwrap_or_else(scaled);
        wanted.clamp(maps::FLOW_CAPACITY, maps::MAX_FLOW_CAPACITY)
    }
}

/// A device that somebody wants to look at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Foreign {
    /// Packets start with an Ethernet header.
    pub ethernet: bool,
    /// Judge, count and report, but drop nothing.
    pub observe: bool,
}
