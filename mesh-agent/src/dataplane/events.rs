//! Events from the kernel's ring buffer to whoever reads the channel.
//!
//! A wake-up costs the packet path more than the record, so it wakes us only when much has gathered,
//! and we look by ourselves ten times a second. The channel is bounded and the ring is the buffer:
//! while nobody reads, the task waits, the ring fills, and the packet path counts what it could not
//! tell.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use aya::maps::{Map, MapData, RingBuf};
use mesh_common::event::FlowEvent;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tracing::{Instrument, debug_span, warn};

use super::EVENT_QUEUE;
use crate::sys;

const POLL: Duration = Duration::from_millis(100);
/// In which whatever was told is read, on a machine that is not too busy.
pub const READ_WITHIN: Duration = Duration::from_millis(150);

/// Reads until the receiver is dropped. Needs a tokio runtime.
pub(super) fn read(map: Map) -> io::Result<mpsc::Receiver<FlowEvent>> {
    let ring = RingBuf::try_from(map).map_err(io::Error::other)?;
    let watch = sys::watch(ring.as_fd().try_clone_to_owned()?)?;
    let (sender, receiver) = mpsc::channel(EVENT_QUEUE);
    let task = async move {
        if let Err(error) = forward(ring, &watch, &sender).await {
            warn!(%error, "read events");
        }
    };
    tokio::spawn(task.instrument(debug_span!("events")));
    Ok(receiver)
}

async fn forward(
    mut ring: RingBuf<MapData>,
    watch: &AsyncFd<OwnedFd>,
    sender: &mpsc::Sender<FlowEvent>,
) -> io::Result<()> {
    loop {
        tokio::select! {
            ready = watch.readable() => ready?.clear_ready(),
            () = tokio::time::sleep(POLL) => {}
            () = sender.closed() => return Ok(()),
        }
        while let Some(record) = ring.next() {
            let Some(event) = FlowEvent::from_bytes(&record) else {
                continue;
            };
            drop(record);
            if sender.send(event).await.is_err() {
                return Ok(());
            }
        }
    }
}
