//! What a packet costs from a network device to a socket, through nothing, our filter, or nftables.
//!
//! ```text
//!   BPF_PROG_TEST_RUN, live frames ─► g0 ═ veth ═ d0 ─► filter ─► UDP socket with a full buffer
//! ```
//! All on one CPU, so the time from the first frame to the last is that of the whole path. The filters
//! take turns, round by round, and what one adds is the median of its differences to nothing in the same
//! round. The kernel hands frames over in turns of the scheduler, some milliseconds long, so a round is
//! a hundred of them at least. The flow is established for ours and for conntrack alike.

use std::io::Write as _;
use std::net::{Ipv4Addr, UdpSocket};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::Array;
use aya::programs::Xdp;
use aya::programs::xdp::XdpMode;
use aya::{Ebpf, TestRun, TestRunAttrs, TestRunOptions};
use mesh_agent::dataplane::Foreign;
use mesh_common::addr::Prefix;
use mesh_common::policy::PolicyPrefix;
use mesh_common::{Direction, Identity, IdentityEntry, PolicyEntry, PolicyKey, RuleId};
use mesh_core::dataplane::Tables;
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType, socket};

use super::Row;
use super::setup::Bench;

const HERE: [u8; 4] = [10, 9, 0, 2];
const THERE: [u8; 4] = [10, 9, 0, 1];
const PORTS: [u16; 2] = [40_000, 443];
const MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];

/// How often frames may be lost before the machine is too busy to measure on.
const ATTEMPTS: u32 = 5;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Filter {
    Nothing,
    Mesh,
    ConntrackMap,
    List(u32),
}

const FILTERS: [(&str, Filter); 6] = [
    ("receive_bare", Filter::Nothing),
    ("receive_mesh", Filter::Mesh),
    ("receive_nft_conntrack_map", Filter::ConntrackMap),
    ("receive_nft_list_10", Filter::List(10)),
    ("receive_nft_list_100", Filter::List(100)),
    ("receive_nft_list_1000", Filter::List(1_000)),
];

pub(super) fn measure(runs: usize) -> Result<Vec<Row>> {
    let wire = Wire::new()?;
    let mut times: Vec<Vec<f64>> = FILTERS.iter().map(|_| Vec::new()).collect();
    for _ in 0..runs.min(2) {
        for ((name, filter), times) in FILTERS.iter().zip(&mut times) {
            let time = wire
                .through(*filter)
                .with_context(|| format!("measure {name}"))?;
            times.push(time);
        }
    }
    let added = |filter: usize| -> Vec<f64> {
        let rounds = times[filter].iter().zip(&times[0]);
        rounds.map(|(through, bare)| through - bare).collect()
    };
    let added = [
        ("added_mesh", added(1)),
        ("added_nft_conntrack_map", added(2)),
    ];
    let rows = FILTERS.iter().map(|(name, _)| *name).zip(times);
    Ok(rows
        .chain(added)
        .map(|(name, times)| Row::new(name, "ns", times))
        .collect())
}

struct Wire {
    generator: Ebpf,
    sink: UdpSocket,
    frame: Vec<u8>,
}

impl Wire {
    fn new() -> Result<Self> {
        for line in [
            "link set lo up",
            "link add g0 address 02:00:00:00:00:01 type veth peer name d0 address 02:00:00:00:00:02",
            "link set g0 up",
            "link set d0 up",
            "addr add 10.9.0.2/24 dev d0",
            "neigh replace 10.9.0.1 lladdr 02:00:00:00:00:01 dev d0",
        ] {
            run("ip", &line.split(' ').collect::<Vec<_>>(), "")?;
        }
        let object = std::env::var_os("MESH_BENCH_OBJECT")
            .context("the object: run as `cargo xtask bench dataplane`")?;
        let mut generator = Ebpf::load_file(object)?;
        let any = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
        let number = name_to_index(any, "g0")?;
        let map = generator.map_mut("spread").context("the bench object")?;
        let mut spread: Array<_, u32> = map.try_into()?;
        spread.set(3, number, 0)?;
        let pass: &mut Xdp = program(&mut generator, "pass")?;
        pass.load()?;
        pass.attach("d0", XdpMode::Driver)?;
        program(&mut generator, "frame")?.load()?;
        Ok(Self {
            generator,
            sink: UdpSocket::bind((Ipv4Addr::from(HERE), PORTS[1]))?,
            frame: frame(),
        })
    }

    /// Nanoseconds per frame.
    fn through(&self, filter: Filter) -> Result<f64> {
        let mut mesh = None;
        match filter {
            Filter::Nothing => {}
            Filter::Mesh => {
                let foreign = Foreign {
                    ethernet: true,
                    observe: false,
                };
                let mut bench = Bench::load("d0", Some(foreign))?;
                bench.dataplane.apply(&tables())?;
                mesh = Some(bench);
            }
            Filter::ConntrackMap => run("nft", &["-f", "-"], &conntrack_map())?,
            Filter::List(rules) => run("nft", &["-f", "-"], &list(rules))?,
        }
        // The flow is answered, so that it is an established one.
        self.send(1)?;
        self.sink
            .send_to(b"answer", (Ipv4Addr::from(THERE), PORTS[0]))?;
        let frames = if filter == Filter::List(1_000) {
            60_000
        } else {
            500_000
        };
        self.send(frames / 10)?;
        let time = self.time(frames)?;
        run("nft", &["flush", "ruleset"], "")?;
        if let Some(bench) = mesh {
            let counters = bench.dataplane.counters()?;
            let passed = counters.passed[&Direction::Ingress].packets;
            ensure!(
                passed >= u64::from(frames),
                "our filter has seen {passed} frames"
            );
            bench.dataplane.detach()?;
        }
        Ok(time.as_secs_f64() * 1e9 / f64::from(frames))
    }

    /// Of so many frames. Those that found the device's ring full, as something else had the CPU meanwhile,
    /// cost nothing: then once more.
    fn time(&self, frames: u32) -> Result<Duration> {
        let mut taken_in = 0;
        for _ in 0..ATTEMPTS {
            let before = received()?;
            let begun = Instant::now();
            self.send(frames)?;
            let time = begun.elapsed();
            taken_in = received()? - before;
            if taken_in * 100 >= u64::from(frames) * 99 {
                return Ok(time);
            }
        }
        bail!(
            "{ATTEMPTS} times frames were lost, at last only {taken_in} of {frames} came through: this machine is busy"
        )
    }

    fn send(&self, frames: u32) -> Result<()> {
        let program = self
            .generator
            .program("frame")
            .context("the bench object")?;
        let program: &Xdp = program.try_into()?;
        program.test_run(TestRunOptions {
            data_in: Some(&self.frame),
            repeat: frames,
            attrs: TestRunAttrs::new().xdp_live_frames(64),
            ..TestRunOptions::default()
        })?;
        Ok(())
    }
}

/// Frames that `d0` has taken in.
fn received() -> Result<u64> {
    let devices = std::fs::read_to_string("/proc/thread-self/net/dev")
        .context("read /proc/thread-self/net/dev")?;
    let counts = devices
        .lines()
        .find_map(|line| line.trim().strip_prefix("d0:"));
    let packets = counts.and_then(|counts| counts.split_whitespace().nth(1));
    packets
        .and_then(|packets| packets.parse().ok())
        .context("d0 in /proc/thread-self/net/dev")
}

fn program<'a>(object: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    Ok(object
        .program_mut(name)
        .context("the bench object")?
        .try_into()?)
}

/// 60 bytes: UDP without a checksum.
fn frame() -> Vec<u8> {
    let mut ip = vec![0x45, 0, 0, 46, 0, 0, 0x40, 0, 64, 17, 0, 0];
    ip.extend(THERE);
    ip.extend(HERE);
    let mut sum: u32 = ip
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    sum = (sum & 0xffff) + (sum >> 16);
    let sum = !((sum + (sum >> 16)) as u16);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut frame = [MACS[1], MACS[0]].concat();
    frame.extend([8, 0]);
    frame.extend(ip);
    frame.extend(PORTS[0].to_be_bytes());
    frame.extend(PORTS[1].to_be_bytes());
    frame.extend([0, 26, 0, 0]);
    frame.resize(60, 0);
    frame
}

/// A thousand allowed flows, of which one is the bench's.
fn tables() -> Tables {
    let host = |octets: [u8; 4]| Prefix {
        len: 128,
        address: std::net::IpAddr::from(octets).into(),
    };
    let entry = |identity, flags, peer| IdentityEntry {
        identity: Identity(identity),
        flags,
        peer,
    };
    let mut tables = Tables::default();
    tables
        .identities
        .insert(host(HERE), entry(16, IdentityEntry::LOCAL, 0));
    tables.identities.insert(host(THERE), entry(17, 0, 2));
    for n in 0..1_000 {
        let port = if n == 0 { PORTS[1] } else { 1_000 + n };
        let key = PolicyKey::new(
            Identity(17 + u32::from(n) % 100),
            Identity(16),
            Direction::Ingress,
            17,
            port,
        );
        let row = PolicyPrefix {
            len: PolicyPrefix::EXACT,
            key,
        };
        tables.rows.insert(row, PolicyEntry::accept(RuleId(1)));
    }
    tables.rules.insert(RuleId(1));
    tables
}

/// Sources and ports of rules that the bench's frames do not match.
fn others(count: u32) -> impl Iterator<Item = (String, u32)> {
    (0..count).map(|n| {
        (
            format!("10.100.{}.{}", n / 250, n % 250 + 1),
            1_000 + n % 5_000,
        )
    })
}

fn conntrack_map() -> String {
    let others: Vec<String> = others(1_000)
        .map(|(source, port)| format!("{source} . {port} : accept"))
        .collect();
    format!(
        "table ip bench {{
            map allowed {{
                type ipv4_addr . inet_service : verdict
                elements = {{ 10.9.0.1 . 443 : accept, {} }}
            }}
            chain input {{
                type filter hook input priority 0; policy drop;
                ct state established,related accept
                ip saddr . udp dport vmap @allowed
            }}
        }}",
        others.join(", ")
    )
}

/// The last of the rules is the bench's.
fn list(rules: u32) -> String {
    let others: Vec<String> = others(rules - 1)
        .map(|(source, port)| format!("ip saddr {source} udp dport {port} accept\n"))
        .collect();
    format!(
        "table ip bench {{
            chain input {{
                type filter hook input priority 0; policy drop;
                {}
                ip saddr 10.9.0.1 udp dport 443 accept
            }}
        }}",
        others.concat()
    )
}

fn run(program: &str, arguments: &[&str], input: &str) -> Result<()> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {program}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("{program} {}: {status}", arguments.join(" "));
    }
    Ok(())
}
