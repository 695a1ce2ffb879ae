//! How fast the userspace tunnel is, next to wireguard-go on the same machine in the same minute.
//!
//! ```text
//!   a ─ mesh0 ─┐            ┌─ mesh0 ─ b      ours
//!              ├─ underlay ─┤
//!   c ─ mesh0 ─┘            └─ mesh0 ─ d      wireguard-go
//! ```
//! Rounds alternate between the two, and the best of each counts: on a machine that others use,
//! the slow rounds measure the others. Needs root, iperf3, wireguard-go and wireguard-tools.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use mesh_agent::net::Net;
use mesh_agent::wg::{Backend, Choice, OpenOptions};
use mesh_core::key::NodeKey;
use mesh_core::routes::{self, FWMARK, TABLE};
use mesh_core::wireguard::{DeviceConfig, PeerConfig, reconcile};
use mesh_tests::{Host, Lab, Process, User};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::tunnel_vm;

pub(crate) const INTERFACE: &str = "mesh0";
const PORT: u16 = 51820;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Seconds of one measurement.
    #[arg(long, default_value_t = 4, conflicts_with = "vm")]
    seconds: u32,
    /// Rounds, 3 if not said, of which the best counts; with --vm 5, of which the median counts
    #[arg(long)]
    rounds: Option<u32>,
    /// Bytes of an inner packet.
    #[arg(long, default_value_t = 1280)]
    mtu: u32,
    /// Leaves wireguard-go out.
    #[arg(long)]
    alone: bool,
    /// The kernel's tunnel in an emulated machine, bare and with our programs on it.
    #[arg(long, conflicts_with = "alone")]
    vm: bool,
    /// Series of the machine's kernel.
    #[arg(long, requires = "vm", default_value = "6.12")]
    kernel: String,
    /// Also writes the figures there, as an array.
    #[arg(long)]
    json: Option<std::path::PathBuf>,
}

/// What is measured: its name and what iperf3 is told.
const LOADS: [(&str, &[&str]); 3] = [
    ("tcp", &[]),
    ("tcp_4_streams", &["--parallel", "4"]),
    ("tcp_both_ways", &["--bidir"]),
];

pub(crate) fn run(options: Options) -> Result<()> {
    if options.vm {
        let rounds = options.rounds.unwrap_or(5);
        return tunnel_vm::outside(&tunnel_vm::Options {
            kernel: options.kernel,
            rounds: tunnel_vm::Rounds::new(rounds, options.mtu),
            json: options.json,
        });
    }
    let seconds = options.seconds.to_string();
    let rounds = options.rounds.unwrap_or(3);
    let runtime = Runtime::new()?;
    let lab = Lab::new(&std::env::temp_dir())?;
    let hosts: Vec<Host> = ["a", "b", "c", "d"]
        .into_iter()
        .map(|name| lab.host(name))
        .collect::<Result<_>>()?;
    let choice = Choice::Userspace;
    let _ours = [
        ours(&runtime, &hosts[0], &hosts[1], 1, options.mtu, choice)?,
        ours(&runtime, &hosts[1], &hosts[0], 2, options.mtu, choice)?,
    ];
    let mut systems = vec![("ours", &hosts[0], &hosts[1], address(2))];
    let mut processes = vec![server(&hosts[1])?];
    if !options.alone {
        processes.push(wireguard_go(&hosts[2], &hosts[3], 3, options.mtu)?);
        processes.push(wireguard_go(&hosts[3], &hosts[2], 4, options.mtu)?);
        processes.push(server(&hosts[3])?);
        systems.push(("wireguard_go", &hosts[2], &hosts[3], address(4)));
    }

    let mut best: BTreeMap<String, f64> = BTreeMap::new();
    for _ in 0..rounds {
        for (load, arguments) in LOADS {
            for (system, from, _, to) in &systems {
                let arguments = [&["--time", &seconds], arguments].concat();
                let rate = iperf(from, *to, &arguments)
                    .with_context(|| format!("{load} through {system}"))?;
                println!("{load:>14} {system:>13} {rate:8.0} Mbit/s");
                let entry = best.entry(format!("{load}_{system}")).or_default();
                *entry = entry.max(rate);
            }
        }
    }
    println!("best of {rounds}:");
    let mut figures = Vec::new();
    for (name, rate) in &best {
        println!("{name:>28} {rate:8.0} Mbit/s");
        figures.push(json!({"name": name, "value": rate.round(), "unit": "Mbit/s"}));
    }
    if let Some(path) = options.json {
        std::fs::write(&path, Value::from(figures).to_string())
            .with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

pub(crate) fn address(number: u8) -> IpAddr {
    Ipv4Addr::new(100, 64, 0, number).into()
}

pub(crate) fn key(number: u8) -> NodeKey {
    NodeKey::from_seed([number; 32])
}

/// The number of the other end of a pair.
pub(crate) fn other(number: u8) -> u8 {
    if number % 2 == 1 {
        number + 1
    } else {
        number - 1
    }
}

/// A device of ours, up, with the other one of its pair as its peer.
pub(crate) fn ours(
    runtime: &Runtime,
    host: &Host,
    peer: &Host,
    number: u8,
    mtu: u32,
    choice: Choice,
) -> Result<Backend> {
    let options = OpenOptions {
        name: INTERFACE.to_owned(),
        mtu,
        fwmark: FWMARK,
        filter: None,
        uapi_dir: None,
    };
    let peer = PeerConfig {
        endpoint: Some((peer.v4(), PORT).into()),
        allowed_ips: [address(other(number)).into()].into(),
        keepalive: None,
    };
    let config = DeviceConfig {
        key: key(number),
        listen_port: PORT,
        fwmark: FWMARK,
        peers: [(key(other(number)).public(), peer)].into(),
    };
    let routes = routes::Config {
        addresses: [address(number).into()].into(),
        mtu,
        up: true,
        routes: ["100.64.0.0/10".parse()?].into(),
        only_mesh: std::collections::BTreeSet::new(),
        table: TABLE,
    };
    host.inside(|| {
        runtime.block_on(async {
            let backend = Backend::open(choice, &options).await?;
            let ops = reconcile(&config, &backend.status().await?);
            backend.apply(&ops).await?;
            let net = Net::new().await?;
            net.apply(&backend.interface(), &routes).await?;
            Ok(backend)
        })
    })?
}

fn wireguard_go(host: &Host, peer: &Host, number: u8, mtu: u32) -> Result<Process> {
    let mut command = host.command(User::Root, "wireguard-go");
    command.args(["--foreground", INTERFACE]);
    let process = host.spawn("wireguard-go", command)?;
    let socket = host.path(&format!("/run/wireguard/{INTERFACE}.sock"));
    mesh_tests::until("wireguard-go", Duration::from_secs(10), || socket.exists())?;
    let file = host.folder().join("key");
    // Keys are written alike, be they public or not.
    let private = mesh_core::key::NodePublic(*key(number).expose());
    std::fs::write(&file, private.to_string())?;
    let file = file.to_str().context("a folder with a plain name")?;
    let port = PORT.to_string();
    host.run(
        "wg",
        &["set", INTERFACE, "listen-port", &port, "private-key", file],
    )?;
    let public = key(other(number)).public().to_string();
    let allowed = format!("{}/32", address(other(number)));
    let endpoint = format!("{}:{PORT}", peer.v4());
    let peer = [
        "peer",
        &public,
        "allowed-ips",
        &allowed,
        "endpoint",
        &endpoint,
    ];
    host.run("wg", &[&["set", INTERFACE][..], &peer].concat())?;
    let own = format!("{}/10", address(number));
    host.run("ip", &["addr", "add", &own, "dev", INTERFACE])?;
    let mtu = mtu.to_string();
    host.run("ip", &["link", "set", INTERFACE, "mtu", &mtu, "up"])?;
    Ok(process)
}

pub(crate) fn server(host: &Host) -> Result<Process> {
    let mut command = host.command(User::Root, "iperf3");
    command.arg("--server");
    host.spawn("iperf3", command)
}

/// Megabits a second of payload that arrived, both directions together.
pub(crate) fn iperf(from: &Host, to: IpAddr, arguments: &[&str]) -> Result<f64> {
    let to = to.to_string();
    let common = ["--json", "--client", &to];
    let report = from.run("iperf3", &[&common[..], arguments].concat())?;
    let report: Value = serde_json::from_str(&report).context("read iperf3's report")?;
    let end = &report["end"];
    let ways = ["sum_received", "sum_received_bidir_reverse"];
    let bits: f64 = ways
        .iter()
        .filter_map(|way| end[way]["bits_per_second"].as_f64())
        .sum();
    Ok(bits / 1e6)
}
