//! The programs, loaded as the agent loads them, on the loopback of an empty network namespace: their
//! life, their clock and what they tell.

mod flows;
mod loads;
mod run;

use std::collections::HashMap;
use std::path::PathBuf;

use aya::maps::{Array, Map, MapData, PerCpuArray, PerCpuValues, RingBuf};
use mesh_agent::dataplane::{Dataplane, EventKind, FlowEvent, Options};
use mesh_common::budget::{Bucket, PeerLoad};
use mesh_common::event::{DenyEntry, DenyKey};
use mesh_common::half_open::SETS;
use mesh_common::maps::{self, Config, Count};
use mesh_core::dataplane::Tables;

use crate::scratch::Bpffs;

pub(crate) use loads::{full_at, load};
pub(crate) use run::Runner;

/// TEST_RUN refuses shorter packets.
pub(crate) const SHORTEST: usize = 14;

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
        let reasons = Map::PerCpuArray(self.data(maps::REASON_CTR));
        self.reasons = Some(reasons.try_into().unwrap());
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
        self.cfg().get(&0, 0).unwrap()
    }

    pub(crate) fn configure(&self, change: impl Fn(&mut Config)) {
        let mut config = self.config();
        change(&mut config);
        self.cfg().set(0, config, 0).unwrap();
    }

    fn cfg(&self) -> Array<MapData, Config> {
        Map::Array(self.data(maps::CFG)).try_into().unwrap()
    }

    /// Tokens for events of a kind, the same on every CPU.
    pub(crate) fn set_tokens(&self, kind: EventKind, bucket: Bucket) {
        let cpus = self.tokens(kind).len();
        let buckets = PerCpuValues::try_from(vec![bucket; cpus]).unwrap();
        let mut tokens = self.event_tokens();
        tokens.set(kind as u32, buckets, 0).unwrap();
    }

    pub(crate) fn tokens(&self, kind: EventKind) -> Vec<Bucket> {
        let tokens = self.event_tokens();
        tokens.get(&(kind as u32), 0).unwrap().to_vec()
    }

    fn event_tokens(&self) -> PerCpuArray<MapData, Bucket> {
        let tokens = Map::PerCpuArray(self.data(maps::EVENT_TOKENS));
        tokens.try_into().unwrap()
    }

    /// Denied packets, by what an administrator would call the same.
    pub(crate) fn denials(&self) -> Table<DenyKey, DenyEntry> {
        self.pinned(maps::DENY_AGG)
    }

    pub(crate) fn ring(&self) -> RingBuf<MapData> {
        Map::RingBuf(self.data(maps::EVENTS)).try_into().unwrap()
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

    fn data(&self, name: &str) -> MapData {
        MapData::from_pin(self.pin(name)).unwrap()
    }

    pub(crate) fn pinned<K: aya::Pod, V: aya::Pod>(&self, name: &str) -> Table<K, V> {
        let data = self.data(name);
        let map = match data.info().unwrap().map_type().unwrap() {
            aya::maps::MapType::LruHash => Map::LruHashMap(data),
            _ => Map::HashMap(data),
        };
        map.try_into().unwrap()
    }
}

/// Nanoseconds that no test takes.
const FAR: u64 = 1 << 42;

fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicCoarse);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
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
