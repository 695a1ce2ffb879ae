//! The packet path's clock, set by the one that user space reads.
//!
//! The kernel shows its counter of ticks to programs only, so a program tells it; from there on both
//! clocks go alike, because the kernel moves the counter by the monotonic clock.

use std::io;

use aya::programs::{ProgramError, SchedClassifier};
use rustix::time::{ClockId, Timespec, clock_getres, clock_gettime};

use super::dry;

/// [`mesh_common::maps::Config::clock_base`] and [`mesh_common::maps::Config::clock_tick`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Clock {
    pub(super) base: u64,
    pub(super) tick: u32,
}

impl Clock {
    /// `ticks` is the program of that name.
    pub(super) fn set(ticks: &SchedClassifier) -> Result<Self, ProgramError> {
        let mut out = [0; 64];
        dry::run(ticks, &[0; 64], &mut out)?;
        let [a, b, c, d, e, f, g, h, ..] = out;
        let ticks = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
        // Of the coarse clock, the resolution is the tick.
        let tick = nanoseconds(clock_getres(ClockId::MonotonicCoarse));
        let tick = u32::try_from(tick).map_err(|_| io::Error::other("a tick of seconds"))?;
        Ok(Self {
            base: now().wrapping_sub(ticks.wrapping_mul(u64::from(tick))),
            tick,
        })
    }
}

/// What the packet path stamps flows with.
pub(super) fn now() -> u64 {
    nanoseconds(clock_gettime(ClockId::MonotonicCoarse))
}

fn nanoseconds(time: Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    seconds * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or_default()
}
