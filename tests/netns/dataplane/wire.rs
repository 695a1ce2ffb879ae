//! A neighbour that makes its frames by hand.

use std::io;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::Duration;

use mesh_tests::eventually;
use mesh_tests::mesh::{Family, Node};
use rustix::net::{AddressFamily, SocketType};

use super::field::SOON;
use super::forward::in_container;

const PORT: u16 = 9000;
const NODE: [u8; 6] = [2, 0, 0, 0, 0, 1];
const NEIGHBOUR: [u8; 6] = [2, 0, 0, 0, 0, 2];
const LINK: &str = "\
ip netns add box
ip link add lan address 02:00:00:00:00:01 type veth peer name eth0 address 02:00:00:00:00:02 netns box
ip address add 172.31.0.1/24 dev lan
ip address add fd31::1/64 dev lan nodad
ip link set lan up
ip -n box link set eth0 up
";

/// A neighbour of a node, and what the node hears of it.
pub(super) struct Neighbour {
    wire: Wire,
    sink: UdpSocket,
}

impl Neighbour {
    /// On a new network of their own, whose interface the node guards.
    pub(super) fn of(node: &Node) -> Self {
        node.host.run("sh", &["-ec", LINK]).unwrap();
        let sink = node.host.inside(|| UdpSocket::bind(("::", PORT)));
        let sink = sink.unwrap().unwrap();
        sink.set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        let neighbour = Self {
            wire: in_container(&node.host, Wire::open),
            sink,
        };
        let from = IpAddr::from([172, 31, 0, 2]);
        let inside = node.address(Family::V4).unwrap();
        let guarded = eventually(SOON, || {
            let before = node.dropped("guarded", "ingress")?;
            // Until the agent has heard of the interface it may arrive.
            let _ = neighbour.sends(&[], &datagram(from, inside, None, "early"), "early");
            anyhow::ensure!(node.dropped("guarded", "ingress")? > before, "no guard yet");
            Ok(())
        });
        guarded.unwrap();
        neighbour
    }

    /// Whether the node hears the text of a packet that is sent in these tags.
    pub(super) fn sends(&self, tags: &[u16], packet: &[u8], text: &str) -> bool {
        self.wire.send(&frame(tags, packet)).unwrap();
        let mut buffer = [0; 128];
        // Of an earlier one there may be more.
        while let Ok((length, _)) = self.sink.recv_from(&mut buffer) {
            if buffer[..length] == *text.as_bytes() {
                return true;
            }
        }
        false
    }
}

/// The neighbour's end, at the level of frames.
struct Wire {
    socket: OwnedFd,
    to: libc::sockaddr_ll,
}

impl Wire {
    fn open() -> Self {
        let socket = rustix::net::socket(AddressFamily::PACKET, SocketType::RAW, None).unwrap();
        let index = rustix::net::netdevice::name_to_index(&socket, "eth0").unwrap();
        let to = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_ifindex: index.cast_signed(),
            sll_halen: 6,
            sll_protocol: 0,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_addr: [0; 8],
        };
        Self { socket, to }
    }

    #[expect(
        unsafe_code,
        reason = "no crate of ours has a safe call for an address of this family"
    )]
    fn send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: the pointers are to a frame and an address of the sizes given, and nothing keeps them.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const self.to).cast(),
                size_of_val(&self.to) as u32,
            )
        };
        match sent {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}

/// On Ethernet, in these tags of the VLAN 0, the outermost first.
fn frame(tags: &[u16], packet: &[u8]) -> Vec<u8> {
    let inner = if packet[0] >> 4 == 4 { 0x0800 } else { 0x86dd };
    let mut frame = [NODE, NEIGHBOUR].concat();
    for tag in tags {
        frame.extend(tag.to_be_bytes());
        frame.extend([0, 0]);
    }
    frame.extend(u16::to_be_bytes(inner));
    frame.extend(packet);
    frame
}

/// RFC 768 in RFC 791 or RFC 8200; by `way` of another address, a strict source route (RFC 791, 3.1) or a
/// segment (RFC 8754) leads on to `to`.
pub(super) fn datagram(from: IpAddr, to: IpAddr, way: Option<IpAddr>, text: &str) -> Vec<u8> {
    let length = 8 + text.len() as u16;
    let bytes = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let (first, from, to) = (bytes(way.unwrap_or(to)), bytes(from), bytes(to));
    let mut udp = Vec::new();
    for word in [40_000, PORT, length, 0] {
        udp.extend(word.to_be_bytes());
    }
    udp.extend(text.as_bytes());
    // Of the address where it ends.
    let pseudo = [&from, &to, &[0, 17][..], &length.to_be_bytes(), &udp].concat();
    udp[6..8].copy_from_slice(&checksum(&pseudo).to_be_bytes());
    let route = match (way.is_some(), to.len()) {
        (false, _) => Vec::new(),
        (true, 4) => [&[137, 7, 4][..], &to, &[0]].concat(),
        // The stops stand from the last to the first.
        (true, _) => [&[17, 4, 4, 1, 1, 0, 0, 0][..], &to, &first].concat(),
    };
    let mut packet = if from.len() == 4 {
        let mut header = vec![0x45 + (route.len() / 4) as u8, 0];
        header.extend((20 + route.len() as u16 + length).to_be_bytes());
        header.extend([0, 0, 0, 0, 64, 17, 0, 0]);
        header.extend([&from[..], &first, &route].concat());
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        header
    } else {
        let mut header = vec![0x60, 0, 0, 0];
        header.extend((route.len() as u16 + length).to_be_bytes());
        header.extend([if route.is_empty() { 17 } else { 43 }, 64]);
        header.extend([&from[..], &first, &route].concat());
        header
    };
    packet.extend(udp);
    packet
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|word| {
        let low = word.get(1).copied().unwrap_or(0);
        u32::from(u16::from_be_bytes([word[0], low]))
    });
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !(((folded & 0xffff) + (folded >> 16)) as u16)
}
