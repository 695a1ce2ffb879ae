//! Packets whose headers the kernel has not laid out in a row, as a TUN device makes them of large ones.
//!
//! BPF_PROG_TEST_RUN lays every packet out whole, and direct access sees nothing else: what is read by
//! other means is shown only by packets that go through a device.

use std::time::Duration;

use mesh_agent::dataplane::Dataplane;
use mesh_agent::wg::tun::{HEADER_LEN, Tun};
use mesh_common::flow::Stage;
use mesh_core::Direction::Ingress;

use crate::kernel::{options, own_network};
use crate::packet::{Body, Extension, Packet};
use crate::scene::*;
use crate::scratch::Bpffs;

/// Longer than a page: the kernel lays out whole what is shorter.
const LENGTH: usize = 5_000;

/// A SYN to the port that peer 2 may open.
fn opener(v6: bool, port: u16) -> Packet {
    let body = Body::Tcp {
        source: port,
        destination: 22,
        flags: SYN,
    };
    if v6 {
        let [far, near] = ["fd00:a:b:c:d:e:f:2", "fd00:a:b:c:d:e:f:1"];
        Packet::new(Ingress, far.parse().unwrap(), near.parse().unwrap(), body)
    } else {
        packet(PEER, Ingress, body)
    }
}

#[test]
fn headers_outside_the_linear_part_are_read_all_the_same() {
    own_network();
    let bpffs = Bpffs::mount().unwrap();
    let tun = Tun::create("tun0").unwrap();
    let mut dataplane = Dataplane::attach("tun0", &options(&bpffs)).unwrap();
    dataplane.apply(&tables()).unwrap();
    let up = std::process::Command::new("ip")
        .args(["link", "set", "tun0", "up"])
        .status();
    assert!(up.unwrap().success());
    let count = |dataplane: &Dataplane| {
        let counters = dataplane.counters().unwrap();
        let passed = counters.passed.get(&Ingress).copied().unwrap_or_default();
        let dropped = counters
            .dropped
            .iter()
            .filter(|((way, _), _)| *way == Ingress);
        let dropped = dropped.map(|((_, reason), count)| (reason.name(), count.packets));
        (passed.packets, dropped.collect::<Vec<_>>())
    };
    let (mut passed, mut dropped) = count(&dataplane);
    let mut port = 1_000;
    for (v6, extensions) in [(false, 0), (true, 0), (true, 2)] {
        for linear in [1, 19, 20, 21, 33, 39, 40, 41, 47, 53, 59, 60, 61, 64, 128] {
            for allowed in [true, false] {
                port += 1;
                let mut packet = opener(v6, port);
                packet.extensions = vec![Extension::Destination; extensions];
                if let Body::Tcp { destination, .. } = &mut packet.body
                    && !allowed
                {
                    *destination = 23;
                }
                let mut bytes = packet.bytes();
                let headers = bytes.len();
                bytes.resize(LENGTH, 0);
                if v6 {
                    let length = (LENGTH - 40) as u16;
                    bytes[4..6].copy_from_slice(&length.to_be_bytes());
                } else {
                    bytes[2..4].copy_from_slice(&(LENGTH as u16).to_be_bytes());
                }
                // A `struct virtio_net_hdr` that asks for so many bytes in a row.
                let mut header = [0; HEADER_LEN];
                header[2..4].copy_from_slice(&(linear as u16).to_ne_bytes());
                tun.write(&header, &bytes).unwrap();
                let what = format!("{linear} of {headers} bytes, allowed {allowed}, v6 {v6}");
                let mut now = count(&dataplane);
                for _ in 0..100 {
                    if now != (passed, dropped.clone()) {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(10));
                    now = count(&dataplane);
                }
                let denied = now.1.iter().find(|(reason, _)| *reason == "no rule");
                let before = dropped.iter().find(|(reason, _)| *reason == "no rule");
                let more = denied.map_or(0, |d| d.1) - before.map_or(0, |d| d.1);
                let expected = if allowed { (1, 0) } else { (0, 1) };
                assert_eq!((now.0 - passed, more), expected, "{what}: {:?}", now.1);
                let flows = dataplane.flows(Stage::HalfOpen).unwrap();
                let of_port = |key: &mesh_common::flow::FlowKey| key.remote_port.get() == port;
                let found = flows.iter().filter(|(key, _)| of_port(key)).count();
                assert_eq!(found, usize::from(allowed), "{what}");
                (passed, dropped) = now;
            }
        }
    }
}
