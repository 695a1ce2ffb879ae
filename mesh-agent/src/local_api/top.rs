//! Who uses how much: established flows, summed by the node at their far end.

use std::collections::BTreeMap;

use mesh_api::v1;
use mesh_common::flow::Stage;
use mesh_core::node::NodeId;
use tonic::Status;

use super::counters;
use crate::snapshot::Snapshot;
use crate::stack::Enforcer;

pub(super) fn response(look: &Snapshot, enforcer: &Enforcer) -> Result<v1::TopResponse, Status> {
    let failed = |error: anyhow::Error| Status::internal(format!("{error:#}"));
    let mut peers: BTreeMap<u32, v1::TopPeer> = BTreeMap::new();
    for (_, entry) in enforcer.flows(Stage::Established).map_err(failed)? {
        let peer = peers.entry(entry.state.peer).or_default();
        peer.flows += 1;
        let [received, sent] = entry.packets.map(u64::from);
        peer.received_packets += received;
        peer.sent_packets += sent;
        let [received, sent] = entry.bytes;
        peer.received_bytes += received;
        peer.sent_bytes += sent;
    }
    let known = look.netmap.as_deref().map(|netmap| &netmap.peers);
    let mut peers: Vec<_> = peers
        .into_iter()
        .map(|(number, peer)| {
            let known = known.and_then(|peers| peers.get(&NodeId(number.into())));
            let name = known.map_or_else(|| format!("node {number}"), |peer| peer.name.to_string());
            v1::TopPeer { name, ..peer }
        })
        .collect();
    peers.sort_by_key(|peer| std::cmp::Reverse(peer.received_bytes + peer.sent_bytes));
    let counters = enforcer.counters().map_err(failed)?;
    Ok(v1::TopResponse {
        peers,
        counters: Some(counters::response(look, &counters)),
    })
}
