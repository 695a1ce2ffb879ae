//! The programs alone, by BPF_PROG_TEST_RUN.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use aya::maps::Array;
use mesh_agent::dataplane::Only;
use mesh_common::addr::Prefix;
use mesh_common::flow::{FlowEntry, FlowKey, FlowState, flags};
use mesh_common::policy::PolicyPrefix;
use mesh_common::{
    Address, Be16, Direction, Identity, IdentityEntry, PolicyEntry, PolicyKey, RuleId,
};
use mesh_core::dataplane::{Settings, Tables};
use mesh_core::desired::MTU;
use mesh_core::node::Addresses;
use mesh_core::world::Pools;

use super::Row;
use super::setup::Bench;

const ME: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 1);
const ME_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
const PEER_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
/// The first of the peers' addresses, as `mesh-ebpf/src/bench.rs` counts them.
const FIRST: u32 = 0x6440_1000;
const PORT: u16 = 1_000;
const TCP: u8 = 6;
const NEXT: i32 = -1;
const DROP: i32 = 2;

const SYN: u8 = 2;
const SYN_ACK: u8 = 18;
const ACK: u8 = 16;

pub(super) fn measure(runs: usize) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut small = Bench::load("lo", None)?;
    established(&mut small, runs, &mut rows)?;
    random_established(&mut small, runs, &mut rows)?;
    new(&mut small, runs, &mut rows)?;
    let mut large = Bench::load("lo", None)?;
    by_size(&mut small, &mut large, runs, &mut rows)?;
    drop(large);
    swap(&mut small, runs.min(3), &mut rows)?;
    Ok(rows)
}

/// Peers, each with an address; identities that they share evenly; and allowed ports of each, from
/// [`PORT`].
#[derive(Clone, Copy)]
struct World {
    peers: u32,
    identities: u32,
    ports: u16,
    first_port: u16,
}

const ONE: World = World {
    peers: 1,
    identities: 1,
    ports: 1,
    first_port: PORT,
};

fn tables(world: World) -> Tables {
    let host = |address: IpAddr| Prefix {
        len: 128,
        address: address.into(),
    };
    let own = IdentityEntry {
        identity: Identity(16),
        flags: IdentityEntry::LOCAL,
        peer: 0,
    };
    let peer = |index: u32| IdentityEntry {
        identity: Identity(17 + index % world.identities),
        flags: 0,
        peer: 2 + index,
    };
    let own_addresses = Addresses { v4: ME, v6: ME_V6 };
    let pools = Pools {
        v4: Pools::default_v4(),
        v6: Pools::ula([0; 5]),
    };
    let mut tables = Tables {
        settings: Settings::new(own_addresses, &pools, MTU),
        ..Tables::default()
    };
    tables.identities.insert(host(ME.into()), own);
    tables.identities.insert(host(ME_V6.into()), own);
    tables.identities.insert(host(PEER_V6.into()), peer(0));
    for index in 0..world.peers {
        let address = Ipv4Addr::from(FIRST + index);
        tables.identities.insert(host(address.into()), peer(index));
    }
    for identity in 0..world.identities {
        for port in 0..world.ports {
            let port = world.first_port + port;
            let key = PolicyKey::new(
                Identity(17 + identity),
                Identity(16),
                Direction::Ingress,
                TCP,
                port,
            );
            let rule = RuleId(1 + identity % 1_000);
            let row = PolicyPrefix {
                len: PolicyPrefix::EXACT,
                key,
            };
            tables.rows.insert(row, PolicyEntry::accept(rule));
            tables.rules.insert(rule);
        }
    }
    tables
}

fn tcp(source: IpAddr, destination: IpAddr, ports: [u16; 2], flags: u8) -> Vec<u8> {
    let mut packet = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut ip = vec![0; 20];
            ip[0] = 0x45;
            ip[9] = TCP;
            ip[12..16].copy_from_slice(&source.octets());
            ip[16..20].copy_from_slice(&destination.octets());
            ip
        }
        _ => {
            let octets = |address: IpAddr| Address::from(address).octets();
            let mut ip = vec![0x60, 0, 0, 0, 0, 24, TCP, 64];
            ip.extend(octets(source));
            ip.extend(octets(destination));
            ip
        }
    };
    packet.extend(ports[0].to_be_bytes());
    packet.extend(ports[1].to_be_bytes());
    packet.extend([0; 8]);
    // With the option of a maximal segment size, as every SYN has it.
    packet.extend([6 << 4, flags, 0, 0, 0, 0, 0, 0, 2, 4, 0x05, 0xb4]);
    packet
}

/// Nanoseconds net of the other program's, of so many runs.
fn net(
    bench: &Bench,
    name: &'static str,
    program: &str,
    empty: &str,
    packet: &[u8],
    (runs, repeat): (usize, u32),
) -> Result<Row> {
    bench.time(program, packet, repeat)?;
    let runs: Result<Vec<f64>> = (0..runs)
        .map(|_| Ok(bench.time(program, packet, repeat)? - bench.time(empty, packet, repeat)?))
        .collect();
    Ok(Row::new(name, "ns", runs?))
}

fn established(bench: &mut Bench, runs: usize, rows: &mut Vec<Row>) -> Result<()> {
    bench.dataplane.apply(&tables(ONE))?;
    let peer = IpAddr::from(Ipv4Addr::from(FIRST));
    for (name, me, peer) in [
        ("established_v4", ME.into(), peer),
        ("established_v6", ME_V6.into(), PEER_V6.into()),
    ] {
        let from_peer = |flags| tcp(peer, me, [40_000, PORT], flags);
        let packet = from_peer(ACK);
        if rows.is_empty() {
            rows.push(net(
                bench,
                "parse",
                "parse",
                "empty",
                &packet,
                (runs, 200_000),
            )?);
        }
        let answer = tcp(me, peer, [PORT, 40_000], SYN_ACK);
        ensure!(
            bench.verdict("mesh_in", &from_peer(SYN))? == NEXT,
            "a SYN is dropped"
        );
        ensure!(
            bench.verdict("mesh_eg", &answer)? == NEXT,
            "a SYN-ACK is dropped"
        );
        ensure!(
            bench.verdict("mesh_in", &packet)? == NEXT,
            "an ACK is dropped"
        );
        rows.push(net(
            bench,
            name,
            "mesh_in",
            "empty",
            &packet,
            (runs, 200_000),
        )?);
    }
    Ok(())
}

const FLOWS: u32 = 200_000;

fn random_established(bench: &mut Bench, runs: usize, rows: &mut Vec<Row>) -> Result<()> {
    let world = World {
        peers: 4_000,
        identities: 10,
        ..ONE
    };
    bench.dataplane.apply(&tables(world))?;
    let generation = bench.dataplane.kernel().generation();
    let flows = bench.dataplane.kernel().established();
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    for index in 0..FLOWS {
        let key = FlowKey {
            remote: IpAddr::from(Ipv4Addr::from(FIRST + index % world.peers)).into(),
            local: IpAddr::from(ME).into(),
            remote_port: Be16::new(u16::try_from(1_024 + index / world.peers)?),
            local_port: Be16::new(PORT),
            proto: TCP,
            ..FlowKey::NONE
        };
        let state = FlowState {
            last_seen: now.tv_sec.cast_unsigned() * 1_000_000_000,
            generation,
            flags: flags::REPLIED | flags::CONFIRMED,
            peer: 2 + index % world.peers,
            ..FlowState::default()
        };
        let entry = FlowEntry {
            state,
            ..FlowEntry::default()
        };
        flows.put(key, entry, Only::New)?;
    }
    spread(bench, [world.peers, FLOWS, 1])?;
    let packet = tcp(Ipv4Addr::from(FIRST).into(), ME.into(), [1_024, PORT], ACK);
    let before = passed_in(bench)?;
    let row = net(
        bench,
        "established_random_200k",
        "varied_in",
        "vary",
        &packet,
        (runs, FLOWS),
    )?;
    let expected = (runs as u64 + 1) * u64::from(FLOWS);
    ensure!(
        passed_in(bench)? - before == expected,
        "some of the flows were not known"
    );
    rows.push(row);
    let flows = bench.dataplane.kernel().established();
    for (key, _) in flows.flows()? {
        flows.remove(&key)?;
    }
    Ok(())
}

/// What is allowed is another flow each time, and so takes turns among peers, none of which has tokens
/// for many. What is denied is the same packet each time in `new_denied`, as when somebody tries again and
/// again; and in `new_denied_random` another peer, port and service each time, more kinds than are
/// counted apart, as when many scan.
fn new(bench: &mut Bench, runs: usize, rows: &mut Vec<Row>) -> Result<()> {
    let world = World { peers: 128, ..ONE };
    let me = ME.into();
    let syn = |port| tcp(Ipv4Addr::from(FIRST).into(), me, [1_024, port], SYN);
    bench.dataplane.apply(&tables(world))?;
    spread(bench, [world.peers, 0, 1])?;
    let packet = syn(PORT);
    ensure!(
        bench.verdict("varied_in", &packet)? == NEXT,
        "a SYN is dropped"
    );
    let times = (runs, 10_000);
    let before = opened(bench)?;
    rows.push(net(
        bench,
        "new_allowed",
        "varied_in",
        "vary",
        &packet,
        times,
    )?);
    nearly_all(opened(bench)? - before, (runs as u64 + 1) * 10_000)?;
    let packet = syn(2_000);
    ensure!(bench.verdict("mesh_in", &packet)? == DROP, "a SYN passes");
    rows.push(net(
        bench,
        "new_denied",
        "mesh_in",
        "empty",
        &packet,
        (runs, 50_000),
    )?);
    let elsewhere = World {
        first_port: 30_000,
        ..world
    };
    bench.dataplane.apply(&tables(elsewhere))?;
    spread(bench, [world.peers, 0, 1_000])?;
    ensure!(bench.verdict("varied_in", &packet)? == DROP, "a SYN passes");
    rows.push(net(
        bench,
        "new_denied_random",
        "varied_in",
        "vary",
        &packet,
        times,
    )?);
    Ok(())
}

/// In turns, as what is asked is their ratio.
fn by_size(small: &mut Bench, large: &mut Bench, runs: usize, rows: &mut Vec<Row>) -> Result<()> {
    let few = World {
        peers: 4_000,
        identities: 10,
        ..ONE
    };
    let many = World {
        identities: 4_000,
        ports: 25,
        ..few
    };
    small.dataplane.apply(&tables(few))?;
    large.dataplane.apply(&tables(many))?;
    spread(small, [few.peers, 0, few.ports.into()])?;
    spread(large, [many.peers, 0, many.ports.into()])?;
    let packet = tcp(Ipv4Addr::from(FIRST).into(), ME.into(), [1_024, PORT], SYN);
    let (mut of_few, mut of_many) = (Vec::new(), Vec::new());
    let before = [opened(small)?, opened(large)?];
    for _ in 0..runs {
        for (bench, times) in [(&*small, &mut of_few), (&*large, &mut of_many)] {
            let time = bench.time("varied_in", &packet, 20_000)?;
            times.push(time - bench.time("vary", &packet, 20_000)?);
        }
    }
    for (bench, before) in [(small, before[0]), (large, before[1])] {
        nearly_all(opened(bench)? - before, runs as u64 * 20_000)?;
    }
    rows.push(Row::new("policy_10", "ns", of_few));
    rows.push(Row::new("policy_100000", "ns", of_many));
    Ok(())
}

/// From one policy of 10,000 rows to another that has no row in common with it: until it is in force, and
/// until the other copy is ready for the next, which nobody waits for.
fn swap(bench: &mut Bench, runs: usize, rows: &mut Vec<Row>) -> Result<()> {
    let one = World {
        peers: 400,
        identities: 400,
        ports: 25,
        first_port: PORT,
    };
    let other = World {
        first_port: 2_000,
        ..one
    };
    let (one, other) = (tables(one), tables(other));
    bench.dataplane.apply(&one)?;
    let (mut in_force, mut ready) = (Vec::new(), Vec::new());
    for run in 0..runs {
        let next = if run % 2 == 0 { &other } else { &one };
        let begun = Instant::now();
        bench.dataplane.apply(next)?;
        in_force.push(begun.elapsed().as_secs_f64() * 1e3);
        bench.dataplane.catch_up()?;
        ready.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    rows.push(Row::new("swap_10000", "ms", in_force));
    rows.push(Row::new("swap_10000_ready", "ms", ready));
    Ok(())
}

fn passed_in(bench: &Bench) -> Result<u64> {
    let counters = bench.dataplane.counters()?;
    Ok(counters.passed[&Direction::Ingress].packets)
}

/// Flows that any rule has admitted, and the tables remember.
fn opened(bench: &Bench) -> Result<u64> {
    let rules = bench.dataplane.counters()?.rules;
    Ok(rules.values().map(|count| count.packets).sum())
}

/// Some random flows are drawn twice, and are remembered already.
fn nearly_all(opened: u64, packets: u64) -> Result<()> {
    ensure!(
        opened * 100 >= packets * 98,
        "of {packets} new flows only {opened} were remembered"
    );
    Ok(())
}

fn spread(bench: &mut Bench, values: [u32; 3]) -> Result<()> {
    let map = bench.dataplane.object().map_mut("spread");
    let mut spread: Array<_, u32> = map.context("the bench object")?.try_into()?;
    for (slot, value) in (0..).zip(values) {
        spread.set(slot, value, 0)?;
    }
    Ok(())
}
