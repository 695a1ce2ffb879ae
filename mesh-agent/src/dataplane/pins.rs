//! The folder on a BPF file system in which an agent leaves maps and programs for the next.
//!
//! Nothing that filters hangs from it: without the folder the programs stay where they are, and only
//! the next agent could not take over what they know. So whoever unmounts it is told of, and what it
//! held is pinned again as soon as there is a place.

use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use aya::maps::{MapData, MapInfo};
use aya::programs::SchedClassifier;
use mesh_common::maps::{LAYOUT_VERSION, PINNED, Shape};

use super::AttachError;
use super::attach::Left;
use super::probe;

/// `BASE/vN`: one layout's maps and programs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Folder(PathBuf);

impl Folder {
    /// This agent's own layout's.
    pub(super) fn open(base: &Path) -> Result<Self, AttachError> {
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
        Ok(Self(path))
    }

    /// Other layouts', left by agents before an upgrade.
    pub(super) fn others(&self) -> io::Result<Vec<Self>> {
        let mut others = Vec::new();
        for entry in fs::read_dir(self.base())? {
            let other = Self(entry?.path());
            if other != *self && other.version().is_some() {
                others.push(other);
            }
        }
        Ok(others)
    }

    fn version(&self) -> Option<u32> {
        self.0
            .file_name()?
            .to_str()?
            .strip_prefix('v')?
            .parse()
            .ok()
    }

    /// Where every layout's folder lies.
    pub(super) fn base(&self) -> &Path {
        self.0.parent().unwrap_or(&self.0)
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// What lies under a map's name, if anything does.
    pub(super) fn shape(&self, map: &'static str) -> Result<Option<Shape>, AttachError> {
        let path = self.map(map);
        if !path.exists() {
            return Ok(None);
        }
        let info = MapInfo::from_pin(&path).map_err(|source| AttachError::Pinned {
            map,
            source: Box::new(source),
        })?;
        Ok(Some(Shape {
            key: info.key_size(),
            value: info.value_size(),
        }))
    }

    /// aya opens a pinned map without asking what is in it.
    pub(super) fn check_layout(&self) -> Result<(), AttachError> {
        for map in PINNED {
            let wanted = Shape::of(map);
            match self.shape(map)? {
                Some(found) if found != wanted => {
                    return Err(AttachError::Layout { map, found, wanted });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Every pinned program of this role, whichever agent's.
    pub(super) fn programs(&self, role: Role) -> anyhow::Result<Vec<Left>> {
        let mut left = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            let pin = entry?.path();
            if role.id(&pin).is_none() {
                continue;
            }
            let program = SchedClassifier::from_pin(&pin)?;
            left.push(Left {
                id: program.info()?.id(),
                program: program.fd()?.as_fd().try_clone_to_owned()?,
                pin,
            });
        }
        Ok(left)
    }

    /// Where a program of this number is pinned.
    pub(super) fn program(&self, role: Role, id: u32) -> PathBuf {
        self.0.join(format!("{}{id}", role.prefix()))
    }

    /// Pins a program under its number, so that it never takes the place of another's pin.
    pub(super) fn keep(&self, role: Role, program: &mut SchedClassifier) -> anyhow::Result<()> {
        let pin = self.program(role, program.info()?.id());
        if !pin.exists() {
            program.pin(&pin)?;
        }
        Ok(())
    }

    /// Removes the folder and what is in it.
    pub(super) fn remove(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.0)? {
            fs::remove_file(entry?.path())?;
        }
        fs::remove_dir(&self.0)
    }
}

/// What a program is for; part of its pin's name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    Ingress,
    Egress,
    Guard,
}

impl Role {
    fn prefix(self) -> &'static str {
        match self {
            Self::Ingress => "prog_in_",
            Self::Egress => "prog_eg_",
            Self::Guard => "prog_guard_",
        }
    }

    fn id(self, pin: &Path) -> Option<u32> {
        let name = pin.file_name()?.to_str()?;
        name.strip_prefix(self.prefix())?.parse().ok()
    }
}

/// Descriptors of the maps, with which they are pinned again.
#[derive(Debug)]
pub(super) struct Pins {
    pub(super) folder: Folder,
    maps: Vec<(&'static str, MapData)>,
}

impl Pins {
    /// Of a folder in which all maps are pinned.
    pub(super) fn of(folder: Folder) -> Result<Self, AttachError> {
        let open = |map: &'static str| {
            let data = MapData::from_pin(folder.map(map)).map_err(|source| AttachError::Map {
                map,
                source: Box::new(source),
            })?;
            Ok((map, data))
        };
        let maps = PINNED.into_iter().map(open).collect::<Result<_, _>>()?;
        Ok(Self { folder, maps })
    }

    pub(super) fn maps(&self) -> &[(&'static str, MapData)] {
        &self.maps
    }

    /// Whether the next agent would find them.
    pub(super) fn are_there(&self) -> bool {
        self.maps
            .iter()
            .all(|(name, _)| self.folder.map(name).exists())
    }

    /// Pins again whatever is not there.
    pub(super) fn mend(&self) -> anyhow::Result<()> {
        fs::create_dir_all(&self.folder.0)?;
        for (name, data) in &self.maps {
            let pin = self.folder.map(name);
            if !pin.exists() {
                data.pin(pin)?;
            }
        }
        Ok(())
    }
}
