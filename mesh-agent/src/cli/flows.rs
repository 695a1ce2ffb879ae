//! `mesh flows`: the flow log, one line a record.

use std::process::ExitCode;
use std::time::Duration;

use mesh_api::v1;
use mesh_core::flow::Place;
use mesh_core::policy::protocol_name;

use super::client::Client;
use super::why::protocol;
use super::{Failed, Flows, safe, say};
use crate::flow_log;

pub(super) async fn run(agent: &mut Client, args: Flows, json: bool) -> Result<ExitCode, Failed> {
    let follow = args.follow;
    let request = v1::FlowsRequest {
        follow,
        peer: args.peer.unwrap_or_default(),
        line: args.rule.as_ref().map_or(0, |place| place.line),
        file: args.rule.and_then(|place| place.file).unwrap_or_default(),
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
    let mut any = false;
    loop {
        let record = match records.message().await {
            Ok(Some(record)) => record,
            Ok(None) if !follow => {
                if !any && !json {
                    eprintln!("mesh: the agent remembers no such flow");
                }
                return Ok(ExitCode::SUCCESS);
            }
            Ok(None) => return Err(gone()),
            Err(status) => {
                let failed = Failed::from(status);
                return Err(match failed.code {
                    Failed::UNREACHABLE => gone(),
                    _ => failed,
                });
            }
        };
        any = true;
        if json {
            say(&flow_log::json(&record).to_string())?;
        } else {
            say(&safe(&line(&record)))?;
        }
    }
}

/// A line of the policy, alone or as records have it: behind the file.
pub(super) fn rule(text: &str) -> Result<Place, String> {
    let (file, line) = match text.rsplit_once(':') {
        Some((file, line)) => (Some(file.to_owned()), line),
        None => (None, text),
    };
    match line.parse() {
        Ok(line) if line > 0 => Ok(Place { file, line }),
        _ => Err("a line of the policy is wanted, from 1: 12, or policy.hujson:12".to_owned()),
    }
}

fn gone() -> Failed {
    Failed::new(
        Failed::UNREACHABLE,
        "the agent has ended; ask again when it runs",
    )
}

fn line(record: &v1::FlowRecord) -> String {
    let time = clock(Duration::from_nanos(record.time_ns));
    if record.kind == "lost" {
        let (count, what) = (record.packets, record.reason.as_str());
        return match what {
            "this file" | "this reader" => {
                format!("{time} lost       {count} records: {what} was too slow")
            }
            _ => format!(
                "{time} lost       {count} events of {what}: what the tables still hold is told all the same"
            ),
        };
    }
    format!(
        "{time} {:9}  {} > {} {}  {}/{} B  {}/{} packets{}",
        record.kind,
        end(record.proto, record.source.as_ref()),
        end(record.proto, record.destination.as_ref()),
        name(record.proto),
        record.bytes,
        record.reply_bytes,
        record.packets,
        record.reply_packets,
        why(record),
    )
}

/// A node by its name; whoever is behind one by the address, and the node.
fn end(proto: u32, end: Option<&v1::FlowEnd>) -> String {
    let end = end.cloned().unwrap_or_default();
    let port = match (proto, end.port) {
        (6 | 17 | 132, port) if port != 0 => format!(":{port}"),
        // Of ICMP it is no port; of denials that were only counted the sender's is not known.
        _ => String::new(),
    };
    // As in a URL: an address of IPv6 has colons of its own.
    let address = match end.address.contains(':') && !port.is_empty() {
        true => format!("[{}]{port}", end.address),
        false => format!("{}{port}", end.address),
    };
    match (end.node.as_str(), end.address.as_str(), end.behind) {
        ("", "", _) if end.identity == 0 => format!("unknown{port}"),
        ("", "", _) => format!("identity {}{port}", end.identity),
        ("", _, _) => address,
        (node, "", true) => format!("behind {node}{port}"),
        (node, _, true) => format!("{address} (behind {node})"),
        (node, _, false) => format!("{node}{port}"),
    }
}

fn why(record: &v1::FlowRecord) -> String {
    let (reason, place) = (record.reason.as_str(), record.place.as_str());
    let why = match (record.kind.as_str(), reason, place) {
        ("revoked", _, "") if record.rule == 0 => "no longer allowed".to_owned(),
        ("revoked", _, place) if !place.is_empty() => format!("denied by {place}"),
        (_, "", "") if record.rule != 0 => "by a rule that is no more".to_owned(),
        (_, one, "") | (_, "", one) => one.to_owned(),
        (_, reason, place) => format!("{reason}, {place}"),
    };
    match why.is_empty() {
        true => why,
        false => format!("  {why}"),
    }
}

fn name(proto: u32) -> String {
    match proto {
        58 => "icmp".to_owned(),
        // Of what cannot be read, and of denials of many kinds that are told as one.
        0 => "-".to_owned(),
        other => u8::try_from(other).map_or_else(|_| other.to_string(), protocol_name),
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
            ..record.clone()
        };
        insta::assert_snapshot!(line(&echo), @"01:01:01.250 opened     sandbox > node icmp  180/0 B  3/0 packets  policy.hujson:12");
        let behind = |address: &str, node: &str| {
            Some(v1::FlowEnd {
                address: address.to_owned(),
                node: node.to_owned(),
                port: 443,
                behind: true,
                ..v1::FlowEnd::default()
            })
        };
        let routed = v1::FlowRecord {
            kind: "revoked".to_owned(),
            reason: "revoked".to_owned(),
            source: behind("fd00::9", "router"),
            destination: behind("10.0.0.9", ""),
            ..record
        };
        insta::assert_snapshot!(line(&routed), @"01:01:01.250 revoked    [fd00::9]:443 (behind router) > 10.0.0.9:443 tcp  180/0 B  3/0 packets  denied by policy.hujson:12");
        let unknown = v1::FlowRecord {
            source: Some(v1::FlowEnd::default()),
            destination: Some(v1::FlowEnd {
                identity: 7,
                behind: true,
                ..end("node", 22).unwrap()
            }),
            place: String::new(),
            ..routed
        };
        insta::assert_snapshot!(line(&unknown), @"01:01:01.250 revoked    unknown > behind node:22 tcp  180/0 B  3/0 packets  no longer allowed");
        let lost = v1::FlowRecord {
            kind: "lost".to_owned(),
            reason: "denied".to_owned(),
            packets: 7,
            ..v1::FlowRecord::default()
        };
        insta::assert_snapshot!(line(&lost), @"00:00:00.000 lost       7 events of denied: what the tables still hold is told all the same");
    }
}
