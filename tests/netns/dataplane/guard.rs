//! For how long a new interface is open to its neighbours.
//!
//! ```text
//!   box ── e1 ══ v1 ──► node: UDP to its mesh address      (no node of the mesh)
//!   box ── e2 ══ v2 ──► ...
//! ```
//! No guard can hang before its interface is there, so what comes in at once is delivered. The box
//! sends all the time, and each interface is up in the moment in which it appears at the node.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mesh_tests::mesh::{Family, Mesh};
use mesh_tests::{Lab, scaled, until};

use super::field::{SOON, backend, policy};
use super::forward::in_container;

const PORT: u16 = 9000;
/// Between two packets on one interface.
const PACE: Duration = Duration::from_millis(1);
const ALONE: u8 = 5;
const IN_A_ROW: u8 = 25;
/// Half of what gathering notifications took alone. By the median: one of many may meet a machine
/// that is busy otherwise.
const LIMIT: Duration = Duration::from_millis(50);

#[test]
fn a_new_interface_is_guarded_at_once_however_many_come() {
    let lab = Lab::of_release_build().unwrap();
    let mesh = Mesh::of_roles(lab, &policy(), backend()).unwrap();
    let node = mesh.node("node");
    let host = &node.host;
    let to = SocketAddr::new(node.address(Family::V4).unwrap(), PORT);
    let numbers = 1..=ALONE + IN_A_ROW;
    host.run("sh", &["-ec", &prepare(numbers.clone())]).unwrap();
    let sources: Vec<UdpSocket> = in_container(host, || numbers.map(source).collect());
    let sink = host.inside(|| UdpSocket::bind(("0.0.0.0", PORT)));
    let sink = sink.unwrap().unwrap();
    sink.set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    let stop = AtomicBool::new(false);
    let is_over = || stop.load(Ordering::Relaxed);

    let windows = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over() {
                for source in &sources {
                    // Without a carrier it fails.
                    let _ = source.send_to(b"probe", to);
                }
                std::thread::sleep(PACE);
            }
        });
        let windows = scope.spawn(|| {
            let mut windows = BTreeMap::new();
            while !is_over() {
                if let Ok((_, from)) = sink.recv_from(&mut [0; 64]) {
                    let now = Instant::now();
                    windows.entry(from.ip()).or_insert((now, now)).1 = now;
                }
            }
            windows
        });
        for number in 1..=ALONE {
            host.run("sh", &["-ec", &moved(number, to.ip())]).unwrap();
            std::thread::sleep(Duration::from_millis(700));
        }
        let row = ALONE + 1..=ALONE + IN_A_ROW;
        let made: String = row.map(|number| made(number, to.ip())).collect();
        host.run("sh", &["-ec", &made]).unwrap();
        std::thread::sleep(scaled(Duration::from_secs(2)));
        let before = node.dropped("guarded", "ingress").unwrap();
        let guarded = until("guards drop", SOON, || {
            node.dropped("guarded", "ingress").unwrap() > before + 1000
        });
        stop.store(true, Ordering::Relaxed);
        guarded.unwrap();
        windows.join().unwrap()
    });

    let open = |number| {
        let window = windows.get(&address(number));
        window.map_or(Duration::ZERO, |(first, last)| *last - *first)
    };
    let row = ALONE + 1..=ALONE + IN_A_ROW;
    let medians = [("alone", 1..=ALONE), ("in a row", row)].map(|(what, numbers)| {
        let mut open: Vec<_> = numbers.map(open).collect();
        open.sort();
        let (median, most) = (open[open.len() / 2], open[open.len() - 1]);
        println!("open {what}: {median:.1?} by the median, {most:.1?} at most");
        median
    });
    assert!(medians.iter().all(|median| *median < scaled(LIMIT)));
}

/// The box, which sends from each address through the interface of that number. The node has no way
/// back, which must not be what keeps packets out.
fn prepare(numbers: impl Iterator<Item = u8>) -> String {
    let addresses = numbers.map(|number| {
        format!(
            "ip -n box address add {from} dev lo\n\
             ip -n box rule add from {from} lookup {table}\n",
            from = address(number),
            table = table(number)
        )
    });
    let start = "for way in all default; do echo 0 > /proc/sys/net/ipv4/conf/$way/rp_filter; done\n\
                 ip netns add box\n\
                 ip -n box link set lo up\n";
    start.to_owned() + &addresses.collect::<String>()
}

/// A pair that is whole in the box before the node meets its end, up.
fn moved(number: u8, to: IpAddr) -> String {
    format!(
        "ip -n box link add {v} type veth peer name e{number}\n\
         {ways}\
         ip -n box link set v{number} netns $$ up\n",
        v = end(number),
        ways = ways(number, to)
    )
}

/// A pair as container engines make it, but that the node's end is up from the first.
fn made(number: u8, to: IpAddr) -> String {
    format!(
        "ip link add {v} up type veth peer name e{number} netns box\n{ways}",
        v = end(number),
        ways = ways(number, to)
    )
}

fn end(number: u8) -> String {
    format!("v{number} address 02:00:00:00:00:{number:02x}")
}

/// One process for all: what it does takes less time than starting it.
fn ways(number: u8, to: IpAddr) -> String {
    format!(
        "ip -n box -batch - <<END\n\
         link set e{number} up\n\
         neighbour add {to} lladdr 02:00:00:00:00:{number:02x} dev e{number}\n\
         route add {to} dev e{number} table {table}\n\
         END\n",
        table = table(number)
    )
}

fn table(number: u8) -> u16 {
    1000 + u16::from(number)
}

fn address(number: u8) -> IpAddr {
    [172, 31, number, 2].into()
}

/// The rule of its address takes what it sends to its own interface.
fn source(number: u8) -> UdpSocket {
    UdpSocket::bind((address(number), 0)).unwrap()
}
