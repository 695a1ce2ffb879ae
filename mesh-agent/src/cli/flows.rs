//! `mesh flows`: the flow log, one line a record.

use std::process::ExitCode;
use std::time::Duration;

use mesh_api::v1;

use super::client::Client;
use super::why::protocol;
use super::{Failed, Flows, safe, say};
use crate::flow_log;

pub(super) async fn run(agent: &mut Client, args: Flows, json: bool) -> Result<ExitCode, Failed> {
    let request = v1::FlowsRequest {
        follow: args.follow,
        peer: args.peer.unwrap_or_default(),
        line: args.rule.unwrap_or(0),
        verdict: args.verdict.unwrap_or_default(),
        port: args.port.map(u32::from),
        proto: args
            .proto
            .as_deref()
            .map(protocol)
            .transpose()?
            .map(u32::from),
    };
    let mut records = agent.flows(request).await?.into_inner();
    while let Some(record) = records.message().await? {
        if json {
            say(&flow_log::json(&record).to_string())?;
        } else {
            say(&safe(&line(&record)))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn line(record: &v1::FlowRecord) -> String {
    let time = clock(Duration::from_nanos(record.time_ns));
    if record.kind == "lost" {
        return format!(
            "{time} lost       {} events of {} were not told",
            record.packets, record.reason
        );
    }
    let end = |end: &Option<v1::FlowEnd>| {
        let end = end.clone().unwrap_or_default();
        let who = match (end.node.as_str(), end.address.as_str()) {
            ("", "") => format!("identity {}", end.identity),
            ("", address) => address.to_owned(),
            (node, _) => node.to_owned(),
        };
        // Of ICMP it is no port; of denials that were only counted the sender's is not known.
        match (record.proto, end.port) {
            (6 | 17 | 132, port) if port != 0 => format!("{who}:{port}"),
            _ => who,
        }
    };
    let why = match (record.reason.as_str(), record.place.as_str()) {
        ("", "") => String::new(),
        (one, "") | ("", one) => format!("  {one}"),
        (reason, place) => format!("  {reason}, {place}"),
    };
    format!(
        "{time} {:9}  {} > {} {}  {}/{} B  {}/{} packets{why}",
        record.kind,
        end(&record.source),
        end(&record.destination),
        name(record.proto),
        record.bytes,
        record.reply_bytes,
        record.packets,
        record.reply_packets,
    )
}

fn name(proto: u32) -> String {
    match proto {
        1 | 58 => "icmp".to_owned(),
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        132 => "sctp".to_owned(),
        // Of what cannot be read, and of denials of many kinds that are told as one.
        0 => "-".to_owned(),
        other => format!("protocol {other}"),
    }
}

/// The time of day, of UTC.
fn clock(since_1970: Duration) -> String {
    let (seconds, rest) = (since_1970.as_secs() % 86_400, since_1970.subsec_millis());
    let (hours, minutes) = (seconds / 3_600, seconds / 60 % 60);
    format!("{hours:02}:{minutes:02}:{:02}.{rest:03}", seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_read_like_this() {
        let end = |node: &str, port| {
            Some(v1::FlowEnd {
                node: node.to_owned(),
                port,
                ..v1::FlowEnd::default()
            })
        };
        let record = v1::FlowRecord {
            kind: "denied".to_owned(),
            time_ns: 3_661_250_000_000,
            proto: 6,
            source: end("sandbox", 40_000),
            destination: end("node", 22),
            reason: "denied by rule".to_owned(),
            place: "policy.hujson:12".to_owned(),
            packets: 3,
            bytes: 180,
            ..v1::FlowRecord::default()
        };
        insta::assert_snapshot!(line(&record), @"01:01:01.250 denied     sandbox:40000 > node:22 tcp  180/0 B  3/0 packets  denied by rule, policy.hujson:12");
        let counted = v1::FlowRecord {
            source: end("sandbox", 0),
            ..record.clone()
        };
        insta::assert_snapshot!(line(&counted), @"01:01:01.250 denied     sandbox > node:22 tcp  180/0 B  3/0 packets  denied by rule, policy.hujson:12");
        let scan = v1::FlowRecord {
            proto: 0,
            destination: end("node", 0),
            ..counted
        };
        insta::assert_snapshot!(line(&scan), @"01:01:01.250 denied     sandbox > node -  180/0 B  3/0 packets  denied by rule, policy.hujson:12");
        let echo = v1::FlowRecord {
            kind: "opened".to_owned(),
            proto: 58,
            source: end("sandbox", 1),
            destination: end("node", 24_422),
            reason: String::new(),
            ..record
        };
        insta::assert_snapshot!(line(&echo), @"01:01:01.250 opened     sandbox > node icmp  180/0 B  3/0 packets  policy.hujson:12");
        let lost = v1::FlowRecord {
            kind: "lost".to_owned(),
            reason: "denied".to_owned(),
            packets: 7,
            ..v1::FlowRecord::default()
        };
        insta::assert_snapshot!(line(&lost), @"00:00:00.000 lost       7 events of denied were not told");
    }
}
