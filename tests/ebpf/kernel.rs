//! The programs, loaded as the agent loads them, on the loopback of an empty network namespace.

use std::path::PathBuf;

use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray};
use aya::{TestRun, TestRunOptions};
use mesh_agent::dataplane::{Dataplane, Options};
use mesh_common::DropReason;
use mesh_common::budget::{Bucket, ICMP_ERRORS, NEW_FLOWS, PeerLoad, Rate};
use mesh_common::flow::{FlowEntry, FlowKey, FragmentEntry, FragmentKey};
use mesh_common::maps::{self, Config, Count};
use mesh_core::Direction;
use mesh_core::dataplane::Tables;

use crate::oracle::Strain;
use crate::scratch::Bpffs;

/// TEST_RUN refuses shorter packets.
pub(crate) const SHORTEST: usize = 14;

/// TCX_NEXT and TC_ACT_SHOT.
const NEXT: u32 = u32::MAX;
const DROP: u32 = 2;

#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) bpffs: Bpffs,
    pub(crate) dataplane: Option<Dataplane>,
    /// Whether running connections are taken up: the agent's own minute would end within a test.
    pub(crate) picks_up: bool,
}

impl Kernel {
    pub(crate) fn new() -> Self {
        own_network();
        let bpffs = Bpffs::mount().unwrap_or_else(|error| panic!("{error:#}"));
        let mut kernel = Self {
            bpffs,
            dataplane: None,
            picks_up: false,
        };
        kernel.start();
        kernel
    }

    pub(crate) fn options(&self) -> Options {
        options(&self.bpffs)
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
        let data = MapData::from_pin(self.pin(maps::CFG)).unwrap();
        let mut cfg: Array<_, Config> = Map::Array(data).try_into().unwrap();
        let mut config = cfg.get(&0, 0).unwrap();
        config.pickup_until = if picks_up { now() + FAR } else { 0 };
        cfg.set(0, config, 0).unwrap();
    }

    /// Makes the peer be as far as that with what it may open, or we may open to it.
    pub(crate) fn strain(&self, peer: u32, opened: Direction, strain: Option<Strain>) {
        let mut loads: HashMap<_, u32, PeerLoad> = self.pinned(maps::PEER_LOAD);
        let data = MapData::from_pin(self.pin(maps::CFG)).unwrap();
        let cfg: Array<_, Config> = Map::Array(data).try_into().unwrap();
        let share = cfg.get(&0, 0).unwrap().peer_flows;
        loads
            .insert(peer, load(opened, strain, now(), share), 0)
            .unwrap();
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

    /// Lets every flow and fragment grow older: there is no other clock to turn.
    pub(crate) fn age(&self, seconds: u64) {
        let nanoseconds = seconds * 1_000_000_000;
        for name in [maps::CT_EST, maps::CT_NEW] {
            let mut flows: HashMap<_, FlowKey, FlowEntry> = self.pinned(name);
            let all: Vec<_> = flows.iter().map(Result::unwrap).collect();
            for (key, mut entry) in all {
                entry.state.last_seen = entry.state.last_seen.wrapping_sub(nanoseconds);
                flows.insert(key, entry, 0).unwrap();
            }
        }
        let mut fragments: HashMap<_, FragmentKey, FragmentEntry> = self.pinned(maps::FRAG);
        let all: Vec<_> = fragments.iter().map(Result::unwrap).collect();
        for (key, mut entry) in all {
            entry.last_seen = entry.last_seen.wrapping_sub(nanoseconds);
            fragments.insert(key, entry, 0).unwrap();
        }
    }

    /// Packets dropped so far for a reason, by its name.
    pub(crate) fn dropped(&self, direction: Direction, reason: &str) -> u64 {
        let reason = DropReason::ALL.iter().find(|r| r.name() == reason).copied();
        let reason = reason.expect("the oracle and the counters use the same words");
        let data = MapData::from_pin(self.pin(maps::REASON_CTR)).unwrap();
        let counters: PerCpuArray<_, Count> = Map::PerCpuArray(data).try_into().unwrap();
        let slot = maps::reason_slot(Some(reason), direction);
        let counts = counters.get(&slot, 0).unwrap();
        counts.iter().map(|count| count.packets).sum()
    }

    /// Confirmed flows.
    pub(crate) fn established(&self) -> HashMap<MapData, FlowKey, FlowEntry> {
        self.pinned(maps::CT_EST)
    }

    fn pin(&self, name: &str) -> PathBuf {
        let layout = format!("v{}", maps::LAYOUT_VERSION);
        self.bpffs.folder("mesh").join(layout).join(name)
    }

    fn pinned<K: aya::Pod, V: aya::Pod>(&self, name: &str) -> HashMap<MapData, K, V> {
        let data = MapData::from_pin(self.pin(name)).unwrap();
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

/// What a peer under such a strain has used.
pub(crate) fn load(opened: Direction, strain: Option<Strain>, now: u64, share: u32) -> PeerLoad {
    let mut load = PeerLoad::default();
    let way = opened as usize;
    // Buckets are emptied as packets do it, and beyond.
    let drained = |rate: &Rate, tokens: u64| {
        (0..tokens).fold(Bucket::default(), |bucket, _| bucket.taken(now, rate))
    };
    match strain {
        None => {}
        Some(Strain::Low) => load.new[way] = drained(&NEW_FLOWS[way], BURST[way] * 3 / 4),
        Some(Strain::Empty) => load.new[way] = drained(&NEW_FLOWS[way], BURST[way] * 2),
        Some(Strain::Share) => load.added[way] = share,
        Some(Strain::Errors) => load.errors = drained(&ICMP_ERRORS, 5_000),
    }
    load
}

/// Of [`NEW_FLOWS`].
const BURST: [u64; 2] = [4_096, 16_384];

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
