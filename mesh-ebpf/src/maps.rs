//! Every map of the packet path. Names, sizes and layouts come from mesh-common.

use core::cell::Cell;
use core::mem::MaybeUninit;

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::{self, ArrayOfMaps};
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf, lpm_trie};
use mesh_common::budget::{Bucket, PeerFreed, PeerLoad};
use mesh_common::event::{DenyEntry, DenyKey, FlowEvent};
use mesh_common::flow::{Flow, FragmentEntry, FragmentKey};
use mesh_common::half_open::{SETS, Set};
use mesh_common::maps::{self, Config, Count};
use mesh_common::place::Place;
use mesh_common::{Address, Facts, Identity, IdentityEntry, Verdict};

#[map(name = "cfg")]
pub static CFG: Array<Config> = Array::with_max_entries(1, 0);

#[map(name = "id_exact")]
pub static ID_EXACT: HashMap<Address, IdentityEntry> =
    HashMap::with_max_entries(maps::ID_EXACT_CAPACITY, 0);

#[map(name = "id_cidr")]
pub static ID_CIDR: lpm_trie::LpmTrie<Address, IdentityEntry> =
    lpm_trie::LpmTrie::with_max_entries(maps::ID_CIDR_CAPACITY, BPF_F_NO_PREALLOC);

/// One policy, in a map of its own: user space fills another and puts it here in one step.
///
/// Its slots are a [`mesh_common::policy::Bucket`] word by word. Before 6.2 the kernel takes a map whose
/// type information names a struct for another kind than user space's, which has none (`timer_off` in
/// `bpf_map_meta_equal`), and refuses the swap.
#[btf_map(name = "pol")]
pub static POL: ArrayOfMaps<Policy, 1> = ArrayOfMaps::new();

type Policy = btf_maps::Array<[u64; 8], 1, { maps::POLICY_FLAGS as usize }>;

/// Confirmed flows, by their places. Not LRU: under a flood of new flows an LRU forgets the idle ones first.
#[map(name = "ct_est")]
pub static CT_EST: HashMap<Place, Flow> = HashMap::with_max_entries(maps::FLOW_CAPACITY, 0);

/// Half-open flows, which a flood may evict.
#[btf_map(name = "ct_new")]
pub static CT_NEW: btf_maps::Array<Set, { SETS as usize }, { maps::HALF_OPEN_FLAGS as usize }> =
    btf_maps::Array::new();

#[map(name = "frag")]
pub static FRAG: LruHashMap<FragmentKey, FragmentEntry> =
    LruHashMap::with_max_entries(maps::FRAGMENT_CAPACITY, 0);

/// Only rules that user space has put here are counted.
#[map(name = "rule_ctr")]
pub static RULE_CTR: PerCpuHashMap<u32, Count> =
    PerCpuHashMap::with_max_entries(maps::RULE_CAPACITY, BPF_F_NO_PREALLOC);

#[map(name = "reason_ctr")]
pub static REASON_CTR: PerCpuArray<Count> = PerCpuArray::with_max_entries(maps::REASON_SLOTS, 0);

#[map(name = "peer_load")]
pub static PEER_LOAD: HashMap<u32, PeerLoad> =
    HashMap::with_max_entries(maps::PEER_CAPACITY, BPF_F_NO_PREALLOC);

#[map(name = "peer_freed")]
pub static PEER_FREED: HashMap<u32, PeerFreed> =
    HashMap::with_max_entries(maps::PEER_CAPACITY, BPF_F_NO_PREALLOC);

#[map(name = "deny_agg")]
pub static DENY_AGG: LruHashMap<DenyKey, DenyEntry> =
    LruHashMap::with_max_entries(maps::DENY_CAPACITY, 0);

#[map(name = "ev_tokens")]
pub static EVENT_TOKENS: PerCpuArray<Bucket> = PerCpuArray::with_max_entries(maps::EVENT_SLOTS, 0);

#[map(name = "ev_lost")]
pub static EVENT_LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(maps::EVENT_SLOTS, 0);

#[map(name = "events")]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(maps::EVENTS_BYTES, 0);

/// What one packet needs between its header and its end; but [`Asked::local`] is for the next one too.
/// In a map and not on the stack, because a verifier forgets what it knows of a map's content: it then
/// follows the verdict once, and not once for every way in which a packet can be read.
pub struct Scratch {
    pub facts: MaybeUninit<Facts>,
    pub verdict: MaybeUninit<Verdict>,
    /// The flow as it is after the packet, where something is to be written or told.
    pub flow: Flow,
    pub asked: Asked,
}

/// What look-ups have found, and what one answers that finds nobody: here a verifier takes both for
/// the same.
pub struct Asked {
    /// [`Config::generation`] and the time, as they were before anything was asked.
    pub generation: u32,
    pub now: u64,
    /// Whether it is known that neither table holds the flow.
    pub absent: u32,
    /// Whether the table holds the flow, alive or not.
    pub established: Cell<u32>,
    pub half_open: Cell<u32>,
    /// Where the flow lies in either table.
    pub place: Cell<Place>,
    /// Whether the peer of a flow that was opened had a token for an event.
    pub heard: Cell<u32>,
    pub nobody: IdentityEntry,
    pub local: Known,
}

/// Who is behind the near address that was asked for last.
pub struct Known {
    /// [`Config::identities`] of then; 0 if nobody was asked for yet.
    pub identities: Cell<u32>,
    pub address: Cell<Address>,
    pub entry: Cell<IdentityEntry>,
}

// SAFETY: it lies in a map of which every CPU has its own.
unsafe impl Sync for Asked {}

impl Asked {
    /// All but what was noted before it is asked for, and what is for the next packet too. Word by word, or
    /// the compiler makes it a call of memset, which writes byte by byte.
    #[inline(always)]
    pub fn forget(&mut self, generation: u32, now: u64) {
        // SAFETY: fields of a value that we hold alone.
        unsafe {
            (&raw mut self.generation).write_volatile(generation);
            (&raw mut self.now).write_volatile(now);
            (&raw mut self.established).write_volatile(Cell::new(0));
            (&raw mut self.half_open).write_volatile(Cell::new(0));
            (&raw mut self.absent).write_volatile(0);
            (&raw mut self.heard).write_volatile(Cell::new(0));
            (&raw mut self.nobody.identity).write_volatile(Identity::UNKNOWN);
            (&raw mut self.nobody.flags).write_volatile(0);
            (&raw mut self.nobody.peer).write_volatile(0);
        }
    }
}

#[map(name = "scratch")]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(2, 0);

/// This CPU's.
#[inline(always)]
pub fn scratch() -> Option<*mut Scratch> {
    SCRATCH.get_ptr_mut(0)
}

/// This CPU's for dry runs: before Linux 6.3 a packet may come in the midst of one.
#[inline(always)]
pub fn dry_scratch() -> Option<*mut Scratch> {
    SCRATCH.get_ptr_mut(1)
}

/// An event while it is written.
#[map(name = "event")]
pub static EVENT: PerCpuArray<FlowEvent> = PerCpuArray::with_max_entries(1, 0);
