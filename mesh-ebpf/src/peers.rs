//! What each peer has used of its budgets.

use core::intrinsics::{AtomicOrdering, atomic_xadd};
use core::mem::MaybeUninit;

use aya_ebpf::bindings::BPF_NOEXIST;
use mesh_common::Direction;
use mesh_common::budget::{Bucket, PeerLoad};

use crate::maps::{PEER_FREED, PEER_LOAD};

/// The peer's load, made if it has none yet.
#[inline(never)]
pub fn load(peer: u32) -> Option<*mut PeerLoad> {
    if let Some(load) = PEER_LOAD.get_ptr_mut(&peer) {
        return Some(load);
    }
    let mut none = MaybeUninit::<PeerLoad>::uninit();
    // Word by word: a call of memset would be one frame too many where each takes 32 bytes of the 512
    // at least (Linux 6.1).
    // SAFETY: the words of a variable that we hold alone, and all of them.
    let none = unsafe {
        let words = none.as_mut_ptr().cast::<u64>();
        for word in 0..size_of::<PeerLoad>() / size_of::<u64>() {
            words.add(word).write_volatile(0);
        }
        none.assume_init_ref()
    };
    let _ = PEER_LOAD.insert(&peer, none, u64::from(BPF_NOEXIST));
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
