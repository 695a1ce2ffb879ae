//! The laboratory: a small internet of network namespaces, and hosts on it that run real programs.
//!
//! ```text
//!   host            host            host
//!   eth0            eth0            eth0        198.51.100.N, 2001:db8:51::N
//!     └──── veth ─────┴───── veth ────┘
//!                 underlay (bridge)
//! ```
//! The hard part is leaving nothing behind. Mounts live in a mount namespace of each host and
//! vanish with it; programs die with the thread that started them; namespaces carry our process
//! id in their names, so that whatever a crash leaves is known for what it is and swept by the
//! next laboratory.

mod host;
mod leftovers;
pub mod mesh;
pub mod probe;
mod process;
pub mod scenario;
mod underlay;
pub mod vm;

pub use host::{Host, User};
pub use process::Process;
pub use underlay::Lab;

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Asks again and again until there is an answer, or the last refusal when time is up.
pub fn eventually<T>(limit: Duration, mut ask: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + scaled(limit);
    loop {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(error) if Instant::now() >= deadline => {
                return Err(error.context(format!("still so after {limit:?}")));
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// Like [`eventually`], for a plain condition.
pub fn until(what: &str, limit: Duration, mut holds: impl FnMut() -> bool) -> Result<()> {
    eventually(limit, || {
        if holds() {
            return Ok(());
        }
        bail!("{what}: not yet")
    })
}

/// Between two questions: short against every limit that is measured, long against the machine's
/// own work.
const PAUSE: Duration = Duration::from_millis(20);

/// Limits are for a machine of today; an emulated one says by `MESH_TIME_SCALE` how much slower
/// it is.
pub fn scaled(limit: Duration) -> Duration {
    limit * time_scale()
}

/// How long to listen for what must not come. Such waits are always waited out, and a packet
/// between two that know each other is not as much slower as starting a program is.
pub fn silence(limit: Duration) -> Duration {
    limit * time_scale().min(3)
}

/// A number of random rounds, fewer where each takes longer.
pub fn rounds(number: u64) -> u64 {
    number / u64::from(time_scale())
}

fn time_scale() -> u32 {
    std::env::var("MESH_TIME_SCALE")
        .ok()
        .and_then(|scale| scale.parse().ok())
        .unwrap_or(1)
}
