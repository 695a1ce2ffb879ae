//! What one packet needs between its header and its end. In a map and not on the stack, because a verifier
//! forgets what it knows of a map's content: it then follows the verdict once, and not once for every way
//! in which a packet can be read.

use core::cell::Cell;
use core::mem::MaybeUninit;

use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuArray;
use mesh_common::budget::PeerLoad;
use mesh_common::flow::Flow;
use mesh_common::place::Place;
use mesh_common::{Address, Facts, IdentityEntry, Verdict};

pub struct Scratch {
    pub facts: MaybeUninit<Facts>,
    pub verdict: MaybeUninit<Verdict>,
    /// The flow as it is after the packet, where something is to be written or told.
    pub flow: Flow,
    pub asked: Asked,
    /// Budgets of which nothing is used: what a map holds that nobody has written to.
    pub unused: PeerLoad,
}

/// What look-ups have found, and what one answers that finds nobody: here a verifier takes both for
/// the same.
pub struct Asked {
    /// [`mesh_common::maps::Config::generation`] and the time, as they were before anything was asked.
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
    /// [`IdentityEntry::UNKNOWN`], which is what a map holds that nobody has written to.
    pub nobody: IdentityEntry,
    pub local: Known,
}

/// Who is behind the near address that was asked for last. It stays for the next packet.
pub struct Known {
    /// Of then; 0 if nobody was asked for yet.
    pub generation: Cell<u32>,
    pub address: Cell<Address>,
    pub entry: Cell<IdentityEntry>,
}

// SAFETY: it lies in a map of which every CPU has its own.
unsafe impl Sync for Asked {}

impl Asked {
    /// All but the place, which is noted before or when it is asked for. Word by word, or the compiler makes
    /// it a call of memset, which writes byte by byte.
    #[inline(always)]
    pub fn begin(&mut self, generation: u32, now: u64, absent: bool) {
        // SAFETY: fields of a value that we hold alone.
        unsafe {
            (&raw mut self.generation).write_volatile(generation);
            (&raw mut self.now).write_volatile(now);
            (&raw mut self.absent).write_volatile(u32::from(absent));
            (&raw mut self.established).write_volatile(Cell::new(0));
            (&raw mut self.half_open).write_volatile(Cell::new(0));
            (&raw mut self.heard).write_volatile(Cell::new(0));
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
