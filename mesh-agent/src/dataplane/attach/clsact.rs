//! Filters of a clsact qdisc, where the kernel has no TCX.
//!
//! Priority and handle are fixed, so that a filter is replaced by naming both again. There is no
//! smaller priority, but of programs that share one the newest runs first.

use std::io;
use std::mem;

use anyhow::Context as _;
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact,
};
use aya::programs::{Link as _, ProgramError, SchedClassifier};

use super::{Way, filters};

/// Before every filter that does not ask for the same.
const PRIORITY: u16 = 1;
/// "mesh" in ASCII: nobody else's at this priority.
const HANDLE: u32 = 0x6d65_7368;

fn handle() -> TcHandle {
    TcHandle::new((HANDLE >> 16) as u16, HANDLE as u16)
}

pub(super) fn hang(program: &mut SchedClassifier, interface: &str, way: Way) -> anyhow::Result<()> {
    if let Err(error) = qdisc_add_clsact(interface)
        && !is_exists(&error)
    {
        return Err(error).context("add the clsact qdisc");
    }
    let options = NlOptions {
        priority: PRIORITY,
        handle: handle(),
        classid: None,
    };
    let way = way.attach_type();
    let attached = program
        .attach_with_options(interface, way, TcAttachOptions::Netlink(options))
        .or_else(|error| match error {
            ProgramError::TcError(error) if is_exists(&error) => {
                let ours = SchedClassifierLink::attached(interface, way, PRIORITY, handle(), None)
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

pub(super) fn unhang(interface: &str, way: Way) -> anyhow::Result<()> {
    let way = way.attach_type();
    match SchedClassifierLink::attached(interface, way, PRIORITY, handle(), None) {
        Ok(link) => match link.detach() {
            // Somebody took it off.
            Err(ProgramError::TcError(error)) if is_not_there(&error) => Ok(()),
            result => Ok(result?),
        },
        // The interface is gone, and the filter with it.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The numbers of programs in the order in which their filters run; `None` where the filter is not
/// under our priority and handle.
pub(super) fn hanging(ifindex: u32, way: Way) -> io::Result<Vec<Option<u32>>> {
    let filters = filters::dump(ifindex, parent(way))?;
    let ours = |filter: &filters::Filter| filter.priority == PRIORITY && filter.handle == HANDLE;
    Ok(filters
        .iter()
        .map(|filter| filter.program.filter(|_| ours(filter)))
        .collect())
}

/// Of the filters that come there from now on.
pub(super) fn news(ifindex: u32, way: Way) -> io::Result<filters::News> {
    filters::News::of(ifindex, parent(way))
}

/// Whether a filter that has just come runs before our `program`, or in its place.
pub(super) fn is_before(filter: &filters::Filter, program: u32) -> bool {
    let is_ours = filter.handle == HANDLE && filter.program == Some(program);
    filter.priority <= PRIORITY && !is_ours
}

fn parent(way: Way) -> u32 {
    match way {
        Way::Ingress => filters::INGRESS,
        Way::Egress => filters::EGRESS,
    }
}

/// ENOENT for a filter, EINVAL for its qdisc.
fn is_not_there(error: &TcError) -> bool {
    let number = match error {
        TcError::NetlinkError(error) => error.raw_os_error(),
        TcError::IoError(error) => error.raw_os_error(),
        _ => None,
    };
    matches!(number, Some(libc::ENOENT | libc::EINVAL))
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
