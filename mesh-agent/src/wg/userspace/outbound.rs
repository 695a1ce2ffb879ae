//! From the TUN device to the socket: find the peer, encrypt, send in batches.
//!
//! A batch ends when the device has nothing more at the moment, so a lone packet leaves at once
//! and a busy device fills a system call.

use std::io;
use std::net::IpAddr;

use mesh_core::Direction;
use tracing::{debug, trace};

use super::offload::{Header, split};
use super::socket::{MAX_MESSAGE, Outbox};
use super::table::Table;
use super::{Shared, Waker};
use crate::wg::tun::HEADER_LEN;
use crate::wg::{Filter, Judgement};

/// Inner packets are padded to a multiple of this, so that lengths tell less (WireGuard paper,
/// section 5.4.6). boringtun leaves it to the caller.
const PADDING: usize = 16;

pub(super) fn run(shared: &Shared) {
    let mut header = [0; HEADER_LEN];
    let mut packet = vec![0; MAX_MESSAGE];
    let mut scratch = vec![0; MAX_MESSAGE];
    let mut outbox = Outbox::new();
    while !shared.stopped() {
        let (table, socket) = (shared.table(), shared.socket());
        let drained = loop {
            if outbox.is_full() {
                break false;
            }
            match shared.tun.read(&mut header, &mut packet) {
                Ok(0) => break true,
                Ok(len) => {
                    let header = Header::decode(header);
                    split(&header, &mut packet, len, &mut scratch, |segment, len| {
                        if outbox.is_full() {
                            outbox.flush(&socket);
                        }
                        forward(shared, &table, segment, len, &mut outbox);
                    });
                }
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        debug!(%error, "read the TUN device");
                    }
                    break true;
                }
            }
        };
        outbox.flush(&socket);
        // Whoever waits must not keep a replaced socket's port.
        drop(socket);
        if drained {
            shared.wait(Waker::Outbound, &shared.tun);
        }
    }
}

/// Sends the packet in the first `len` bytes of `packet`, behind which there is room for padding.
fn forward(shared: &Shared, table: &Table, packet: &mut [u8], len: usize, outbox: &mut Outbox) {
    let Some(destination) = admit(shared.filter.as_ref(), &mut packet[..len]) else {
        return;
    };
    let Some(peer) = table.allowed.longest_match(destination) else {
        trace!("no peer for this destination");
        return;
    };
    // Not beyond the MTU, or a path that just fits it would not fit the padding.
    let padded = len.next_multiple_of(PADDING).min(shared.mtu.max(len));
    packet[len..padded].fill(0);
    if let Some(session) = peer.lock().as_mut() {
        session.encrypt(&packet[..padded], outbox);
    }
}

/// Where a packet goes, if it may go. The filter sees also what names no destination: it counts that.
fn admit(filter: Option<&Filter>, packet: &mut [u8]) -> Option<IpAddr> {
    if let Some(filter) = filter
        && filter.judge(Direction::Egress, packet) == Judgement::Drop
    {
        return None;
    }
    destination(packet)
}

fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => <[u8; 4]>::try_from(packet.get(16..20)?)
            .ok()
            .map(IpAddr::from),
        6 => <[u8; 16]>::try_from(packet.get(24..40)?)
            .ok()
            .map(IpAddr::from),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mesh_common::DropReason;

    use super::*;
    use crate::dataplane::software;

    #[test]
    fn packets_without_a_destination_are_judged_and_counted() {
        let software = Arc::new(software::Filter::new());
        let judge = software.clone();
        let filter =
            Filter::new(
                move |direction, packet| match judge.judge(direction, packet).passes() {
                    true => Judgement::Pass,
                    false => Judgement::Drop,
                },
            );
        let check = |mut packet: Vec<u8>, reason: DropReason| {
            assert_eq!(admit(Some(&filter), &mut packet), None);
            let counters = software.counters();
            let count = counters.dropped.get(&(Direction::Egress, reason));
            assert_eq!(count.map(|count| count.packets), Some(1), "{reason:?}");
        };
        check(vec![0x50; 40], DropReason::NotIp);
        check(vec![0x45; 19], DropReason::Truncated);
    }
}
