//! An entry of the flow log as the local API sends it, and as JSON.

use std::time::Duration;

use mesh_api::v1;
use mesh_core::flow::{Described, End};
use mesh_core::netmap::Rule;
use serde_json::{Value, json as value};

use super::Entry;

impl From<&Entry> for v1::FlowRecord {
    fn from(entry: &Entry) -> Self {
        match entry {
            Entry::Flow(described) => record(described),
            Entry::Lost { time, what, count } => Self {
                kind: "lost".to_owned(),
                time_ns: nanoseconds(*time),
                reason: (*what).to_owned(),
                packets: *count,
                ..Self::default()
            },
        }
    }
}

fn record(flow: &Described) -> v1::FlowRecord {
    let (rule, known) = match &flow.rule {
        Some((rule, known)) => (*rule, known.as_ref()),
        None => (0, None),
    };
    v1::FlowRecord {
        kind: flow.kind.name().to_owned(),
        time_ns: nanoseconds(flow.time),
        start_ns: nanoseconds(flow.start),
        proto: flow.proto.into(),
        direction: flow.direction.name().to_owned(),
        source: Some(sent(&flow.source)),
        destination: Some(sent(&flow.destination)),
        reason: flow.reason.unwrap_or_default().to_owned(),
        rule,
        line: known.map_or(0, |rule| rule.line),
        place: known.map_or_else(String::new, Rule::place),
        summary: known.map_or_else(String::new, |rule| rule.summary.clone()),
        packets: flow.packets[0],
        bytes: flow.bytes[0],
        reply_packets: flow.packets[1],
        reply_bytes: flow.bytes[1],
    }
}

fn sent(end: &End) -> v1::FlowEnd {
    v1::FlowEnd {
        address: end.address.map_or_else(String::new, |a| a.to_string()),
        port: end.port.into(),
        identity: end.identity.0,
        node: end.node.clone().unwrap_or_default(),
        tags: end.tags.clone(),
        user: end.user.clone(),
        behind: end.is_behind,
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// One line of the file, and of `mesh flows --json`.
pub fn json(record: &v1::FlowRecord) -> Value {
    if record.kind == "lost" {
        return value!({
            "kind": record.kind,
            "time_ns": record.time_ns,
            "what": record.reason,
            "packets": record.packets,
        });
    }
    let verdict = match record.kind.as_str() {
        "denied" | "revoked" => "denied",
        _ => "allowed",
    };
    value!({
        "kind": record.kind,
        "time_ns": record.time_ns,
        "start_ns": record.start_ns,
        "verdict": verdict,
        "reason": (!record.reason.is_empty()).then_some(&record.reason),
        "rule": (record.rule != 0).then(|| value!({
            "id": record.rule,
            "policy": (!record.place.is_empty()).then_some(&record.place),
            "summary": record.summary,
        })),
        "direction": record.direction,
        "proto": record.proto,
        "source": record.source.as_ref().map(end),
        "destination": record.destination.as_ref().map(end),
        "packets": record.packets,
        "bytes": record.bytes,
        "reply_packets": record.reply_packets,
        "reply_bytes": record.reply_bytes,
    })
}

fn end(end: &v1::FlowEnd) -> Value {
    value!({
        "address": (!end.address.is_empty()).then_some(&end.address),
        "port": end.port,
        "identity": end.identity,
        "node": (!end.node.is_empty()).then_some(&end.node),
        "behind": end.behind,
        "tags": end.tags,
        "user": end.user,
    })
}
