//! Uptime that goes on while the machine sleeps.
//!
//! `Instant` is CLOCK_MONOTONIC, which stands still during a suspend: a laptop would honour an
//! expired key for as long as its lid was closed. CLOCK_BOOTTIME does not; its progress is carried
//! by `Instant`s, since that is what mesh-core takes.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
    boot: Duration,
}

impl Clock {
    pub fn start() -> Self {
        Self {
            start: Instant::now(),
            boot: boottime(),
        }
    }

    pub fn now(&self) -> Instant {
        self.start + boottime().saturating_sub(self.boot)
    }
}

fn boottime() -> Duration {
    Duration::try_from(clock_gettime(ClockId::Boottime)).unwrap_or_default()
}
