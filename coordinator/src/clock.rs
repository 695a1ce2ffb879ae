//! The coordinator's clock: wall time that does not jump.
//!
//! Keys and nodes expire by this clock, so a wall clock that is set ten years ahead by mistake would
//! cut off the whole mesh at once. Small corrections are followed; after a jump the clock goes on
//! by the monotonic one and says so, until the process is restarted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mesh_core::node::UnixTime;

/// The most that time synchronisation corrects in one go without being asked.
const JUMP: u64 = 60;

#[derive(Clone, Debug)]
pub struct Clock(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    started: Instant,
    /// Wall time at `started`, as corrected since.
    base: AtomicU64,
    jumped: AtomicBool,
    /// Seconds that a test lets pass.
    skipped: AtomicU64,
}

impl Clock {
    pub fn start() -> Self {
        Self(Arc::new(Inner {
            started: Instant::now(),
            base: AtomicU64::new(wall()),
            jumped: AtomicBool::new(false),
            skipped: AtomicU64::new(0),
        }))
    }

    pub fn now(&self) -> UnixTime {
        let inner = &self.0;
        let elapsed = inner.started.elapsed().as_secs();
        let own = inner.base.load(Ordering::Relaxed) + elapsed;
        let wall = wall();
        let jumped = wall.abs_diff(own) > JUMP;
        inner.jumped.store(jumped, Ordering::Relaxed);
        if !jumped {
            inner
                .base
                .store(wall.saturating_sub(elapsed), Ordering::Relaxed);
        }
        let now = if jumped { own } else { wall };
        UnixTime(now + inner.skipped.load(Ordering::Relaxed))
    }

    /// The wall clock was moved by more than a minute since the start.
    pub fn jumped(&self) -> bool {
        self.0.jumped.load(Ordering::Relaxed)
    }

    /// Lets time pass at once, for tests that wait for an expiry.
    pub fn skip(&self, time: Duration) {
        self.0.skipped.fetch_add(time.as_secs(), Ordering::Relaxed);
    }
}

/// A clock before 1970 counts as 1970.
fn wall() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
