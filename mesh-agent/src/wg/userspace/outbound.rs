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
use crate::wg::Judgement;
use crate::wg::tun::HEADER_LEN;

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
    let Some(destination) = destination(&packet[..len]) else {
        return;
    };
    if let Some(filter) = &shared.filter
        && filter.judge(Direction::Egress, &mut packet[..len]) == Judgement::Drop
    {
        return;
    }
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
