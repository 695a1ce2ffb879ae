//! What a neighbour sends in VLAN tags, and the kernel takes out of them behind the guard.
//!
//! A tag of the VLAN 0 names no network, only a priority, so any interface takes such frames, and any number
//! of such tags: one comes off before programs see the packet, the others after. No address family of ours
//! sends them, so the frames are made by hand.

use std::io;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::Duration;

use mesh_tests::mesh::{Family, Mesh};
use mesh_tests::{Lab, eventually};
use rustix::net::{AddressFamily, SocketType};

use super::field::{SOON, backend, policy};
use super::forward::in_container;

const PORT: u16 = 9000;
const Q: u16 = 0x8100;
const AD: u16 = 0x88a8;
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

#[test]
fn no_tags_take_a_packet_past_the_guard() {
    let lab = Lab::of_release_build().unwrap();
    let mesh = Mesh::of_roles(lab, &policy(), backend()).unwrap();
    let node = mesh.node("node");
    node.host.run("sh", &["-ec", LINK]).unwrap();
    let sink = node.host.inside(|| UdpSocket::bind(("::", PORT)));
    let sink = sink.unwrap().unwrap();
    let wire = in_container(&node.host, Wire::open);
    let arrives = |tags: &[u16], from: IpAddr, to: IpAddr| {
        let text = format!("{tags:x?} to {to}");
        let frame = frame(tags, &datagram(from, to, text.as_bytes()));
        wire.send(&frame).unwrap();
        sink.set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        let mut buffer = [0; 128];
        // Of an earlier one there may be more.
        while let Ok((length, _)) = sink.recv_from(&mut buffer) {
            if buffer[..length] == *text.as_bytes() {
                return true;
            }
        }
        false
    };
    for (family, outside, neighbour) in [
        (Family::V4, "172.31.0.1", "172.31.0.2"),
        (Family::V6, "fd31::1", "fd31::2"),
    ] {
        let (outside, neighbour): (IpAddr, IpAddr) =
            (outside.parse().unwrap(), neighbour.parse().unwrap());
        let inside = node.address(family).unwrap();
        let guarded = eventually(SOON, || {
            let before = node.dropped("guarded", "ingress")?;
            // Until the agent has heard of the interface it may.
            let _ = arrives(&[], neighbour, inside);
            anyhow::ensure!(node.dropped("guarded", "ingress")? > before, "no guard yet");
            Ok(())
        });
        guarded.unwrap();
        for tags in [&[][..], &[Q], &[Q, Q], &[AD, Q], &[Q, Q, Q], &[Q; 5]] {
            assert!(arrives(tags, neighbour, outside), "{tags:x?}");
            let before = node.dropped("guarded", "ingress").unwrap();
            assert!(!arrives(tags, neighbour, inside), "{tags:x?}");
            let after = node.dropped("guarded", "ingress").unwrap();
            assert_eq!(after, before + 1, "{tags:x?}");
        }
        // One more than anybody reads through.
        assert!(!arrives(&[Q; 6], neighbour, outside));
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

/// RFC 768 in RFC 791 or RFC 8200.
fn datagram(from: IpAddr, to: IpAddr, text: &[u8]) -> Vec<u8> {
    let length = 8 + text.len() as u16;
    let [from, to] = [from, to].map(|address| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    });
    let mut udp = Vec::new();
    for word in [40_000, PORT, length, 0] {
        udp.extend(word.to_be_bytes());
    }
    udp.extend(text);
    let pseudo = [&from, &to, &[0, 17][..], &length.to_be_bytes(), &udp].concat();
    udp[6..8].copy_from_slice(&checksum(&pseudo).to_be_bytes());
    let mut packet = if from.len() == 4 {
        let mut header = vec![0x45, 0];
        header.extend((20 + length).to_be_bytes());
        header.extend([0, 0, 0, 0, 64, 17, 0, 0]);
        header.extend([&from[..], &to].concat());
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        header
    } else {
        let mut header = vec![0x60, 0, 0, 0];
        header.extend(length.to_be_bytes());
        header.extend([17, 64]);
        header.extend([&from[..], &to].concat());
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
