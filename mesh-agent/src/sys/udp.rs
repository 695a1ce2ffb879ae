//! Many datagrams with one system call, each with its addresses and, where the kernel splits and joins them,
//! the length of its segments.
//!
//! The kernel reads and writes what a header points at, so pointers are taken just before each call, and to
//! what outlives it.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd};

use super::check;

/// Datagrams that one system call moves.
pub(crate) const BATCH: usize = 64;

/// A datagram to send.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outgoing<'a> {
    pub bytes: &'a [u8],
    pub to: SocketAddr,
    /// Local address to send from; `None` leaves it to routing.
    pub source: Option<IpAddr>,
    /// `bytes` are several datagrams of this length, the last may be shorter; 0 means one.
    pub segment: u16,
}

/// Room for the control messages of one datagram: packet info and a segment size.
const CONTROL: usize = 96;

#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; CONTROL]);

/// Sends up to [`BATCH`] datagrams and returns how many went; an error is the first one's.
/// Waits for room in the socket's buffer unless the socket is one that does not.
///
/// `wide` says that the socket is of AF_INET6: IPv4 destinations are then mapped (RFC 4291,
/// section 2.5.5.2).
pub(crate) fn send_batch(fd: impl AsFd, wide: bool, batch: &[Outgoing<'_>]) -> io::Result<usize> {
    let count = batch.len().min(BATCH);
    // SAFETY: all four are plain old data, for which all zeroes is a value.
    let (mut names, mut vectors, mut headers): (
        [libc::sockaddr_storage; BATCH],
        [libc::iovec; BATCH],
        [libc::mmsghdr; BATCH],
    ) = unsafe { (zeroed(), zeroed(), zeroed()) };
    let mut controls = [Control([0; CONTROL]); BATCH];

    for (i, message) in batch.iter().take(count).enumerate() {
        let name_len = encode_address(message.to, wide, &mut names[i])?;
        vectors[i].iov_base = message.bytes.as_ptr().cast_mut().cast();
        vectors[i].iov_len = message.bytes.len();
        let header = &mut headers[i].msg_hdr;
        header.msg_name = (&raw mut names[i]).cast();
        header.msg_namelen = name_len;
        header.msg_iov = &raw mut vectors[i];
        header.msg_iovlen = 1;
        let used = encode_control(message, wide, &mut controls[i]);
        if used > 0 {
            header.msg_control = controls[i].0.as_mut_ptr().cast();
            header.msg_controllen = used;
        }
    }
    // SAFETY: `count` headers are filled in; all that they point at outlives the call, and the
    // kernel only reads the datagrams.
    let sent = unsafe {
        libc::sendmmsg(
            fd.as_fd().as_raw_fd(),
            headers.as_mut_ptr(),
            count as libc::c_uint,
            0,
        )
    };
    check(sent)
}

/// Buffers for a batch of received datagrams.
pub(crate) struct RecvBatch {
    buffers: Vec<u8>,
    /// Length of one buffer.
    size: usize,
    received: Vec<Received>,
}

#[derive(Clone, Copy)]
struct Received {
    len: usize,
    from: SocketAddr,
    to: Option<IpAddr>,
    segment: usize,
}

/// A received datagram, or several of equal length that the kernel joined (UDP_GRO).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Incoming<'a> {
    pub bytes: &'a [u8],
    pub from: SocketAddr,
    /// The local address that it was sent to.
    pub to: Option<IpAddr>,
    /// Length of each datagram in `bytes`, the last may be shorter.
    pub segment: usize,
}

impl RecvBatch {
    /// `count` buffers (at most [`BATCH`]) of `size` bytes each.
    pub(crate) fn new(count: usize, size: usize) -> Self {
        let count = count.min(BATCH);
        Self {
            buffers: vec![0; count * size],
            size,
            received: Vec::with_capacity(count),
        }
    }

    /// Receives what is there, without waiting; `WouldBlock` if nothing is.
    ///
    /// Datagrams that do not fit a buffer are dropped: they are larger than any that the mesh
    /// exchanges.
    pub(crate) fn receive(&mut self, fd: impl AsFd) -> io::Result<()> {
        self.received.clear();
        // SAFETY: all three are plain old data, for which all zeroes is a value.
        let (mut names, mut vectors, mut headers): (
            [libc::sockaddr_storage; BATCH],
            [libc::iovec; BATCH],
            [libc::mmsghdr; BATCH],
        ) = unsafe { (zeroed(), zeroed(), zeroed()) };
        let mut controls = [Control([0; CONTROL]); BATCH];

        let mut count = 0;
        for (i, buffer) in self.buffers.chunks_exact_mut(self.size).enumerate() {
            vectors[i].iov_base = buffer.as_mut_ptr().cast();
            vectors[i].iov_len = buffer.len();
            let header = &mut headers[i].msg_hdr;
            header.msg_name = (&raw mut names[i]).cast();
            header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_iov = &raw mut vectors[i];
            header.msg_iovlen = 1;
            header.msg_control = controls[i].0.as_mut_ptr().cast();
            header.msg_controllen = CONTROL;
            count += 1;
        }
        // SAFETY: `count` headers are filled in, each pointing at buffers of its own that are as
        // long as it says and outlive the call.
        let received = unsafe {
            libc::recvmmsg(
                fd.as_fd().as_raw_fd(),
                headers.as_mut_ptr(),
                count,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        for i in 0..check(received)? {
            let (header, len) = (&headers[i].msg_hdr, headers[i].msg_len as usize);
            let (to, segment) = decode_control(header);
            let from = decode_address(&names[i]);
            let truncated = header.msg_flags & libc::MSG_TRUNC != 0;
            self.received.push(Received {
                len: if truncated { 0 } else { len.min(self.size) },
                from: from.unwrap_or_else(|| (Ipv6Addr::UNSPECIFIED, 0).into()),
                to,
                segment: segment.unwrap_or(len).max(1),
            });
        }
        Ok(())
    }

    /// What the last [`RecvBatch::receive`] brought.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Incoming<'_>> {
        let buffers = self.buffers.chunks_exact(self.size);
        buffers.zip(&self.received).map(|(buffer, meta)| Incoming {
            bytes: &buffer[..meta.len],
            from: meta.from,
            to: meta.to,
            segment: meta.segment,
        })
    }
}

fn encode_address(
    address: SocketAddr,
    wide: bool,
    storage: &mut libc::sockaddr_storage,
) -> io::Result<libc::socklen_t> {
    let v6 = match address {
        SocketAddr::V4(v4) if !wide => {
            let name: *mut libc::sockaddr_in = (&raw mut *storage).cast();
            let value = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(v4.ip().octets()),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: `sockaddr_storage` has the size and alignment for every socket address.
            unsafe { name.write(value) };
            return Ok(size_of::<libc::sockaddr_in>() as libc::socklen_t);
        }
        SocketAddr::V6(_) if !wide => {
            return Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT));
        }
        SocketAddr::V4(v4) => SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0),
        SocketAddr::V6(v6) => v6,
    };
    let name: *mut libc::sockaddr_in6 = (&raw mut *storage).cast();
    let value = libc::sockaddr_in6 {
        sin6_family: libc::AF_INET6 as libc::sa_family_t,
        sin6_port: v6.port().to_be(),
        sin6_flowinfo: 0,
        sin6_addr: libc::in6_addr {
            s6_addr: v6.ip().octets(),
        },
        sin6_scope_id: v6.scope_id(),
    };
    // SAFETY: as above.
    unsafe { name.write(value) };
    Ok(size_of::<libc::sockaddr_in6>() as libc::socklen_t)
}

/// The address in `storage`; a mapped one comes back as the IPv4 address that it is.
fn decode_address(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match i32::from(storage.ss_family) {
        libc::AF_INET => {
            let name: *const libc::sockaddr_in = (&raw const *storage).cast();
            // SAFETY: the family says which it is, and the storage is large enough for each.
            let name = unsafe { name.read() };
            let ip = name.sin_addr.s_addr.to_ne_bytes().into();
            Some(SocketAddrV4::new(ip, u16::from_be(name.sin_port)).into())
        }
        libc::AF_INET6 => {
            let name: *const libc::sockaddr_in6 = (&raw const *storage).cast();
            // SAFETY: as above.
            let name = unsafe { name.read() };
            let (ip, port) = (
                Ipv6Addr::from(name.sin6_addr.s6_addr),
                u16::from_be(name.sin6_port),
            );
            Some(match ip.to_ipv4_mapped() {
                Some(v4) => SocketAddrV4::new(v4, port).into(),
                None => SocketAddrV6::new(ip, port, 0, name.sin6_scope_id).into(),
            })
        }
        _ => None,
    }
}

/// Writes the control messages for `message` and returns their length.
fn encode_control(message: &Outgoing<'_>, wide: bool, control: &mut Control) -> usize {
    let mut used = 0;
    match message.source {
        Some(source) if wide => {
            let source = match source {
                IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                IpAddr::V6(v6) => v6,
            };
            let info = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr {
                    s6_addr: source.octets(),
                },
                ipi6_ifindex: 0,
            };
            used = put_control(control, used, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, info);
        }
        Some(IpAddr::V4(source)) => {
            let info = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr {
                    s_addr: u32::from_ne_bytes(source.octets()),
                },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            used = put_control(control, used, libc::IPPROTO_IP, libc::IP_PKTINFO, info);
        }
        Some(IpAddr::V6(_)) | None => {}
    }
    if message.segment > 0 {
        let segment = message.segment;
        used = put_control(control, used, libc::SOL_UDP, libc::UDP_SEGMENT, segment);
    }
    used
}

fn put_control<T: Copy>(
    control: &mut Control,
    at: usize,
    level: i32,
    kind: i32,
    value: T,
) -> usize {
    // SAFETY: computes lengths only.
    let (len, space) = unsafe {
        let len = size_of::<T>() as u32;
        (libc::CMSG_LEN(len) as usize, libc::CMSG_SPACE(len) as usize)
    };
    assert!(at + space <= CONTROL, "two small messages fit");
    let header = libc::cmsghdr {
        cmsg_len: len,
        cmsg_level: level,
        cmsg_type: kind,
    };
    // SAFETY: `at` is a multiple of the alignment, as every `space` is, and the header and the
    // value behind it lie within the buffer, as just asserted.
    unsafe {
        let start: *mut libc::cmsghdr = control.0.as_mut_ptr().add(at).cast();
        start.write(header);
        libc::CMSG_DATA(start).cast::<T>().write_unaligned(value);
    }
    at + space
}

/// The local address and the segment size among a received header's control messages.
fn decode_control(header: &libc::msghdr) -> (Option<IpAddr>, Option<usize>) {
    let (mut to, mut segment) = (None, None);
    // SAFETY: the kernel wrote `msg_controllen` bytes of well-formed control messages into a buffer
    // that still lives, and the CMSG functions stay within it.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(header).as_ref() };
    while let Some(message) = next {
        // SAFETY: as above.
        let data = unsafe { libc::CMSG_DATA(message) };
        match (message.cmsg_level, message.cmsg_type) {
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                // SAFETY: this type of message carries an `in_pktinfo`.
                let info: libc::in_pktinfo =
                    unsafe { data.cast::<libc::in_pktinfo>().read_unaligned() };
                to = Some(IpAddr::from(info.ipi_spec_dst.s_addr.to_ne_bytes()));
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                // SAFETY: this type of message carries an `in6_pktinfo`.
                let info = unsafe { data.cast::<libc::in6_pktinfo>().read_unaligned() };
                to = Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).to_canonical());
            }
            (libc::SOL_UDP, libc::UDP_GRO) => {
                // SAFETY: this type of message carries a C `int`.
                let size = unsafe { data.cast::<i32>().read_unaligned() };
                segment = usize::try_from(size).ok();
            }
            _ => {}
        }
        // SAFETY: as above.
        next = unsafe { libc::CMSG_NXTHDR(header, message).as_ref() };
    }
    (to, segment)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::set_option;
    use std::net::UdpSocket;

    fn pair(local: &str) -> (UdpSocket, UdpSocket) {
        let sockets = (
            UdpSocket::bind(local).unwrap(),
            UdpSocket::bind(local).unwrap(),
        );
        for socket in [&sockets.0, &sockets.1] {
            socket.set_nonblocking(true).unwrap();
        }
        sockets
    }

    #[test]
    fn a_batch_arrives_with_its_addresses() {
        let (a, b) = pair("127.0.0.1:0");
        set_option(&b, libc::IPPROTO_IP, libc::IP_PKTINFO, 1).unwrap();
        let to = b.local_addr().unwrap();
        let outgoing = |bytes: &'static [u8]| Outgoing {
            bytes,
            to,
            source: Some([127, 0, 0, 1].into()),
            segment: 0,
        };
        let sent = send_batch(&a, false, &[outgoing(b"one"), outgoing(b"four")]);
        assert_eq!(sent.unwrap(), 2);

        let mut batch = RecvBatch::new(4, 2048);
        batch.receive(&b).unwrap();
        let got: Vec<_> = batch.iter().collect();
        assert_eq!(got.len(), 2);
        assert_eq!((got[0].bytes, got[1].bytes), (&b"one"[..], &b"four"[..]));
        assert_eq!(got[0].from, a.local_addr().unwrap());
        assert_eq!(got[0].to, Some([127, 0, 0, 1].into()));
        assert_eq!(
            batch.receive(&b).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        assert_eq!(batch.iter().count(), 0);
    }

    #[test]
    fn segments_are_split_by_the_kernel() {
        let (a, b) = pair("127.0.0.1:0");
        let message = Outgoing {
            bytes: &[7; 250],
            to: b.local_addr().unwrap(),
            source: None,
            segment: 100,
        };
        assert_eq!(send_batch(&a, false, &[message]).unwrap(), 1);
        let mut batch = RecvBatch::new(8, 2048);
        batch.receive(&b).unwrap();
        let lengths: Vec<_> = batch.iter().map(|m| m.bytes.len()).collect();
        assert_eq!(lengths, [100, 100, 50]);
    }

    #[test]
    fn a_datagram_that_does_not_fit_comes_out_empty() {
        let (a, b) = pair("127.0.0.1:0");
        a.send_to(&[1; 100], b.local_addr().unwrap()).unwrap();
        let mut batch = RecvBatch::new(1, 64);
        batch.receive(&b).unwrap();
        assert_eq!(batch.iter().next().unwrap().bytes, b"");
    }
}
