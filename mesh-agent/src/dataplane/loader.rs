//! Loads the object, adopts what an earlier agent pinned, and hangs the programs on the device.
//!
//! aya opens a pinned map without asking what is in it, so the sizes are compared first; and a link
//! is replaced in place, because between removing a pin and making it anew a crash would leave the
//! device without a filter.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use aya::maps::{Map, MapInfo};
use aya::programs::SchedClassifier;
use aya::{Ebpf, EbpfLoader};
use mesh_common::maps::{self, LAYOUT_VERSION, PINNED, Shape};
use mesh_core::dataplane::Tables;
use tokio::sync::mpsc;

use super::attach::{Hook, Standing, Way};
use super::events;
use super::guard::Guards;
use super::probe;
use super::tables::{ApplyError, Kernel};
use super::{Counters, FlowEvent};

/// How to load.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A folder of our own on a BPF file system. Maps and links live in it, by layout.
    pub pin_dir: PathBuf,
    /// Another object than the embedded one.
    pub object_path: Option<PathBuf>,
    /// Write new flows and drops through aya-log to the `log` crate's logger.
    pub log: bool,
    /// For a device that is not the mesh's.
    pub foreign: Option<Foreign>,
}

/// A device that somebody wants to look at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Foreign {
    /// Packets start with an Ethernet header.
    pub ethernet: bool,
    /// Judge, count and report, but drop nothing.
    pub observe: bool,
}

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
    #[error("make the folder {path} for maps and links")]
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

/// The programs on one device, and their tables. Dropping it leaves both as they are.
#[derive(Debug)]
pub struct Dataplane {
    ebpf: Ebpf,
    dir: PathBuf,
    ingress: Hook,
    egress: Hook,
    guards: Guards,
    kernel: Kernel,
    events: Option<Map>,
}

impl Dataplane {
    /// Filters both directions of `interface` from here on: under what an earlier agent left, or,
    /// if there is nothing, by dropping everything until [`Dataplane::apply`].
    ///
    /// Blocks for some tens of milliseconds while the kernel verifies.
    pub fn attach(interface: &str, options: &Options) -> Result<Self, AttachError> {
        let dir = pin_dir(&options.pin_dir)?;
        for name in PINNED {
            check_layout(&dir, name)?;
        }
        let mut ebpf = load(&dir, options)?;
        let (ingress, egress) = match options.foreign {
            Some(Foreign { ethernet: true, .. }) => ("mesh_in_l2", "mesh_eg_l2"),
            _ => ("mesh_in", "mesh_eg"),
        };
        let mut kernel = Kernel::open(&mut ebpf)?;
        kernel.set_flags(options)?;
        let events = ebpf.take_map(maps::EVENTS);
        if events.is_none() {
            return Err(AttachError::Incomplete(maps::EVENTS));
        }
        let mut hang = |program, way, pin: &str| {
            let loaded = classifier(&mut ebpf, program)?;
            Hook::hang(loaded, interface, way, &dir.join(pin)).map_err(|source| {
                AttachError::Attach {
                    program,
                    interface: interface.to_owned(),
                    source,
                }
            })
        };
        let ingress = hang(ingress, Way::Ingress, "link_in")?;
        let egress = hang(egress, Way::Egress, "link_eg")?;
        classifier(&mut ebpf, "guard")?;
        Ok(Self {
            ebpf,
            guards: Guards::default(),
            dir,
            ingress,
            egress,
            kernel,
            events,
        })
    }

    /// Makes the tables what they should be, and every running flow be judged anew. On an error the
    /// old policy stands, and who was being renamed is nobody.
    ///
    /// Blocks for some tens of milliseconds: the kernel waits until no CPU uses the old policy.
    pub fn apply(&mut self, tables: &Tables) -> Result<(), ApplyError> {
        self.kernel.apply(tables)
    }

    /// Keeps packets for this node's mesh addresses from coming in on these interfaces: all but the
    /// mesh's own and loopback. Told the whole set each time. An interface that is gone is no error.
    pub fn guard<'a>(
        &mut self,
        interfaces: impl IntoIterator<Item = &'a str>,
    ) -> Result<(), AttachError> {
        let program = classifier(&mut self.ebpf, "guard")?;
        self.guards.set(program, &self.dir, interfaces)
    }

    /// What was passed, dropped and decided since the maps were made.
    pub fn counters(&self) -> Result<Counters, ApplyError> {
        self.kernel.counters()
    }

    /// What becomes of flows and packets from now on; `None` if asked before. Needs a tokio runtime.
    pub fn events(&mut self) -> io::Result<Option<mpsc::Receiver<FlowEvent>>> {
        self.events.take().map(events::read).transpose()
    }

    /// Forgets flows whose time is long over; returns how many stand. To be called every few seconds:
    /// the packet path honours timeouts by itself, this frees their memory.
    pub fn sweep(&mut self) -> Result<usize, ApplyError> {
        self.kernel.sweep()
    }

    /// Whether our programs still are where they were put, and nobody's before them.
    pub fn standing(&self) -> io::Result<Standing> {
        Ok(self.ingress.standing()?.worst(self.egress.standing()?))
    }

    /// Takes programs, links and maps away. The device must be down: from here nothing filters.
    pub fn detach(mut self) -> anyhow::Result<()> {
        self.guards.clear(&self.dir)?;
        self.ingress.unhang()?;
        self.egress.unhang()?;
        for name in PINNED {
            match fs::remove_file(self.dir.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        Ok(fs::remove_dir(&self.dir)?)
    }

    /// A loaded program, for whoever measures or tests it.
    pub fn program(&self, name: &str) -> Option<&SchedClassifier> {
        self.ebpf.program(name)?.try_into().ok()
    }

    /// The object, for its log records.
    pub fn object(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// The tables in the kernel.
    pub fn kernel(&mut self) -> &mut Kernel {
        &mut self.kernel
    }
}

/// `base/vN`, on a BPF file system.
fn pin_dir(base: &Path) -> Result<PathBuf, AttachError> {
    let path = base.join(format!("v{LAYOUT_VERSION}"));
    let failed = |source| AttachError::PinDir {
        path: path.clone(),
        source,
    };
    fs::create_dir_all(&path).map_err(failed)?;
    if !probe::is_bpffs(&path).map_err(failed)? {
        let _ = fs::remove_dir(&path);
        return Err(AttachError::NoBpffs { path });
    }
    Ok(path)
}

fn check_layout(dir: &Path, map: &'static str) -> Result<(), AttachError> {
    let path = dir.join(map);
    if !path.exists() {
        return Ok(());
    }
    let info = MapInfo::from_pin(&path).map_err(|source| AttachError::Pinned {
        map,
        source: Box::new(source),
    })?;
    let found = Shape {
        key: info.key_size(),
        value: info.value_size(),
    };
    let wanted = Shape::of(map);
    if found == wanted {
        Ok(())
    } else {
        Err(AttachError::Layout { map, found, wanted })
    }
}

fn load(dir: &Path, options: &Options) -> Result<Ebpf, AttachError> {
    let mut loader = EbpfLoader::new();
    for name in PINNED {
        loader.map_pin_path(name, dir.join(name));
    }
    let loaded = match (&options.object_path, probe::EMBEDDED) {
        (Some(path), _) => {
            let object = fs::read(path).map_err(|source| AttachError::Object {
                path: path.clone(),
                source,
            })?;
            loader.load(&object)
        }
        (None, Some(object)) => loader.load(object),
        (None, None) => return Err(AttachError::NoObject),
    };
    loaded.map_err(|source| AttachError::Load(Box::new(source)))
}

/// The program, loaded into the kernel if it was not.
fn classifier<'a>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, AttachError> {
    let program = ebpf
        .program_mut(name)
        .ok_or(AttachError::Incomplete(name))?;
    let failed = |source| AttachError::Program {
        program: name,
        source: Box::new(source),
    };
    let program: &mut SchedClassifier = program.try_into().map_err(failed)?;
    if program.fd().is_err() {
        program.load().map_err(failed)?;
    }
    Ok(program)
}
