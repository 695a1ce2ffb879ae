//! What peers have used of their budgets.

use mesh_common::budget::{Bucket, PeerFreed, PeerLoad, Rate};
use mesh_common::maps;
use mesh_core::Direction;

use super::{Kernel, Table, now};
use crate::oracle::Strain;

/// More flows than any table has room for.
const MANY: u32 = 1 << 24;

impl Kernel {
    /// Makes the peer be as far as that with what it may open, or we may open to it.
    pub(crate) fn strain(&mut self, peer: u32, opened: Direction, strain: Option<Strain>) {
        let load = load(opened, strain, now(), MANY);
        self.set_load(peer, load);
    }

    pub(crate) fn set_load(&mut self, peer: u32, load: PeerLoad) {
        self.loads.as_mut().unwrap().insert(peer, load, 0).unwrap();
    }

    /// What the peer has used.
    pub(crate) fn load(&self, peer: u32) -> PeerLoad {
        self.loads.as_ref().unwrap().get(&peer, 0).unwrap()
    }

    /// Whether anything is known of the peer: a sweep may have forgotten it altogether.
    pub(crate) fn is_known(&self, peer: u32) -> bool {
        self.loads.as_ref().unwrap().get(&peer, 0).is_ok()
    }

    /// Flows that the peer holds, by who opened them.
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
}

/// A bucket that will be full at this time.
pub(crate) fn full_at(time: u64) -> Bucket {
    const NANOSECOND: Rate = Rate::new(1_000_000_000, 1);
    Bucket::default().taken(time - 1, &NANOSECOND)
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
