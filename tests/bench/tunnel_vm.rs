//! What our programs cost the kernel's WireGuard, in an emulated machine: bare next to judged.
//!
//! ```text
//!   a ─ mesh0 ─┐            ┌─ mesh0 ─ b
//!              ├─ underlay ─┤
//!   c ─ mesh0 ─┘            └─ mesh0 ─ d
//! ```
//! Two tunnels that are alike. One has our programs on it, and the other in the next turn: `mesh_in` and
//! `mesh_eg` on both mesh devices, the guard on both wires. What is asked for are a few hundredths, and a host
//! that others use is quicker or slower by more than that from one second to the next. So the machine has a
//! clock of its own, [`Clock::Instructions`], and a tunnel is as slow as the instructions that its packets
//! take, by both of its ends on the one processor that there is. How many of them TCP lets travel together
//! still varies from connection to connection, by two hundredths of the ratio: so a round has many of them, of each
//! round the ratio of the means counts, and of all rounds the median.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use mesh_agent::dataplane::{self, Dataplane};
use mesh_agent::wg::{Backend, Choice};
use mesh_core::dataplane::Tables;
use mesh_core::netmap::{Action, Entry, EntryKey, Me, Netmap, NodePolicy, Peer, PortRange};
use mesh_core::node::{Addresses, Epoch, Generation, MeshId, Name, NodeId};
use mesh_core::world::{Mesh, Pools};
use mesh_core::{Direction, Identity, RuleId};
use mesh_tests::vm::plan::Step;
use mesh_tests::vm::{Clock, Guest, Kernel, RELEASE_FOLDER};
use mesh_tests::{Host, Lab, Process};
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;

use crate::tunnel::{INTERFACE, address, iperf, key, ours, server};

/// Throughput of the judged tunnel, in hundredths of the bare one, at least.
const LEAST_THROUGHPUT: f64 = 97.0;
/// Round trip of the judged tunnel, in times the bare one, at most.
const MOST_PING: f64 = 1.05;

/// Opens the line on which the machine gives its figures.
const FIGURES: &str = "figures: ";

#[derive(Debug, Args)]
pub(crate) struct Rounds {
    /// Rounds, each of so many [`TURNS`].
    #[arg(long)]
    rounds: u32,
    /// Bytes of an inner packet.
    #[arg(long)]
    mtu: u32,
}

#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) kernel: String,
    pub(crate) rounds: Rounds,
    pub(crate) json: Option<PathBuf>,
}

impl Rounds {
    pub(crate) fn new(rounds: u32, mtu: u32) -> Self {
        Self { rounds, mtu }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Figure {
    name: String,
    median: f64,
    min: f64,
    unit: String,
    runs: usize,
}

impl Figure {
    fn of(name: &str, unit: &str, mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self {
            name: name.to_owned(),
            median: middle(&values),
            min: values.first().copied().unwrap_or(f64::NAN),
            unit: unit.to_owned(),
            runs: values.len(),
        }
    }
}

/// Of sorted values.
fn middle(values: &[f64]) -> f64 {
    match (values.len() / 2, values.len() % 2) {
        (0, 0) => f64::NAN,
        (half, 0) => f64::midpoint(values[half - 1], values[half]),
        (half, _) => values[half],
    }
}

/// Boots the machine, which runs [`inside`], and judges what it says.
pub(crate) fn outside(options: &Options) -> Result<()> {
    let own = std::env::current_exe().context("find this program")?;
    let release = own.parent().context("a program lies in a folder")?;
    let target = release.parent().context("find the target folder")?;
    let cache = target.join("vm");
    let at = format!("{RELEASE_FOLDER}/mesh-bench");
    let Rounds { rounds, mtu } = options.rounds;
    let numbers = [("--rounds", rounds), ("--mtu", mtu)];
    let numbers = numbers.map(|(name, value)| format!("{name}={value}"));
    let guest = Guest {
        clock: Clock::Instructions,
        steps: vec![Step {
            name: "tunnel".to_owned(),
            command: [at.clone(), "tunnel-inside".to_owned()]
                .into_iter()
                .chain(numbers)
                .collect(),
            environment: BTreeMap::new(),
            // Of which a quiet host takes a tenth.
            limit_seconds: 120 + u64::from(rounds) * 1_200,
        }],
        programs: vec![
            ("/init".to_owned(), release.join("mesh-vm-init")),
            (at, own.clone()),
        ],
        files: Vec::new(),
        object: target.join("ebpf/mesh-ebpf.o"),
    };
    guest.check()?;
    let kernel = Kernel::newest(&options.kernel, &cache)?;
    let mut figures: Vec<Figure> = Vec::new();
    let success = guest.boot(&kernel, &cache, &mut |line| match line
        .strip_prefix(FIGURES)
        .map(serde_json::from_str)
    {
        Some(Ok(told)) => figures = told,
        Some(Err(_)) | None => println!("{} | {line}", options.kernel),
    })?;
    ensure!(success, "the measurement failed inside");
    for figure in &figures {
        let Figure {
            name,
            median,
            min,
            unit,
            runs,
        } = figure;
        println!("{name:>16}: median {median:.3} {unit}, least {min:.3} ({runs} runs)");
    }
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&figures).context("write the figures")?;
        std::fs::write(path, text + "\n").with_context(|| format!("write {}", path.display()))?;
    }
    let median = |name: &str| {
        let figure = figures.iter().find(|figure| figure.name == name);
        figure.map(|figure| figure.median).context("no figures")
    };
    let (throughput, ping) = (median("throughput_ratio")?, median("ping_ratio")?);
    if throughput < LEAST_THROUGHPUT || ping > MOST_PING {
        bail!(
            "throughput is {throughput:.1} % of the bare tunnel ({LEAST_THROUGHPUT} wanted), ping {ping:.3} times ({MOST_PING} wanted)"
        );
    }
    Ok(())
}

/// What is measured of one tunnel in one round.
#[derive(Debug, Clone, Copy, Default)]
struct Measured {
    throughput: f64,
    ping: f64,
}

/// A tunnel: the hosts at its ends.
#[derive(Debug)]
struct Tunnel {
    ends: [(Host, u8); 2],
    _devices: [Backend; 2],
    _server: Process,
}

impl Tunnel {
    fn new(runtime: &Runtime, hosts: [Host; 2], first: u8, mtu: u32) -> Result<Self> {
        let [near, far] = &hosts;
        let devices = [
            ours(runtime, near, far, first, mtu, Choice::Kernel)?,
            ours(runtime, far, near, first + 1, mtu, Choice::Kernel)?,
        ];
        let server = server(far)?;
        let [near, far] = hosts;
        Ok(Self {
            ends: [(near, first), (far, first + 1)],
            _devices: devices,
            _server: server,
        })
    }

    fn near(&self) -> &Host {
        &self.ends[0].0
    }

    fn far_address(&self) -> IpAddr {
        address(self.ends[1].1)
    }
}

/// Runs in the machine.
pub(crate) fn inside(options: &Rounds) -> Result<()> {
    let runtime = Runtime::new()?;
    let lab = Lab::new(&std::env::temp_dir())?;
    let tunnel = |names: [&str; 2], first| {
        let [near, far] = names;
        let hosts = [lab.host(near)?, lab.host(far)?];
        Tunnel::new(&runtime, hosts, first, options.mtu)
    };
    let tunnels = [tunnel(["a", "b"], 1)?, tunnel(["c", "d"], 3)?];
    // Handshake, caches, and the congestion window that the route remembers.
    for judged in 0..tunnels.len() {
        measure(&tunnels, judged)?;
    }
    let (mut bare, mut mesh) = (Vec::new(), Vec::new());
    for number in 0..options.rounds {
        let round = round(&tunnels)?;
        for (name, of) in [("bare", round[0]), ("mesh", round[1])] {
            let Measured { throughput, ping } = of;
            println!("round {number}: {name} {throughput:8.1} Mbit/s, ping {ping:.3} ms");
        }
        bare.push(round[0]);
        mesh.push(round[1]);
    }
    let series = |of: &[Measured], what: fn(&Measured) -> f64| of.iter().map(what).collect();
    let ratio = |what: fn(&Measured) -> f64| {
        let pairs = mesh.iter().zip(&bare);
        pairs.map(|(mesh, bare)| what(mesh) / what(bare)).collect()
    };
    let hundredths = |ratios: Vec<f64>| ratios.into_iter().map(|ratio| ratio * 100.0).collect();
    let figures = [
        Figure::of("tcp_bare", "Mbit/s", series(&bare, |m| m.throughput)),
        Figure::of("tcp_mesh", "Mbit/s", series(&mesh, |m| m.throughput)),
        Figure::of("ping_bare", "ms", series(&bare, |m| m.ping)),
        Figure::of("ping_mesh", "ms", series(&mesh, |m| m.ping)),
        Figure::of("throughput_ratio", "%", hundredths(ratio(|m| m.throughput))),
        Figure::of("ping_ratio", "times", ratio(|m| m.ping)),
    ];
    println!("{FIGURES}{}", serde_json::to_string(&figures)?);
    Ok(())
}

/// The means of many turns, bare and judged.
fn round(tunnels: &[Tunnel; 2]) -> Result<[Measured; 2]> {
    let mut round = [Measured::default(); 2];
    for judged in [0, 1].into_iter().cycle().take(TURNS.into()) {
        let measured = measure(tunnels, judged)?;
        let turn = [measured[1 - judged], measured[judged]];
        for (mean, of) in round.iter_mut().zip(turn) {
            mean.throughput += of.throughput / f64::from(TURNS);
            mean.ping += of.ping / f64::from(TURNS);
        }
    }
    Ok(round)
}

/// Both tunnels, one with our programs on it.
fn measure(tunnels: &[Tunnel; 2], judged: usize) -> Result<[Measured; 2]> {
    let programs: Vec<_> = tunnels[judged]
        .ends
        .iter()
        .map(|(host, number)| Ok((host, attach(host, *number)?)))
        .collect::<Result<_>>()?;
    let mut throughput = [0.0; 2];
    for (tunnel, throughput) in tunnels.iter().zip(&mut throughput) {
        *throughput = iperf(tunnel.near(), tunnel.far_address(), &CONNECTION)?;
    }
    let mut pings = [0.0; 2];
    for (tunnel, ping) in tunnels.iter().zip(&mut pings) {
        *ping = round_trip(tunnel)?;
    }
    for (host, programs) in programs {
        let passed = programs.counters()?.passed;
        for direction in Direction::ALL {
            let judged = passed.get(&direction).map_or(0, |count| count.packets);
            let name = direction.name();
            ensure!(
                judged >= u64::from(PINGS),
                "{name}: {judged} packets judged"
            );
        }
        host.inside(|| programs.detach())??;
    }
    Ok([0, 1].map(|of| Measured {
        throughput: throughput[of],
        ping: pings[of],
    }))
}

/// In a round, half of them with one tunnel judged and half with the other.
const TURNS: u8 = 16;

/// What a connection carries, and what its sockets buffer. With as much as TCP wants, queues on the way overflow, some
/// fifty segments of a connection are sent again, and how long that takes is what makes one quicker than the next;
/// with this none is.
const CONNECTION: [&str; 4] = ["--bytes", "10M", "--window", "256K"];

/// How many echo requests make one median.
const PINGS: u32 = 100;

/// The median round trip, in milliseconds.
fn round_trip(tunnel: &Tunnel) -> Result<f64> {
    let to = tunnel.far_address().to_string();
    let count = PINGS.to_string();
    let text = tunnel
        .near()
        .run("ping", &["-c", &count, "-i", "0.01", &to])?;
    let mut times: Vec<f64> = text
        .lines()
        .filter_map(|line| line.split_once("time=")?.1.split(' ').next()?.parse().ok())
        .collect();
    ensure!(!times.is_empty(), "no answer to a ping: {text}");
    times.sort_by(f64::total_cmp);
    Ok(middle(&times))
}

/// Every program that an agent hangs on a host, with a policy that lets the peer do all.
fn attach(host: &Host, number: u8) -> Result<Dataplane> {
    let options = dataplane::Options {
        pin_dir: host.path("/sys/fs/bpf/mesh-agent"),
        object_path: std::env::var_os("MESH_EBPF_OBJECT").map(PathBuf::from),
        ..dataplane::Options::default()
    };
    let tables = Tables::of(&netmap(number), mesh_core::desired::MTU);
    host.inside(|| {
        let mut programs = Dataplane::attach(INTERFACE, &options)?;
        programs.apply(&tables)?;
        programs.guard(["eth0"])?;
        Ok(programs)
    })?
}

fn netmap(number: u8) -> Netmap {
    let other = crate::tunnel::other(number);
    let (own, far) = (Identity(16), Identity(17));
    let addresses = |number: u8| Addresses {
        v4: [100, 64, 0, number].into(),
        v6: [0xfd00, 0, 0, 0, 0, 0, 0, u16::from(number)].into(),
    };
    let name = |number: u8| Name::parse(&format!("n{number}")).expect("a letter and a digit");
    let entries = Direction::ALL.map(|direction| {
        let key = EntryKey {
            remote: far,
            local: own,
            direction,
            proto: None,
            ports: PortRange::ALL,
        };
        let entry = Entry {
            action: Action::Accept,
            rule: RuleId(1),
        };
        (key, entry)
    });
    let identities = [(number, own), (other, far)];
    let identities = identities
        .into_iter()
        .flat_map(|(number, identity)| addresses(number).prefixes().map(|net| (net, identity)));
    let peer = Peer {
        id: NodeId(other.into()),
        name: name(other),
        key: key(other).public(),
        addresses: addresses(other),
        endpoints: BTreeSet::new(),
        routes: BTreeSet::new(),
        tags: BTreeSet::new(),
        user: None,
    };
    Netmap {
        mesh: Mesh {
            id: MeshId([7; 16]),
            domain: "mesh.internal".into(),
            pools: Pools {
                v4: Pools::default_v4(),
                v6: Pools::ula([0; 5]),
            },
        },
        epoch: Epoch(1),
        generation: Generation(1),
        me: Me {
            id: NodeId(number.into()),
            name: name(number),
            key: key(number).public(),
            addresses: addresses(number),
            tags: BTreeSet::new(),
            user: None,
            expires: None,
            expired: false,
        },
        peers: [(peer.id, peer)].into(),
        policy: NodePolicy {
            identities: identities.collect(),
            entries: entries.into(),
            rules: BTreeMap::new(),
        },
    }
}
