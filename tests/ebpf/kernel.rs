//! The programs, loaded as the agent loads them, on the loopback of an empty network namespace.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use aya::maps::{Array, Map, MapData, PerCpuArray, PerCpuValues, RingBuf};
use aya::programs::SchedClassifier;
use aya::{TestRun, TestRunOptions};
use mesh_agent::dataplane::{Dataplane, EventKind, FlowEvent, Options, half_open_flows};
use mesh_common::DropReason;
use mesh_common::budget::{Bucket, PeerFreed, PeerLoad, Rate};
use mesh_common::event::{DenyEntry, DenyKey};
use mesh_common::flow::{FlowEntry, FlowKey, FragmentEntry, FragmentKey, Stage};
use mesh_common::half_open::{SETS, Set};
use mesh_common::maps::{self, Config, Count};
use mesh_common::place::Place;
use mesh_core::Direction;
use mesh_core::dataplane::Tables;

use crate::oracle::{Outcome, Strain};
use crate::scratch::Bpffs;

/// TEST_RUN refuses shorter packets.
pub(crate) const SHORTEST: usize = 14;

/// TCX_NEXT and TC_ACT_SHOT.
const NEXT: u32 = u32::MAX;
const DROP: u32 = 2;

pub(crate) struct Kernel {
    pub(crate) bpffs: Bpffs,
    pub(crate) dataplane: Option<Dataplane>,
    /// Whether running connections are taken up: the agent's own minute would end within a test.
    pub(crate) picks_up: bool,
    flow_capacity: Option<u32>,
    half_open_sets: Option<u32>,
    /// What [`Kernel::is_counted`] has seen.
    counted: HashMap<u32, u64>,
    reasons: Option<PerCpuArray<MapData, Count>>,
    loads: Option<Table<u32, PeerLoad>>,
}

/// A flow as a table holds it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Remembered {
    pub(crate) stage: Stage,
    pub(crate) key: FlowKey,
    pub(crate) entry: FlowEntry,
}

/// Sets of half-open flows.
const FEW: Option<u32> = Some(512);

pub(crate) type Table<K, V> = aya::maps::HashMap<MapData, K, V>;

impl Kernel {
    pub(crate) fn new() -> Self {
        Self::of(None, FEW)
    }

    /// With room for a thousand half-open flows: that eight of them meet in one set is one in ten thousand runs.
    pub(crate) fn for_traffic() -> Self {
        Self::of(None, Some(SETS / 2))
    }

    /// With as many half-open flows as the agent has room for, which takes long to look through.
    pub(crate) fn for_floods(capacity: u32) -> Self {
        Self::of(Some(capacity), None)
    }

    /// With room for so many established flows.
    pub(crate) fn with_flows(capacity: u32) -> Self {
        Self::of(Some(capacity), FEW)
    }

    fn of(flow_capacity: Option<u32>, half_open_sets: Option<u32>) -> Self {
        own_network();
        let bpffs = Bpffs::mount().unwrap_or_else(|error| panic!("{error:#}"));
        let mut kernel = Self {
            bpffs,
            dataplane: None,
            picks_up: false,
            flow_capacity,
            half_open_sets,
            counted: HashMap::new(),
            reasons: None,
            loads: None,
        };
        kernel.start();
        kernel
    }

    pub(crate) fn options(&self) -> Options {
        Options {
            flow_capacity: self.flow_capacity,
            half_open_sets: self.half_open_sets,
            ..options(&self.bpffs)
        }
    }

    /// An agent starts, and adopts what the last one left.
    pub(crate) fn start(&mut self) {
        let dataplane = Dataplane::attach("lo", &self.options()).unwrap_or_else(|error| {
            panic!(
                "{:#}: `cargo xtask test ebpf` builds what is missing",
                anyhow::Error::new(error)
            )
        });
        self.dataplane = Some(dataplane);
        let data = MapData::from_pin(self.pin(maps::REASON_CTR)).unwrap();
        self.reasons = Some(Map::PerCpuArray(data).try_into().unwrap());
        self.loads = Some(self.pinned(maps::PEER_LOAD));
    }

    /// The agent dies; what is pinned stays.
    pub(crate) fn kill(&mut self) {
        self.dataplane = None;
    }

    pub(crate) fn dataplane(&mut self) -> &mut Dataplane {
        self.dataplane.as_mut().expect("started")
    }

    pub(crate) fn apply(&mut self, tables: &Tables) {
        self.dataplane()
            .apply(tables)
            .unwrap_or_else(|error| panic!("{:#}", anyhow::Error::new(error)));
        self.pick_up(self.picks_up);
    }

    pub(crate) fn pick_up(&mut self, picks_up: bool) {
        self.picks_up = picks_up;
        let until = if picks_up { now() + FAR } else { 0 };
        self.configure(|config| config.pickup_until = until);
    }

    /// Makes the peer be as far as that with what it may open, or we may open to it.
    pub(crate) fn strain(&mut self, peer: u32, opened: Direction, strain: Option<Strain>) {
        let load = load(opened, strain, now(), MANY);
        self.loads.as_mut().unwrap().insert(peer, load, 0).unwrap();
    }

    /// What the programs' clock shows.
    pub(crate) fn now(&mut self) -> u64 {
        let (_, out, _) = self.explain("ticks", &[0; 64]);
        let ticks = u64::from_ne_bytes(out[..8].try_into().unwrap());
        let config = self.config();
        ticks
            .wrapping_mul(config.clock_tick.into())
            .wrapping_add(config.clock_base)
    }

    /// Plays something now, and meanwhile the programs' clock stands still.
    pub(crate) fn at_once<T>(&mut self, play: impl FnOnce(&mut Self, u64) -> T) -> T {
        let now = self.now();
        self.at(now, |kernel| play(kernel, now))
    }

    /// Plays something while the programs' clock shows this time and no other: of its ticks, none
    /// counts.
    pub(crate) fn at<T>(&mut self, now: u64, play: impl FnOnce(&mut Self) -> T) -> T {
        let running = self.config();
        self.configure(|config| (config.clock_base, config.clock_tick) = (now, 0));
        let outcome = play(self);
        self.configure(|config| {
            (config.clock_base, config.clock_tick) = (running.clock_base, running.clock_tick);
        });
        outcome
    }

    pub(crate) fn config(&self) -> Config {
        let data = MapData::from_pin(self.pin(maps::CFG)).unwrap();
        let cfg: Array<_, Config> = Map::Array(data).try_into().unwrap();
        cfg.get(&0, 0).unwrap()
    }

    pub(crate) fn configure(&self, change: impl Fn(&mut Config)) {
        let data = MapData::from_pin(self.pin(maps::CFG)).unwrap();
        let mut cfg: Array<_, Config> = Map::Array(data).try_into().unwrap();
        let mut config = cfg.get(&0, 0).unwrap();
        change(&mut config);
        cfg.set(0, config, 0).unwrap();
    }

    pub(crate) fn set_load(&mut self, peer: u32, load: PeerLoad) {
        self.loads.as_mut().unwrap().insert(peer, load, 0).unwrap();
    }

    /// Tokens for events of a kind, the same on every CPU.
    pub(crate) fn set_tokens(&self, kind: EventKind, bucket: Bucket) {
        let data = MapData::from_pin(self.pin(maps::EVENT_TOKENS)).unwrap();
        let mut tokens: PerCpuArray<_, Bucket> = Map::PerCpuArray(data).try_into().unwrap();
        let cpus = tokens.get(&(kind as u32), 0).unwrap().len();
        let buckets = PerCpuValues::try_from(vec![bucket; cpus]).unwrap();
        tokens.set(kind as u32, buckets, 0).unwrap();
    }

    pub(crate) fn tokens(&self, kind: EventKind) -> Vec<Bucket> {
        let data = MapData::from_pin(self.pin(maps::EVENT_TOKENS)).unwrap();
        let tokens: PerCpuArray<_, Bucket> = Map::PerCpuArray(data).try_into().unwrap();
        tokens.get(&(kind as u32), 0).unwrap().to_vec()
    }

    /// Every flow that is remembered, and in which table.
    pub(crate) fn flows(&self) -> Vec<Remembered> {
        let half_open = self.half_open().into_iter();
        let half_open = half_open.map(|(key, entry)| (Stage::HalfOpen, key, entry));
        let established = self.established();
        let established = established.iter().map(Result::unwrap);
        let established = established.map(|(key, entry)| (Stage::Established, key, entry));
        let all = half_open.chain(established);
        all.map(|(stage, key, entry)| Remembered { stage, key, entry })
            .collect()
    }

    /// Remembers these flows and no other.
    pub(crate) fn set_flows(&self, flows: &[Remembered]) {
        let of = |stage| flows.iter().filter(move |flow| flow.stage == stage);
        let mut established = self.established();
        let keys: Vec<_> = established.keys().map(Result::unwrap).collect();
        for key in keys {
            established.remove(&key).unwrap();
        }
        for flow in of(Stage::Established) {
            established.insert(flow.key, flow.entry, 0).unwrap();
        }
        let half_open: Vec<_> = of(Stage::HalfOpen)
            .map(|flow| (flow.key, flow.entry))
            .collect();
        self.set_half_open(&self.half_open(), &half_open);
    }

    /// Puts `flows` in the place of those `before`, which are all that there are.
    fn set_half_open(&self, before: &[(FlowKey, FlowEntry)], flows: &[(FlowKey, FlowEntry)]) {
        let config = self.config();
        let place = |key| Place::of(key, &config.secret);
        let index = |key| place(key).set(config.half_open_mask);
        let empty = before.iter().map(|(key, _)| (index(key), Set::default()));
        let mut filled: BTreeMap<_, _> = empty.collect();
        for (key, entry) in flows {
            let set = filled.entry(index(key)).or_default();
            set.put(place(key).tag(), key, entry);
        }
        let mut sets = self.sets();
        for (index, set) in filled {
            sets.set(index, set, 0).unwrap();
        }
    }

    /// What first fragments have left.
    pub(crate) fn fragments(&self) -> Table<FragmentKey, FragmentEntry> {
        self.pinned(maps::FRAG)
    }

    /// Denied packets, by what an administrator would call the same.
    pub(crate) fn denials(&self) -> Table<DenyKey, DenyEntry> {
        self.pinned(maps::DENY_AGG)
    }

    /// What the peer has used.
    pub(crate) fn load(&self, peer: u32) -> PeerLoad {
        self.loads.as_ref().unwrap().get(&peer, 0).unwrap()
    }

    /// Flows that the peer holds, by who opened them; a sweep may have forgotten the peer altogether.
    pub(crate) fn held(&self, peer: u32) -> [u32; 2] {
        let Ok(load) = self.loads.as_ref().unwrap().get(&peer, 0) else {
            return [0, 0];
        };
        let freed: Table<u32, PeerFreed> = self.pinned(maps::PEER_FREED);
        let freed = freed.get(&peer, 0).map_or([0, 0], |freed| freed.freed);
        [0, 1].map(|way| load.added[way].wrapping_sub(freed[way]))
    }

    /// As if a sweep had found so many gone.
    pub(crate) fn free(&self, peer: u32, freed: [u32; 2]) {
        let mut map: Table<u32, PeerFreed> = self.pinned(maps::PEER_FREED);
        map.insert(peer, PeerFreed { freed }, 0).unwrap();
    }

    /// Runs a program that the agent does not attach.
    pub(crate) fn explain(&mut self, name: &str, packet: &[u8]) -> (u32, Vec<u8>, u128) {
        self.load_program(name);
        self.run_program(name, packet, 1)
    }

    /// A program, loaded if it was not.
    pub(crate) fn load_program(&mut self, name: &str) -> &SchedClassifier {
        let program = self.dataplane().object().program_mut(name).unwrap();
        let program: &mut SchedClassifier = program.try_into().unwrap();
        if program.fd().is_err() {
            program.load().unwrap();
        }
        program
    }

    /// The programs, for whoever runs many packets, or on several threads.
    pub(crate) fn runner(&self) -> Runner<'_> {
        let program = |name| self.dataplane.as_ref().expect("started").program(name);
        Runner {
            ingress: program("mesh_in").expect("a loaded program"),
            egress: program("mesh_eg").expect("a loaded program"),
        }
    }

    /// Whether the program lets the packet pass; and the packet as it comes out.
    pub(crate) fn run(&self, direction: Direction, packet: &[u8]) -> (bool, Vec<u8>) {
        let name = match direction {
            Direction::Ingress => "mesh_in",
            Direction::Egress => "mesh_eg",
        };
        let (value, out, _) = self.run_program(name, packet, 1);
        match value {
            NEXT => (true, out),
            DROP => (false, out),
            other => panic!("{name} returned {other}"),
        }
    }

    /// What the program returned, the packet that came out, and nanoseconds per run.
    pub(crate) fn run_program(
        &self,
        name: &str,
        packet: &[u8],
        repeat: u32,
    ) -> (u32, Vec<u8>, u128) {
        let dataplane = self.dataplane.as_ref().expect("started");
        let program = dataplane.program(name).expect("a loaded program");
        let mut out = vec![0; 4096];
        let result = program
            .test_run(TestRunOptions {
                data_in: Some(packet),
                data_out: Some(&mut out),
                repeat,
                ..TestRunOptions::default()
            })
            .unwrap_or_else(|error| panic!("run {name} on {} bytes: {error}", packet.len()));
        out.truncate(result.data_size_out as usize);
        (result.return_value, out, result.duration.as_nanos())
    }

    /// Lets every flow and fragment grow older, also for whoever reads the kernel's own clock.
    pub(crate) fn age(&self, seconds: u64) {
        let nanoseconds = seconds * 1_000_000_000;
        let aged = |(key, mut entry): (FlowKey, FlowEntry)| {
            entry.state.last_seen = entry.state.last_seen.wrapping_sub(nanoseconds);
            (key, entry)
        };
        let half_open = self.half_open();
        let later: Vec<_> = half_open.iter().copied().map(aged).collect();
        self.set_half_open(&half_open, &later);
        let mut established = self.established();
        let all: Vec<_> = established.iter().map(Result::unwrap).collect();
        for (key, entry) in all.into_iter().map(aged) {
            established.insert(key, entry, 0).unwrap();
        }
        let mut fragments = self.fragments();
        let all: Vec<_> = fragments.iter().map(Result::unwrap).collect();
        for (key, mut entry) in all {
            entry.last_seen = entry.last_seen.wrapping_sub(nanoseconds);
            fragments.insert(key, entry, 0).unwrap();
        }
    }

    /// Whether one more packet was dropped for this reason than when it was last asked for.
    pub(crate) fn is_counted(&mut self, direction: Direction, reason: &str) -> bool {
        let reason = DropReason::ALL.iter().find(|r| r.name() == reason).copied();
        let reason = reason.expect("the oracle and the counters use the same words");
        let slot = maps::reason_slot(Some(reason), direction);
        let counts = self.reasons.as_ref().unwrap().get(&slot, 0).unwrap();
        let now = counts.iter().map(|count| count.packets).sum();
        let before = self.counted.insert(slot, now).unwrap_or_default();
        now == before + 1
    }

    /// What becomes of the packet, by the counters: all other reasons' stay as they were.
    pub(crate) fn outcome(&mut self, direction: Direction, packet: &[u8]) -> Outcome {
        let before = self.dataplane().counters().unwrap();
        let (passes, _) = self.run(direction, packet);
        let after = self.dataplane().counters().unwrap();
        if passes {
            assert_eq!(after.dropped, before.dropped);
            return Ok(());
        }
        let mut reasons = Vec::new();
        for ((way, reason), count) in after.dropped {
            let old = before
                .dropped
                .get(&(way, reason))
                .copied()
                .unwrap_or_default();
            if count != old {
                assert_eq!((way, count.packets), (direction, old.packets + 1));
                reasons.push(reason.name());
            }
        }
        assert_eq!(reasons.len(), 1, "{reasons:?}");
        Err(reasons[0])
    }

    /// Confirmed flows.
    pub(crate) fn established(&self) -> Table<FlowKey, FlowEntry> {
        self.pinned(maps::CT_EST)
    }

    /// Flows that wait for their confirmation, or for room.
    pub(crate) fn half_open(&self) -> Vec<(FlowKey, FlowEntry)> {
        let sets = MapData::from_pin(self.pin(maps::CT_NEW)).unwrap();
        half_open_flows(&sets).unwrap()
    }

    fn sets(&self) -> Array<MapData, Set> {
        let data = MapData::from_pin(self.pin(maps::CT_NEW)).unwrap();
        Map::Array(data).try_into().unwrap()
    }

    pub(crate) fn ring(&self) -> RingBuf<MapData> {
        let data = MapData::from_pin(self.pin(maps::EVENTS)).unwrap();
        RingBuf::try_from(Map::RingBuf(data)).unwrap()
    }

    /// Events since it was last asked.
    pub(crate) fn events(&self) -> Vec<FlowEvent> {
        let mut ring = self.ring();
        let mut events = Vec::new();
        while let Some(record) = ring.next() {
            events.push(FlowEvent::from_bytes(&record).unwrap());
            assert_eq!(
                record[85..88],
                [0; 3],
                "nobody reads what lies between fields"
            );
        }
        events
    }

    pub(crate) fn pin(&self, name: &str) -> PathBuf {
        let layout = format!("v{}", maps::LAYOUT_VERSION);
        self.bpffs.folder("mesh").join(layout).join(name)
    }

    pub(crate) fn pinned<K: aya::Pod, V: aya::Pod>(&self, name: &str) -> Table<K, V> {
        let data = MapData::from_pin(self.pin(name)).unwrap();
        let map = match data.info().unwrap().map_type().unwrap() {
            aya::maps::MapType::LruHash => Map::LruHashMap(data),
            _ => Map::HashMap(data),
        };
        map.try_into().unwrap()
    }
}

/// Runs packets without asking for what comes out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Runner<'a> {
    ingress: &'a SchedClassifier,
    egress: &'a SchedClassifier,
}

impl Runner<'_> {
    pub(crate) fn passes(&self, direction: Direction, packet: &[u8]) -> bool {
        match self.repeat(direction, packet, 1) {
            NEXT => true,
            DROP => false,
            other => panic!("a program returned {other}"),
        }
    }

    /// What the last of so many runs returned.
    pub(crate) fn repeat(&self, direction: Direction, packet: &[u8], repeat: u32) -> u32 {
        let program = match direction {
            Direction::Ingress => self.ingress,
            Direction::Egress => self.egress,
        };
        let options = TestRunOptions {
            data_in: Some(packet),
            repeat,
            ..TestRunOptions::default()
        };
        program.test_run(options).unwrap().return_value
    }
}

/// More flows than any table has room for.
const MANY: u32 = 1 << 24;

/// Nanoseconds that no test takes.
const FAR: u64 = 1 << 42;

/// A bucket that will be full at this time.
pub(crate) fn full_at(time: u64) -> Bucket {
    const NANOSECOND: Rate = Rate::new(1_000_000_000, 1);
    Bucket::default().taken(time - 1, &NANOSECOND)
}

fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicCoarse);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// What a peer under such a strain has used.
pub(crate) fn load(opened: Direction, strain: Option<Strain>, now: u64, share: u32) -> PeerLoad {
    let mut load = PeerLoad::default();
    let way = opened as usize;
    // A token that takes so long to come empties a bucket as many quick ones do: all of them fill in a
    // second at most.
    let second = Rate::new(1, 1);
    let empty = Bucket::default().taken(now, &second).taken(now, &second);
    match strain {
        None => {}
        Some(Strain::Low) => {
            let half = Bucket::default().taken(now, &Rate::new(2, 1));
            load.new[way] = half.taken(now, &Rate::new(4, 1));
        }
        Some(Strain::Empty) => load.new[way] = empty,
        Some(Strain::Share) => load.added[way] = share,
        Some(Strain::Errors) => load.errors = empty,
    }
    load
}

/// `$MESH_EBPF_OBJECT` takes the place of the embedded object.
pub(crate) fn options(bpffs: &Bpffs) -> Options {
    Options {
        pin_dir: bpffs.folder("mesh"),
        object_path: std::env::var_os("MESH_EBPF_OBJECT").map(PathBuf::from),
        ..Options::default()
    }
}

/// The thread of a test leaves the host's network for good.
#[expect(
    deprecated,
    reason = "unsafe only where descriptor tables are unshared, which this is not"
)]
pub(crate) fn own_network() {
    rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).unwrap_or_else(|error| {
        panic!("a network namespace of our own: {error}: run as root, `cargo xtask test ebpf`")
    });
}
