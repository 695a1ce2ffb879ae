//! What each peer has used of its budgets.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::bindings::BPF_NOEXIST;
use mesh_common::Direction;
use mesh_common::budget::{Bucket, PeerLoad};

use crate::maps::{PEER_FREED, PEER_LOAD};
use crate::scratch::scratch;

/// The peer's load, made if it has none yet.
#[inline(never)]
pub fn load(peer: u32) -> Option<*mut PeerLoad> {
    if let Some(load) = PEER_LOAD.get_ptr_mut(&peer) {
        return Some(load);
    }
    // From a map, because it would take 64 bytes of the 512 that a stack has (Linux 6.1).
    // SAFETY: nobody writes it.
    let unused = unsafe { &(*scratch()?).unused };
    let _ = PEER_LOAD.insert(&peer, unused, u64::from(BPF_NOEXIST));
    PEER_LOAD.get_ptr_mut(&peer)
}

/// Counts a flow in or, by the greatest number, out.
#[inline(always)]
pub fn count(peer: u32, opened: Direction, by: u32) {
    if let Some(load) = load(peer) {
        // SAFETY: the pointer that the look-up returned.
        unsafe {
            let added = match opened {
                Direction::Ingress => &raw mut (*load).added[0],
                Direction::Egress => &raw mut (*load).added[1],
            };
            atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(added, by);
        }
    }
}

/// How many flows the peer holds.
#[inline(always)]
pub fn held(peer: u32, opened: Direction) -> i32 {
    let Some(load) = PEER_LOAD.get_ptr(&peer) else {
        return 0;
    };
    let freed = PEER_FREED.get_ptr(&peer);
    // SAFETY: pointers that look-ups returned.
    unsafe {
        let (added, freed) = match opened {
            Direction::Ingress => ((*load).added[0], freed.map_or(0, |freed| (*freed).freed[0])),
            Direction::Egress => ((*load).added[1], freed.map_or(0, |freed| (*freed).freed[1])),
        };
        added.wrapping_sub(freed).cast_signed()
    }
}

/// The tokens left for new flows.
#[inline(always)]
pub fn new_flows(peer: u32, opened: Direction) -> Bucket {
    match PEER_LOAD.get_ptr(&peer) {
        // SAFETY: the pointer that the look-up returned.
        Some(load) => unsafe {
            match opened {
                Direction::Ingress => (*load).new[0],
                Direction::Egress => (*load).new[1],
            }
        },
        None => Bucket::default(),
    }
}

/// The tokens left for ICMP errors.
#[inline(always)]
pub fn icmp_errors(peer: u32) -> Bucket {
    match PEER_LOAD.get_ptr(&peer) {
        // SAFETY: the pointer that the look-up returned.
        Some(load) => unsafe { (*load).errors },
        None => Bucket::default(),
    }
}
