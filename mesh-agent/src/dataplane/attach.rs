//! One program at one hook of one interface, so that it outlives us.
//!
//! Nothing of ours holds it there, neither process nor pin: where the kernel has TCX the program is
//! attached by itself, first in the list, because a program before ours that ends the chain would open
//! the node; before 6.6 it is a clsact filter of fixed priority and handle. Why not by a link:
//! docs/adr/0006.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;

use anyhow::Context as _;
use aya::programs::{SchedClassifier, TcAttachType};
use mesh_core::dataplane::vigil::Standing;
use rustix::net::{AddressFamily, SocketType, netdevice, socket};

use crate::sys;

mod clsact;
mod filters;
mod look;

use look::Look;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Way {
    Ingress,
    Egress,
}

impl Way {
    fn attach_type(self) -> TcAttachType {
        match self {
            Self::Ingress => TcAttachType::Ingress,
            Self::Egress => TcAttachType::Egress,
        }
    }

    /// `BPF_TCX_INGRESS`, `BPF_TCX_EGRESS`.
    fn tcx(self) -> u32 {
        match self {
            Self::Ingress => 46,
            Self::Egress => 47,
        }
    }
}

/// Which of the kernel's two lists of programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Chain {
    Tcx,
    Clsact,
}

/// A program that an agent left pinned: what hangs under its number is ours.
#[derive(Debug)]
pub(super) struct Left {
    pub(super) id: u32,
    pub(super) program: OwnedFd,
    pub(super) pin: PathBuf,
}

/// A program that hangs.
#[derive(Debug)]
pub(super) struct Hook {
    interface: String,
    ifindex: u32,
    way: Way,
    program_id: u32,
    place: Place,
    look: Look,
    /// Something came and went; until that is told.
    visited: bool,
}

#[derive(Debug)]
enum Place {
    Tcx(OwnedFd),
    Clsact(filters::News),
}

impl Hook {
    /// Hangs `program` on `interface`, in the place of whichever of `left` hangs there. Of `unpinned`, known by
    /// their numbers alone, those go that hang right behind it.
    pub(super) fn hang(
        program: &mut SchedClassifier,
        interface: &str,
        way: Way,
        chain: Chain,
        left: &[Left],
        unpinned: &BTreeSet<u32>,
    ) -> anyhow::Result<Self> {
        let ifindex = index(interface).with_context(|| format!("find {interface}"))?;
        let program_id = program.info().context("ask for the program's number")?.id();
        let place = match chain {
            Chain::Clsact => {
                let news = clsact::news(ifindex, way).context("ask for news of filters")?;
                clsact::hang(program, interface, way)?;
                Place::Clsact(news)
            }
            Chain::Tcx => {
                let program = program.fd()?.as_fd().try_clone_to_owned()?;
                let (ids, _) =
                    sys::bpf::prog_query(ifindex, way.tcx()).context("ask for programs")?;
                let mut ours = left
                    .iter()
                    .filter(|left| left.id != program_id && ids.contains(&left.id));
                if !ids.contains(&program_id) {
                    let old = ours.next().map(|left| left.program.as_fd());
                    sys::bpf::prog_attach(ifindex, way.tcx(), &program, old)?;
                }
                // A second one there is what a crash left.
                for old in ours {
                    sys::bpf::prog_detach(ifindex, way.tcx(), &old.program)?;
                }
                while let (ids, revision) = sys::bpf::prog_query(ifindex, way.tcx())?
                    && let Some(next) = ids.iter().skip_while(|id| **id != program_id).nth(1)
                    && unpinned.contains(next)
                {
                    sys::bpf::prog_detach_behind(ifindex, way.tcx(), &program, revision)?;
                }
                Place::Tcx(program)
            }
        };
        Ok(Self {
            interface: interface.to_owned(),
            ifindex,
            way,
            program_id,
            place,
            look: hanging(ifindex, way, chain).context("ask for programs")?,
            visited: false,
        })
    }

    /// What hangs there already, if it is one of `left`.
    pub(super) fn find(
        interface: &str,
        way: Way,
        chain: Chain,
        left: &[Left],
    ) -> anyhow::Result<Option<Self>> {
        let ifindex = index(interface).with_context(|| format!("find {interface}"))?;
        let look = hanging(ifindex, way, chain)?;
        let Some(found) = left.iter().find(|left| look.ids.contains(&Some(left.id))) else {
            return Ok(None);
        };
        Ok(Some(Self {
            interface: interface.to_owned(),
            ifindex,
            way,
            program_id: found.id,
            place: match chain {
                Chain::Tcx => Place::Tcx(found.program.try_clone()?),
                Chain::Clsact => Place::Clsact(clsact::news(ifindex, way)?),
            },
            look,
            visited: false,
        }))
    }

    /// The interface has another name now.
    pub(super) fn rename(&mut self, interface: &str) {
        interface.clone_into(&mut self.interface);
    }

    pub(super) fn interface(&self) -> &str {
        &self.interface
    }

    pub(super) fn program_id(&self) -> u32 {
        self.program_id
    }

    /// The kernel's answer, by the program's number. [`Standing::FirstAgain`] until [`Self::told`].
    pub(super) fn standing(&mut self) -> io::Result<Standing> {
        let chain = match self.place {
            Place::Tcx(_) => Chain::Tcx,
            Place::Clsact(_) => Chain::Clsact,
        };
        let look = match hanging(self.ifindex, self.way, chain) {
            Ok(look) => look,
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Look::default(),
            Err(error) => return Err(error),
        };
        self.visited |= match &self.place {
            Place::Tcx(_) => look.hides_a_visit_since(&self.look),
            Place::Clsact(news) => {
                news.has_come(|filter| clsact::is_before(filter, self.program_id))?
            }
        };
        self.look = look;
        let ours = Some(self.program_id);
        Ok(match self.look.ids.iter().position(|id| *id == ours) {
            Some(0) if self.visited => Standing::FirstAgain,
            Some(0) => Standing::First,
            Some(_) => Standing::Behind,
            None => Standing::Gone,
        })
    }

    /// The last standing is known to whoever must know it.
    pub(super) fn told(&mut self) {
        self.visited = false;
    }

    /// Takes the program from the interface.
    pub(super) fn unhang(&self) -> anyhow::Result<()> {
        match &self.place {
            Place::Tcx(program) => {
                match sys::bpf::prog_detach(self.ifindex, self.way.tcx(), program) {
                    // Somebody took it off, or the interface is gone.
                    Err(error)
                        if matches!(
                            error.raw_os_error(),
                            Some(libc::ENOENT | libc::ENODEV | libc::EINVAL)
                        ) =>
                    {
                        Ok(())
                    }
                    result => result.context("detach the program"),
                }
            }
            // By name, and another interface may have it now.
            Place::Clsact(_) if index_if_there(&self.interface)? != Some(self.ifindex) => Ok(()),
            Place::Clsact(_) => clsact::unhang(&self.interface, self.way),
        }
    }
}

/// What is at a hook now.
fn hanging(ifindex: u32, way: Way, chain: Chain) -> io::Result<Look> {
    match chain {
        Chain::Tcx => {
            let (ids, revision) = sys::bpf::prog_query(ifindex, way.tcx())?;
            Ok(Look {
                ids: ids.into_iter().map(Some).collect(),
                revision,
            })
        }
        Chain::Clsact => Ok(Look {
            ids: clsact::hanging(ifindex, way)?,
            revision: 0,
        }),
    }
}

/// How many programs hang on an interface, whoever's.
pub(super) fn count(interface: &str, way: Way, chain: Chain) -> io::Result<usize> {
    Ok(hanging(index(interface)?, way, chain)?.ids.len())
}

/// The number of an interface of this thread's network namespace.
pub(super) fn index(interface: &str) -> io::Result<u32> {
    let any = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    Ok(netdevice::name_to_index(any, interface)?)
}

/// The same, or `None` for an interface that is gone. Every other error is one: whoever takes "cannot
/// say" for "gone" takes guards away.
pub(super) fn index_if_there(interface: &str) -> io::Result<Option<u32>> {
    match index(interface) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        result => result.map(Some),
    }
}
