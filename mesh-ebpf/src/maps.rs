//! Every map of the packet path. Names, sizes and layouts come from mesh-common.

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
use mesh_common::{Address, SIDES, Sides};

#[map(name = "cfg")]
pub static CFG: Array<Config> = Array::with_max_entries(1, 0);

#[map(name = "id_exact")]
pub static ID_EXACT: HashMap<Address, Sides> =
    HashMap::with_max_entries(maps::ROOM * maps::ID_EXACT_CAPACITY, BPF_F_NO_PREALLOC);

#[map(name = "id_cidr")]
pub static ID_CIDR: lpm_trie::LpmTrie<Address, Sides> =
    lpm_trie::LpmTrie::with_max_entries(maps::ROOM * maps::ID_CIDR_CAPACITY, BPF_F_NO_PREALLOC);

/// Two policies, each in a map of its own: user space fills the one that is not in use.
///
/// Its slots are a [`mesh_common::policy::Bucket`] word by word. Before 6.2 the kernel takes a map whose
/// type information names a struct for another kind than user space's, which has none (`timer_off` in
/// `bpf_map_meta_equal`), and refuses it.
#[btf_map(name = "pol")]
pub static POL: ArrayOfMaps<Policy, { SIDES as usize }> = ArrayOfMaps::new();

pub type Policy = btf_maps::Array<[u64; 8], 1, { maps::POLICY_FLAGS as usize }>;

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
    PerCpuHashMap::with_max_entries(maps::ROOM * maps::RULE_CAPACITY, BPF_F_NO_PREALLOC);

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

/// An event while it is written.
#[map(name = "event")]
pub static EVENT: PerCpuArray<FlowEvent> = PerCpuArray::with_max_entries(1, 0);
