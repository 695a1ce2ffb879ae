//! One program at one hook of one interface, so that it outlives us.
//!
//! Where the kernel has TCX a pinned link holds the program, first in the list: a program before ours
//! that ends the chain would open the node. Before 6.6 a clsact filter of fixed priority and handle
//! stays by itself, and is replaced by naming both again.

use std::fs;
use std::io;
use std::mem;
use std::path::{Path, PathBuf};

use anyhow::Context;
use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact,
};
use aya::programs::{Link, LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use rustix::net::{AddressFamily, SocketType, netdevice, socket};

use super::probe;
use crate::sys;

/// Before every filter that does not ask for the same.
const PRIORITY: u16 = 1;
/// "mesh" in ASCII: nobody else's at this priority.
const HANDLE: TcHandle = TcHandle::new(0x6d65, 0x7368);

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

/// Where our programs are, from best to worst.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Standing {
    /// Attached, and first.
    First,
    /// On a clsact qdisc, which is not asked.
    Assumed,
    /// Attached, behind a program of somebody else that may end the chain.
    Behind,
    /// Not attached: nothing filters.
    Gone,
}

impl Standing {
    pub(super) fn worst(self, other: Self) -> Self {
        self.max(other)
    }
}

/// A program that hangs.
#[derive(Debug)]
pub(super) struct Hook {
    interface: String,
    ifindex: u32,
    way: Way,
    program_id: u32,
    /// `None` on clsact.
    pin: Option<PathBuf>,
}

impl Hook {
    /// Attaches `program`, or puts it in the place of what `pin` holds on this very interface.
    pub(super) fn hang(
        program: &mut SchedClassifier,
        interface: &str,
        way: Way,
        pin: &Path,
    ) -> anyhow::Result<Self> {
        let hook = Self {
            interface: interface.to_owned(),
            ifindex: index(interface).with_context(|| format!("find {interface}"))?,
            way,
            program_id: program.info().context("ask for the program's id")?.id(),
            pin: probe::has_tcx().then(|| pin.to_owned()),
        };
        if hook.pin.is_none() {
            clsact(program, interface, way)?;
            return Ok(hook);
        }
        if !hook.adopt(program, pin)? {
            hook.tcx(program, pin)?;
        }
        Ok(hook)
    }

    /// True if the pinned link now carries our program on our interface.
    fn adopt(&self, program: &mut SchedClassifier, pin: &Path) -> anyhow::Result<bool> {
        let link = match PinnedLink::from_pin(pin) {
            Ok(link) => FdLink::from(link),
            Err(LinkError::SyscallError(error))
                if error.io_error.kind() == io::ErrorKind::NotFound =>
            {
                return Ok(false);
            }
            Err(error) => return Err(error).context("open the pinned link"),
        };
        let link = SchedClassifierLink::try_from(link).context("take the pinned link")?;
        match program.attach_to_link(link) {
            // The pin keeps it; our descriptor may go.
            Ok(id) => drop(program.take_link(id)?),
            // The device of the link is gone: ENOLINK.
            Err(ProgramError::SyscallError(error))
                if error.io_error.raw_os_error() == Some(libc::ENOLINK) => {}
            Err(error) => return Err(error).context("replace the program of the pinned link"),
        }
        if self.standing()? != Standing::Gone {
            return Ok(true);
        }
        // A link to a device that is gone, or that is not the one we are asked for.
        fs::remove_file(pin).context("remove the pin of a link that leads nowhere")?;
        Ok(false)
    }

    fn tcx(&self, program: &mut SchedClassifier, pin: &Path) -> anyhow::Result<()> {
        let first = TcAttachOptions::TcxOrder(LinkOrder::first());
        let id = program.attach_with_options(&self.interface, self.way.attach_type(), first)?;
        let link: FdLink = program.take_link(id)?.try_into()?;
        link.pin(pin)
            .with_context(|| format!("pin the link as {}", pin.display()))?;
        Ok(())
    }

    /// The kernel's answer, by program id.
    pub(super) fn standing(&self) -> io::Result<Standing> {
        if self.pin.is_none() {
            return Ok(Standing::Assumed);
        }
        let ids = match sys::bpf_prog_query(self.ifindex, self.way.tcx()) {
            Ok(ids) => ids,
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Vec::new(),
            Err(error) => return Err(error),
        };
        Ok(match ids.iter().position(|id| *id == self.program_id) {
            Some(0) => Standing::First,
            Some(_) => Standing::Behind,
            None => Standing::Gone,
        })
    }

    /// Takes the program from the interface.
    pub(super) fn unhang(&self) -> anyhow::Result<()> {
        match &self.pin {
            Some(pin) => match fs::remove_file(pin) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(error).context("remove the pin of the link")
                }
                _ => Ok(()),
            },
            None => remove_clsact(&self.interface, self.way),
        }
    }
}

fn clsact(program: &mut SchedClassifier, interface: &str, way: Way) -> anyhow::Result<()> {
    if let Err(error) = qdisc_add_clsact(interface)
        && !is_exists(&error)
    {
        return Err(error).context("add the clsact qdisc");
    }
    let options = NlOptions {
        priority: PRIORITY,
        handle: HANDLE,
        classid: None,
    };
    let way = way.attach_type();
    let attached = program
        .attach_with_options(interface, way, TcAttachOptions::Netlink(options))
        .or_else(|error| match error {
            ProgramError::TcError(error) if is_exists(&error) => {
                let ours = SchedClassifierLink::attached(interface, way, PRIORITY, HANDLE, None)
                    .map_err(TcError::IoError)?;
                program.attach_to_link(ours)
            }
            error => Err(error),
        })?;
    // aya detaches in whatever network namespace the dropping thread happens to be; the filter is
    // meant to stay in any case.
    mem::forget(program.take_link(attached)?);
    Ok(())
}

fn remove_clsact(interface: &str, way: Way) -> anyhow::Result<()> {
    let way = way.attach_type();
    match SchedClassifierLink::attached(interface, way, PRIORITY, HANDLE, None) {
        Ok(link) => Ok(link.detach()?),
        // The interface is gone, and the filter with it.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// EEXIST, which aya reports as it came from netlink.
fn is_exists(error: &TcError) -> bool {
    match error {
        TcError::AlreadyAttached => true,
        TcError::NetlinkError(error) => error.raw_os_error() == Some(libc::EEXIST),
        TcError::IoError(error) => error.raw_os_error() == Some(libc::EEXIST),
        _ => false,
    }
}

/// The number of an interface of this thread's network namespace.
pub(super) fn index(interface: &str) -> io::Result<u32> {
    let any = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    Ok(netdevice::name_to_index(any, interface)?)
}
