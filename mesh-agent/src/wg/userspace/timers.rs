//! What time asks for: retries, re-keys, keepalives, and keys that grew too old.

use std::time::Duration;

use tracing::warn;

use super::Shared;
use super::socket::Outbox;

/// How often every tunnel is asked. boringtun's own granularity: it counts from one call to the
/// next.
const TICK: Duration = Duration::from_millis(250);

pub(super) fn run(shared: &Shared) {
    let mut outbox = Outbox::new();
    while !shared.stopped() {
        if let Some(gate) = shared.gate() {
            gate.tick();
            let table = shared.table();
            for peer in table.by_key.values() {
                if outbox.is_full() {
                    outbox.flush(&shared.socket());
                }
                let ticked = peer
                    .lock()
                    .as_mut()
                    .map(|session| session.tick(gate.identity(), &mut outbox));
                if let Some(Err(error)) = ticked {
                    warn!(error = format!("{error:#}"), peer = %peer.key, "restart the session");
                }
            }
            outbox.flush(&shared.socket());
        }
        std::thread::park_timeout(TICK);
    }
}
