//! The filters of a clsact qdisc in the order in which they run, asked by a netlink dump; and the kernel's news
//! of filters.
//!
//! Read by hand: whatever kind a foreign filter is of, and whatever its options say, it must be seen.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)` and the same of egress.
pub(super) const INGRESS: u32 = 0xffff_fff2;
pub(super) const EGRESS: u32 = 0xffff_fff3;
/// What is written `parent ffff:` is ingress too.
const QDISC: u32 = 0xffff_0000;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Filter {
    pub(super) priority: u16,
    pub(super) handle: u32,
    /// The number of the program that it is, if it is one.
    pub(super) program: Option<u32>,
}

/// linux/netlink.h, linux/rtnetlink.h, linux/pkt_cls.h.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWTFILTER: u16 = 44;
const RTM_GETTFILTER: u16 = 46;
/// The group RTNLGRP_TC, the fourth.
const RTNLGRP_TC: u32 = 1 << 3;
const REQUEST_DUMP: u16 = 0x301;
const NETLINK_HEADER: usize = 16;
const TC_HEADER: usize = 20;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_CHAIN: u16 = 11;
const TCA_BPF_ID: u16 = 11;
const NLA_TYPE: u16 = 0x3fff;

/// The kernel answers at once.
const PATIENCE: Duration = Duration::from_secs(1);

pub(super) fn dump(ifindex: u32, parent: u32) -> io::Result<Vec<Filter>> {
    let socket = netlink(SocketFlags::CLOEXEC)?;
    set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
    rustix::net::send(&socket, &request(ifindex, parent), SendFlags::empty())?;
    let mut filters = Vec::new();
    let mut buffer = vec![0; 32 << 10];
    loop {
        let (length, _) = rustix::net::recv(&socket, buffer.as_mut_slice(), RecvFlags::empty())?;
        if read(&buffer[..length], None, &mut filters)? {
            return Ok(filters);
        }
    }
}

/// NETLINK_ROUTE is protocol 0 of its family.
fn netlink(flags: SocketFlags) -> io::Result<OwnedFd> {
    let (family, kind) = (AddressFamily::NETLINK, SocketType::RAW);
    Ok(rustix::net::socket_with(family, kind, flags, None)?)
}

/// What the kernel tells of one hook: a dump does not show what came and went between two of them.
#[derive(Debug)]
pub(super) struct News {
    socket: OwnedFd,
    ifindex: u32,
    parent: u32,
}

impl News {
    /// From now on.
    pub(super) fn of(ifindex: u32, parent: u32) -> io::Result<Self> {
        let socket = netlink(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, RTNLGRP_TC))?;
        Ok(Self {
            socket,
            ifindex,
            parent,
        })
    }

    /// Whether such a filter has come since it was last asked; yes, if more was told than there was room for.
    pub(super) fn has_come(&self, is_such: impl Fn(&Filter) -> bool) -> io::Result<bool> {
        let mut buffer = vec![0; 32 << 10];
        let mut has_come = false;
        loop {
            match rustix::net::recv(&self.socket, buffer.as_mut_slice(), RecvFlags::empty()) {
                Ok((length, _)) => {
                    let mut filters = Vec::new();
                    read(
                        &buffer[..length],
                        Some((self.ifindex, self.parent)),
                        &mut filters,
                    )?;
                    has_come |= filters.iter().any(&is_such);
                }
                Err(Errno::AGAIN) => return Ok(has_come),
                Err(Errno::NOBUFS) => has_come = true,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn request(ifindex: u32, parent: u32) -> [u8; NETLINK_HEADER + TC_HEADER] {
    let mut request = [0; NETLINK_HEADER + TC_HEADER];
    let mut put = |at: usize, bytes: &[u8]| request[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &((NETLINK_HEADER + TC_HEADER) as u32).to_ne_bytes());
    put(4, &RTM_GETTFILTER.to_ne_bytes());
    put(6, &REQUEST_DUMP.to_ne_bytes());
    put(20, &ifindex.to_ne_bytes());
    put(28, &parent.to_ne_bytes());
    request
}

/// True when the dump is complete. `only`: of all hooks, this one of this interface.
fn read(mut bytes: &[u8], only: Option<(u32, u32)>, filters: &mut Vec<Filter>) -> io::Result<bool> {
    while let Some(length) = word(bytes, 0) {
        let length = length as usize;
        let Some(message) = bytes.get(NETLINK_HEADER..length) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        match half(bytes, 4) {
            Some(NLMSG_DONE) => return Ok(true),
            Some(NLMSG_ERROR) => {
                let code = word(message, 0).unwrap_or_default().cast_signed();
                return Err(io::Error::from_raw_os_error(-code));
            }
            Some(RTM_NEWTFILTER) => {
                let of = word(message, 4).zip(word(message, 12));
                let of = of.map(|(ifindex, parent)| match parent {
                    QDISC => (ifindex, INGRESS),
                    parent => (ifindex, parent),
                });
                if only.is_none() || of == only {
                    filters.extend(filter(message));
                }
            }
            _ => {}
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// `None` for what the kernel lists before the filters of one priority, and for filters that no packet
/// meets unless another sends it there.
fn filter(message: &[u8]) -> Option<Filter> {
    let handle = word(message, 8)?;
    let priority = (word(message, 16)? >> 16) as u16;
    let attributes = message.get(TC_HEADER..)?;
    let chain = attribute(attributes, TCA_CHAIN).and_then(|value| word(value, 0));
    if handle == 0 || chain.is_some_and(|chain| chain != 0) {
        return None;
    }
    let is_bpf = attribute(attributes, TCA_KIND).is_some_and(|kind| kind.starts_with(b"bpf\0"));
    let program = attribute(attributes, TCA_OPTIONS)
        .filter(|_| is_bpf)
        .and_then(|options| attribute(options, TCA_BPF_ID))
        .and_then(|value| word(value, 0));
    Some(Filter {
        priority,
        handle,
        program,
    })
}

fn attribute(mut bytes: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(half(bytes, 0)?);
        let value = bytes.get(4..length)?;
        if half(bytes, 2)? & NLA_TYPE == kind {
            return Some(value);
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at + 2)?;
    Some(u16::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = ((NETLINK_HEADER + body.len()) as u32)
            .to_ne_bytes()
            .to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.resize(NETLINK_HEADER, 0);
        bytes.extend(body);
        bytes
    }

    fn filter(priority: u32, handle: u32, attributes: &[Vec<u8>]) -> Vec<u8> {
        let mut body = vec![0; 8];
        body.extend(handle.to_ne_bytes());
        body.extend(INGRESS.to_ne_bytes());
        body.extend((priority << 16 | 0x0300).to_ne_bytes());
        body.extend(attributes.concat());
        message(RTM_NEWTFILTER, &body)
    }

    #[test]
    fn filters_come_out_in_their_order() {
        let bpf = [
            attribute(TCA_KIND, b"bpf\0"),
            attribute(TCA_CHAIN, &0_u32.to_ne_bytes()),
            attribute(TCA_OPTIONS, &attribute(TCA_BPF_ID, &42_u32.to_ne_bytes())),
        ];
        let other = [
            attribute(TCA_KIND, b"matchall\0"),
            attribute(TCA_OPTIONS, &[]),
        ];
        let aside = [
            attribute(TCA_KIND, b"u32\0"),
            attribute(TCA_CHAIN, &7_u32.to_ne_bytes()),
        ];
        let bytes = [
            // What stands for a whole priority has no handle.
            filter(1, 0, &bpf[..2]),
            filter(1, 0x6d65_7368, &bpf),
            filter(2, 1, &other),
            filter(3, 1, &aside),
        ];
        let mut filters = Vec::new();
        assert!(!read(&bytes.concat(), None, &mut filters).unwrap());
        assert!(read(&message(NLMSG_DONE, &[0; 4]), None, &mut filters).unwrap());
        let found = |priority, handle, program| Filter {
            priority,
            handle,
            program,
        };
        let expected = [found(1, 0x6d65_7368, Some(42)), found(2, 1, None)];
        assert_eq!(filters, expected);
    }

    #[test]
    fn errors_and_rubbish_are_errors() {
        let refused = message(NLMSG_ERROR, &(-libc::ENODEV).to_ne_bytes());
        let error = read(&refused, None, &mut Vec::new()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
        let torn = &refused[..18];
        assert!(read(torn, None, &mut Vec::new()).is_err());
        let short = [4_u8, 0, 0, 0];
        assert!(read(&short, None, &mut Vec::new()).is_err());
    }
}
