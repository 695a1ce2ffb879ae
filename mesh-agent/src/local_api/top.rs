//! Who uses how much.

use std::cmp::Reverse;

use mesh_api::v1;
use tokio::sync::oneshot;
use tonic::Status;

use super::counters;
use crate::snapshot::Snapshot;
use crate::stack::{Handle, PeerUsage};

pub(super) async fn response(look: &Snapshot, handle: &Handle) -> Result<v1::TopResponse, Status> {
    let failed = |error: anyhow::Error| Status::internal(format!("{error:#}"));
    let (ask, answer) = oneshot::channel();
    let stopping = || Status::unavailable("the packet filter is being taken down; try again");
    let asked = handle.usage.send(ask).await;
    asked.map_err(|_| stopping())?;
    let peers = answer.await.map_err(|_| stopping())?.map_err(failed)?;
    let mut peers: Vec<_> = peers.into_iter().map(peer).collect();
    peers.sort_by_key(|peer| Reverse(peer.received_bytes.saturating_add(peer.sent_bytes)));
    let counters = handle.enforcer.counters().map_err(failed)?;
    Ok(v1::TopResponse {
        peers,
        counters: Some(counters::response(look, &counters)),
    })
}

fn peer(peer: PeerUsage) -> v1::TopPeer {
    let [received_packets, sent_packets] = peer.usage.packets;
    let [received_bytes, sent_bytes] = peer.usage.bytes;
    v1::TopPeer {
        name: peer.name.unwrap_or_else(|| format!("node {}", peer.number)),
        flows: peer.flows,
        received_packets,
        received_bytes,
        sent_packets,
        sent_bytes,
    }
}
