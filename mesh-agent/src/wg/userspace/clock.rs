//! Time since boot, sleep included: what WireGuard's timers run on.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

pub(super) fn uptime() -> Duration {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}
