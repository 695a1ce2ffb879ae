//! The maps that the programs and the agent share: names, sizes, and the layout's number.
//!
//! A pinned map outlives the agent that made it, and nothing in the kernel says what its bytes
//! mean. So the number below is part of the pin path: two layouts never meet.

use crate::addr::Prefix;
use crate::budget::{Bucket, PeerFreed, PeerLoad};
use crate::event::{DenyEntry, DenyKey, EventKind};
use crate::flow::{Flow, FragmentEntry, FragmentKey};
use crate::half_open;
use crate::place::{Place, Secret};
#[cfg(doc)]
use crate::side;
use crate::{Address, Direction, DropReason, Sides};

/// Raised with every change to a type of this crate that a map holds.
pub const LAYOUT_VERSION: u32 = 9;

pub const CFG: &str = "cfg";
pub const ID_EXACT: &str = "id_exact";
pub const ID_CIDR: &str = "id_cidr";
pub const POL: &str = "pol";
pub const CT_EST: &str = "ct_est";
pub const CT_NEW: &str = "ct_new";
pub const FRAG: &str = "frag";
pub const RULE_CTR: &str = "rule_ctr";
pub const REASON_CTR: &str = "reason_ctr";
pub const PEER_LOAD: &str = "peer_load";
pub const PEER_FREED: &str = "peer_freed";
pub const DENY_AGG: &str = "deny_agg";
pub const EVENTS: &str = "events";
/// By [`EventKind`]: what may still be told, and what could not be.
pub const EVENT_TOKENS: &str = "ev_tokens";
pub const EVENT_LOST: &str = "ev_lost";

/// Every map that is pinned and adopted.
pub const PINNED: [&str; 15] = [
    CFG,
    ID_EXACT,
    ID_CIDR,
    POL,
    CT_EST,
    CT_NEW,
    FRAG,
    RULE_CTR,
    REASON_CTR,
    PEER_LOAD,
    PEER_FREED,
    DENY_AGG,
    EVENTS,
    EVENT_TOKENS,
    EVENT_LOST,
];

/// Sizes of a map's key and value in bytes: what a pinned map is known by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    pub key: u32,
    pub value: u32,
}

impl Shape {
    pub const fn new<K, V>() -> Self {
        Self {
            key: size_of::<K>() as u32,
            value: size_of::<V>() as u32,
        }
    }

    /// Of the map called `name`, one of [`PINNED`].
    pub fn of(name: &str) -> Self {
        match name {
            CFG => Self::new::<u32, Config>(),
            ID_EXACT => Self::new::<Address, Sides>(),
            ID_CIDR => Self::new::<Prefix, Sides>(),
            CT_EST => Self::new::<Place, Flow>(),
            CT_NEW => Self::new::<u32, half_open::Set>(),
            FRAG => Self::new::<FragmentKey, FragmentEntry>(),
            RULE_CTR | REASON_CTR => Self::new::<u32, Count>(),
            PEER_LOAD => Self::new::<u32, PeerLoad>(),
            PEER_FREED => Self::new::<u32, PeerFreed>(),
            DENY_AGG => Self::new::<DenyKey, DenyEntry>(),
            EVENT_TOKENS => Self::new::<u32, Bucket>(),
            EVENT_LOST => Self::new::<u32, u64>(),
            POL => Self::new::<u32, u32>(),
            // A ring buffer has neither.
            _ => Self { key: 0, value: 0 },
        }
    }
}

impl core::fmt::Display for Shape {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}-byte keys and {}-byte values", self.key, self.value)
    }
}

/// Times what may be in them, the kernel's maps of identities and of rules have room for: of two contents, while one
/// follows the other.
pub const ROOM: u32 = 2;
/// Addresses of nodes: one per family, so 32,768 peers.
pub const ID_EXACT_CAPACITY: u32 = 65_536;
/// Subnet routes.
pub const ID_CIDR_CAPACITY: u32 = 16_384;
/// Rows of one policy; memory is taken only for what is there.
pub const POLICY_CAPACITY: u32 = 262_144;
/// Of the map of a policy: `BPF_F_MMAPABLE` (Linux 5.5), which also puts each of its buckets on a cache line
/// of its own, and `BPF_F_INNER_MAP` (5.10), so that one as large as it must be takes the place of another.
pub const POLICY_FLAGS: u32 = 1 << 10 | 1 << 12;
/// Of `ct_new`: `BPF_F_MMAPABLE` (Linux 5.5), for which the kernel begins an array with a page, and so each
/// set with a cache line. None can be mapped that has locks.
pub const HALF_OPEN_FLAGS: u32 = 1 << 10;
/// Established flows, at least.
pub const FLOW_CAPACITY: u32 = 65_536;
/// Established flows, however much memory there is: a sweep over them takes most of a second.
pub const MAX_FLOW_CAPACITY: u32 = 1 << 20;
pub const FRAGMENT_CAPACITY: u32 = 8_192;
/// Rules that one node's policy names; memory is taken only for what is there.
pub const RULE_CAPACITY: u32 = 65_536;
/// Peers that have ever had a flow here; memory is taken only for what is there.
pub const PEER_CAPACITY: u32 = 32_768;
/// Kinds of denial ([`DenyKey`]); those not seen for long make room.
pub const DENY_CAPACITY: u32 = 8_192;
/// Bytes of the ring buffer: 8,738 events.
pub const EVENTS_BYTES: u32 = 1 << 20;
/// Slots of `ev_tokens` and `ev_lost`: room for kinds to come.
pub const EVENT_SLOTS: u32 = 16;
const _: () = assert!(EventKind::ALL.len() as u32 <= EVENT_SLOTS / 2);

/// The slot of `ev_lost` in which an agent leaves to the next how many of the lost it has told of: no program
/// writes there.
pub const fn told_slot(kind: EventKind) -> u32 {
    EVENT_SLOTS / 2 + kind as u32
}

/// The one value of `cfg`. All zero, as the kernel makes it, drops everything.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Config {
    /// Raised by every change that can change a verdict; 0 until the first policy is loaded. [`side`] of it says
    /// which of two policies and of two [`Sides`] is in use, so that one word changes both at once.
    pub generation: u32,
    /// [`Config::LOG`], [`Config::OBSERVE`].
    pub flags: u32,
    /// Greatest MSS that a SYN may carry, by family; 0 leaves it alone.
    pub mss_v4: u16,
    pub mss_v6: u16,
    /// Flows in `ct_est` that one peer may have opened here, or this node there: a quarter of all, or
    /// none while it is full.
    pub peer_flows: u32,
    /// Until then, in nanoseconds of the monotonic clock, a TCP packet in the middle of a connection
    /// may make its flow anew: the programs came to a host that had connections already.
    pub pickup_until: u64,
    /// The monotonic clock when the kernel's tick counter was 0, and nanoseconds per tick.
    pub clock_base: u64,
    pub clock_tick: u32,
    pub secret: Secret,
    /// Sets of `ct_new`, a power of two, less one.
    pub half_open_mask: u32,
    /// The node's own addresses, which nobody but the mesh may send to.
    pub own_v4: Address,
    pub own_v6: Address,
    /// The bits that all addresses of the mesh have in common: of IPv4, and of the first 64 of IPv6.
    pub pool_v4: u32,
    pub pool_v6: [u32; 2],
    pub spare: u32,
}

impl Config {
    /// Write every new flow and every drop to aya-log.
    pub const LOG: u32 = 1;
    /// Judge, count and log, but drop nothing: for looking at an interface that is not the mesh's.
    pub const OBSERVE: u32 = 2;

    /// Whether `address` is from the mesh's pool, as the node's own is. Says so of all until that is known.
    #[inline(always)]
    pub const fn is_in_pool(&self, address: &Address) -> bool {
        let ([a, b, _, d], [e, f, ..]) = (address.words(), self.own_v6.words());
        if address.is_mapped() {
            (d ^ self.own_v4.words()[3]) & self.pool_v4 == 0
        } else {
            ((a ^ e) & self.pool_v6[0]) | ((b ^ f) & self.pool_v6[1]) == 0
        }
    }
}

const _: () = assert!(size_of::<Config>() == 128);

/// Packets and bytes, summed over CPUs by whoever reads.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Count {
    pub packets: u64,
    pub bytes: u64,
}

impl core::ops::AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.packets = self.packets.wrapping_add(other.packets);
        self.bytes = self.bytes.wrapping_add(other.bytes);
    }
}

/// Slots of `reason_ctr`: room for reasons to come.
pub const REASON_SLOTS: u32 = 256;
/// What was passed counts as reason 0.
pub const PASSED: u8 = 0;

/// Where `reason_ctr` counts packets of one outcome and direction.
#[inline(always)]
pub const fn reason_slot(drop: Option<DropReason>, direction: Direction) -> u32 {
    let number = match drop {
        None => PASSED,
        Some(reason) => reason as u8,
    };
    number as u32 * 2 + direction as u32
}
