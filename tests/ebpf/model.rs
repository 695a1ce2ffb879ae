//! Random policies, edits, times and packets: kernel, software and oracle say the same.

use std::collections::BTreeMap;

use mesh_agent::dataplane::software::{Engine, SHARE};
use mesh_core::Direction;
use mesh_core::dataplane::Tables;
use mesh_core::desired::MTU;
use mesh_core::netmap::Netmap;

use crate::kernel::{self, Kernel, SHORTEST};
use crate::oracle::{Oracle, Outcome, Strain};
use crate::packet::{Body, Packet};
use crate::random::{self, Random};

const PACKETS: u64 = 100_000;

/// What must have become of some packet, or the history was too tame.
const ENDS: [&str; 14] = [
    "passed",
    "revoked",
    "no rule",
    "denied by rule",
    "no flow",
    "tcp out of state",
    "fragment without first",
    "icmp error without flow",
    "icmp error from a third node",
    "icmp error rate",
    "own address",
    "multicast",
    "routing header",
    "tiny fragment",
];

/// `MESH_TEST_SEED`, or the time: a failure prints which.
fn seed() -> u64 {
    let given = std::env::var("MESH_TEST_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or_else(|| {
        let since = std::time::SystemTime::UNIX_EPOCH
            .elapsed()
            .unwrap_or_default();
        since.as_nanos() as u64
    });
    println!("MESH_TEST_SEED={seed}");
    seed
}

fn load(oracle: &mut Oracle, netmap: &Netmap) -> Tables {
    let own = netmap.me.addresses.each().to_vec();
    oracle.load(netmap.policy.clone(), own, random::senders(netmap));
    Tables::of(netmap, MTU)
}

/// Plays one long history, asking `judge` beside the oracle. Returns how often each end was met.
fn play(seed: u64, packets: u64, judge: &mut impl Judge) -> BTreeMap<&'static str, u64> {
    let mut random = Random(seed);
    let mut tally = BTreeMap::new();
    let mut oracle = Oracle::default();
    let mut earlier: Vec<Packet> = Vec::new();
    // Fewer where each takes longer, but as many as it takes to have met every end.
    let enough = mesh_tests::rounds(packets);
    for step in 0..packets {
        if step >= enough && ENDS.iter().all(|end| tally.contains_key(end)) {
            break;
        }
        if step == 20 || (step > 20 && random.one_in(60)) {
            let netmap = random::netmap(&mut random);
            judge.load(&load(&mut oracle, &netmap));
        }
        if random.one_in(25) {
            let seconds = random.pick(&[1, 11, 21, 31, 121, 9_000]);
            if !oracle.is_on_edge(seconds) {
                oracle.seconds += seconds;
                judge.wait(seconds);
            }
        }
        if random.one_in(enough / 6) {
            judge.restart();
        }
        if random.one_in(100) {
            oracle.is_new_here = random.one_in(3);
            judge.pick_up(oracle.is_new_here);
        }
        if random.one_in(40) {
            let whom = (2 + random.below(4) as u32, random.pick(&Direction::ALL));
            if oracle.strains.remove(&whom).is_some() {
                judge.strain(whom, None);
            } else {
                // One strain of a peer at a time: they are written together.
                let other = (whom.0, whom.1.reverse());
                oracle.strains.remove(&other);
                oracle.strains.insert(whom, random.pick(&STRAINS));
            }
        }
        // Tokens come back while a test runs.
        for (whom, strain) in &oracle.strains {
            judge.strain(*whom, Some(*strain));
        }
        let packet = random::packet(&mut random, &earlier);
        let expected = oracle.judge(&packet);
        let told = judge.judge(&packet, expected);
        assert_eq!(
            told, expected,
            "MESH_TEST_SEED={seed}, packet {step}: {packet:#?}",
        );
        *tally.entry(expected.err().unwrap_or("passed")).or_default() += 1;
        earlier.push(packet);
        if earlier.len() > 12 {
            earlier.remove(0);
        }
    }
    tally
}

const STRAINS: [Strain; 4] = [Strain::Low, Strain::Empty, Strain::Share, Strain::Errors];

trait Judge {
    fn load(&mut self, tables: &Tables);
    fn wait(&mut self, seconds: u64);
    fn restart(&mut self);
    fn pick_up(&mut self, picks_up: bool);
    fn strain(&mut self, whom: (u32, Direction), strain: Option<Strain>);
    /// What happens to the packet; `expected` tells where to look for the reason.
    fn judge(&mut self, packet: &Packet, expected: Outcome) -> Outcome;
}

impl Judge for Kernel {
    fn load(&mut self, tables: &Tables) {
        self.apply(tables);
    }

    fn wait(&mut self, seconds: u64) {
        self.age(seconds);
    }

    fn restart(&mut self) {
        self.kill();
        self.start();
    }

    fn pick_up(&mut self, picks_up: bool) {
        Self::pick_up(self, picks_up);
    }

    fn strain(&mut self, (peer, opened): (u32, Direction), strain: Option<Strain>) {
        Self::strain(self, peer, opened, strain);
    }

    fn judge(&mut self, packet: &Packet, expected: Outcome) -> Outcome {
        if self.runner().passes(packet.direction, &packet.bytes()) {
            return Ok(());
        }
        match expected {
            Err(reason) if self.is_counted(packet.direction, reason) => Err(reason),
            _ => Err("dropped, and counted as something else"),
        }
    }
}

#[derive(Default)]
struct Software {
    engine: Engine,
    now: u64,
}

impl Judge for Software {
    fn load(&mut self, tables: &Tables) {
        self.engine.apply(tables);
    }

    fn wait(&mut self, seconds: u64) {
        self.now += seconds * 1_000_000_000;
    }

    fn restart(&mut self) {}

    fn pick_up(&mut self, picks_up: bool) {
        self.engine.pickup_until = if picks_up { u64::MAX / 2 } else { 0 };
    }

    fn strain(&mut self, (peer, opened): (u32, Direction), strain: Option<Strain>) {
        let load = kernel::load(opened, strain, self.now, SHARE.cast_unsigned());
        *self.engine.load(peer) = load;
    }

    fn judge(&mut self, packet: &Packet, _: Outcome) -> Outcome {
        let mut bytes = packet.bytes();
        let verdict = self.engine.judge(packet.direction, &mut bytes, self.now);
        match verdict.drop {
            None => Ok(()),
            Some(reason) => Err(reason.name()),
        }
    }
}

#[test]
fn the_kernel_judges_as_the_oracle() {
    let begun = std::time::Instant::now();
    let tally = play(seed(), PACKETS, &mut Kernel::for_traffic());
    let packets: u64 = tally.values().sum();
    println!("{packets} packets in {:?}: {tally:#?}", begun.elapsed());
    for end in ENDS {
        assert!(tally.contains_key(end), "no packet met {end:?}: {tally:#?}");
    }
}

#[test]
fn the_software_judges_as_the_oracle() {
    play(seed(), PACKETS / 3, &mut Software::default());
}

#[test]
fn a_packet_cut_anywhere_is_judged_whole_or_not_at_all() {
    let mut random = Random(seed());
    let mut kernel = Kernel::for_traffic();
    let netmap = random::netmap(&mut random);
    let mut oracle = Oracle::default();
    let tables = load(&mut oracle, &netmap);
    kernel.apply(&tables);
    let mut engine = Engine::default();
    engine.apply(&tables);
    for _ in 0..60 {
        let packet = random::packet(&mut random, &[]);
        let whole = packet.bytes();
        for cut in 0..whole.len() {
            let mut bytes = whole[..cut].to_vec();
            let verdict = engine.judge(packet.direction, &mut bytes, 0);
            if cut < needed(&packet) {
                assert!(!verdict.passes(), "{cut} bytes of {packet:#?}");
            }
            if cut >= SHORTEST {
                let (passes, _) = kernel.run(packet.direction, &whole[..cut]);
                assert_eq!(passes, verdict.passes(), "{cut} bytes of {packet:#?}");
            }
        }
    }
}

/// Without so many bytes nobody can say what a packet is.
fn needed(packet: &Packet) -> usize {
    let body = match packet.body {
        _ if packet.is_later_fragment() => 0,
        Body::Tcp { .. } => 14,
        Body::Other(_) => 0,
        _ => 8,
    };
    packet.header() + body
}
