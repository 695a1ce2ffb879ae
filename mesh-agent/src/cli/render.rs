//! What the verbs print: for people in lines, for programs in JSON. Both from the same answer.

use std::net::IpAddr;

use mesh_api::v1;
use mesh_api::v1::local_status::State;
use serde_json::{Value, json};

use super::safe;

pub(super) fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).expect("a JSON value can always be written")
}

// === status ===

fn state(status: &v1::LocalStatus) -> &'static str {
    match status.state() {
        State::Stopped => "stopped",
        State::Connecting => "connecting",
        State::Running => "running",
        State::Expired => "expired",
    }
}

fn severity(condition: &v1::Condition) -> &'static str {
    match condition.severity() {
        v1::Severity::Info => "info",
        v1::Severity::Warning => "warning",
        v1::Severity::Error => "error",
    }
}

fn address(bytes: &[u8]) -> String {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    let v6 = <[u8; 16]>::try_from(bytes).map(IpAddr::from);
    match v4.or(v6) {
        Ok(address) => address.to_string(),
        Err(_) => "?".to_owned(),
    }
}

/// The JSON of `mesh status`, which the debug bundle holds too.
pub fn status_json(status: &v1::LocalStatus) -> Value {
    json!({
        "state": state(status),
        "version": status.version,
        "backend": status.backend,
        "coordinator_connected": status.coordinator_connected,
        "epoch": status.epoch,
        "generation": status.generation,
        "mesh": status.mesh.as_ref().map(|mesh| json!({
            "id": hex::encode(&mesh.id),
            "domain": mesh.domain,
        })),
        "me": status.me.as_ref().map(|me| json!({
            "id": me.id,
            "name": me.name,
            "addresses": [address(&me.v4), address(&me.v6)],
            "tags": me.tags,
            "user": me.user,
            "expires": me.expires,
            "expired": me.expired,
        })),
        "peers": status.peers.iter().map(peer_json).collect::<Vec<_>>(),
        "health": status.health.iter().map(|condition| json!({
            "name": condition.name,
            "severity": severity(condition),
            "text": condition.text,
            "next_step": condition.next_step,
        })).collect::<Vec<_>>(),
    })
}

fn peer_json(status: &v1::PeerStatus) -> Value {
    let peer = status.peer.clone().unwrap_or_default();
    json!({
        "id": peer.id,
        "name": peer.name,
        "addresses": [address(&peer.v4), address(&peer.v6)],
        "tags": peer.tags,
        "user": peer.user,
        "path": status.path,
        "handshake_age_seconds": status.handshake_age_seconds,
        "received_bytes": status.received_bytes,
        "sent_bytes": status.sent_bytes,
    })
}

/// `mesh status` for people: this node, a table of its peers, what is wrong.
pub(super) fn status(status: &v1::LocalStatus) -> Vec<String> {
    let mut lines = Vec::new();
    match &status.me {
        Some(me) => {
            let domain = status.mesh.as_ref().map_or("", |mesh| &mesh.domain);
            let owner = me.user.clone().unwrap_or_else(|| me.tags.join(","));
            lines.push(safe(&format!(
                "{}  {}  {}  {owner}  {}.{domain}",
                state(status),
                address(&me.v4),
                address(&me.v6),
                me.name,
            )));
        }
        None => lines.push(match status.state() {
            State::Connecting => "connecting".to_owned(),
            State::Stopped | State::Running | State::Expired => {
                "stopped; `mesh up --join … --auth-key …` makes this machine a node".to_owned()
            }
        }),
    }
    if status.me.is_some() {
        let connected = match status.coordinator_connected {
            true => "connected",
            false => "not connected",
        };
        lines.push(format!(
            "coordinator {connected}, generation {}, backend {}",
            status.generation,
            safe(&status.backend)
        ));
    }
    if !status.peers.is_empty() {
        lines.push(String::new());
        let header = [
            "PEER",
            "ADDRESS",
            "OWNER",
            "PATH",
            "HANDSHAKE",
            "RECEIVED",
            "SENT",
        ];
        let rows = status.peers.iter().map(|status| {
            let peer = status.peer.clone().unwrap_or_default();
            [
                peer.name,
                address(&peer.v4),
                peer.user.unwrap_or_else(|| peer.tags.join(",")),
                status.path.clone(),
                status
                    .handshake_age_seconds
                    .map_or_else(|| "-".to_owned(), |age| format!("{age} s ago")),
                bytes(status.received_bytes),
                bytes(status.sent_bytes),
            ]
        });
        lines.extend(table(header, rows));
    }
    if !status.health.is_empty() {
        lines.push(String::new());
    }
    for condition in &status.health {
        let (severity, name) = (severity(condition), &condition.name);
        lines.push(safe(&format!("{severity}: {name}: {}", condition.text)));
        lines.push(safe(&format!("    {}", condition.next_step)));
    }
    lines
}

// === whois ===

pub(super) fn whois_json(found: &v1::WhoisResponse) -> Value {
    json!({
        "node_id": found.node_id,
        "name": found.name,
        "addresses": found.addresses,
        "tags": found.tags,
        "user": found.user,
        "identity": found.identity,
    })
}

pub(super) fn whois(found: &v1::WhoisResponse) -> Vec<String> {
    let mut lines = vec![
        format!("name       {}", found.name),
        format!("node       {}", found.node_id),
        format!("addresses  {}", found.addresses.join(", ")),
    ];
    if let Some(user) = &found.user {
        lines.push(format!("user       {user}"));
    }
    if !found.tags.is_empty() {
        lines.push(format!("tags       {}", found.tags.join(", ")));
    }
    lines.push(format!("identity   {}", found.identity));
    lines.iter().map(|line| safe(line)).collect()
}

// === counters ===

pub(super) fn counters_json(counters: &v1::CountersResponse) -> Value {
    json!({
        "reasons": counters.reasons.iter().map(|counter| json!({
            "reason": counter.reason,
            "direction": counter.direction,
            "packets": counter.packets,
            "bytes": counter.bytes,
        })).collect::<Vec<_>>(),
        "rules": counters.rules.iter().map(|counter| json!({
            "rule": counter.rule,
            "line": counter.line,
            "policy": counter.place,
            "summary": counter.summary,
            "packets": counter.packets,
            "bytes": counter.bytes,
        })).collect::<Vec<_>>(),
    })
}

pub(super) fn counters(counters: &v1::CountersResponse) -> Vec<String> {
    let reasons = counters.reasons.iter().map(|counter| {
        [
            counter.reason.clone(),
            counter.direction.clone(),
            counter.packets.to_string(),
            bytes(counter.bytes),
        ]
    });
    let rules = counters.rules.iter().map(|counter| {
        [
            counter.place.clone(),
            counter.summary.clone(),
            counter.packets.to_string(),
        ]
    });
    let mut lines = table(["VERDICT", "DIRECTION", "PACKETS", "BYTES"], reasons);
    lines.push(String::new());
    lines.extend(table(["POLICY", "RULE", "DECIDED"], rules));
    lines
}

// === for both ===

pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count;
    let mut unit = 0;
    let mut rest = 0;
    while value >= 1024 && unit + 1 < UNITS.len() {
        rest = value % 1024 * 10 / 1024;
        value /= 1024;
        unit += 1;
    }
    match unit {
        0 => format!("{value} B"),
        _ => format!("{value}.{rest} {}", UNITS[unit]),
    }
}

/// Columns as wide as their widest cell. Cells are made harmless first, so the widths hold.
pub(super) fn table<const N: usize>(
    header: [&str; N],
    rows: impl Iterator<Item = [String; N]>,
) -> Vec<String> {
    let rows: Vec<[String; N]> = rows.map(|row| row.map(|cell| safe(&cell))).collect();
    let mut widths = header.map(str::len);
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: Vec<&str>| {
        let padded: Vec<String> = cells
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        padded.join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(header.to_vec())];
    lines.extend(
        rows.iter()
            .map(|row| line(row.iter().map(String::as_str).collect())),
    );
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_counts_are_short() {
        let check = |count, text: &str| assert_eq!(bytes(count), text);
        check(0, "0 B");
        check(1023, "1023 B");
        check(1536, "1.5 KiB");
        check(u64::MAX, "16777215.9 TiB");
    }

    #[test]
    fn a_status_reads_like_this() {
        let status = status(&v1::LocalStatus {
            state: State::Running.into(),
            version: "0.1.0".to_owned(),
            mesh: Some(v1::Mesh {
                domain: "mesh.internal".to_owned(),
                ..v1::Mesh::default()
            }),
            me: Some(v1::Me {
                id: 1,
                name: "gpu-1".to_owned(),
                v4: vec![100, 64, 0, 1],
                v6: [&[0xfd, 1][..], &[0; 13], &[1]].concat(),
                tags: vec!["tag:node".to_owned()],
                ..v1::Me::default()
            }),
            backend: "kernel".to_owned(),
            coordinator_connected: true,
            epoch: 0,
            generation: 7,
            peers: vec![v1::PeerStatus {
                peer: Some(v1::Peer {
                    id: 2,
                    name: "laptop".to_owned(),
                    v4: vec![100, 64, 0, 2],
                    v6: vec![],
                    user: Some("ann@example.org\u{1b}[2J".to_owned()),
                    ..v1::Peer::default()
                }),
                path: "direct 192.0.2.1:51820".to_owned(),
                handshake_age_seconds: Some(12),
                received_bytes: 4096,
                sent_bytes: 10,
            }],
            health: vec![v1::Condition {
                name: "BuiltWithoutEbpf".to_owned(),
                severity: v1::Severity::Warning.into(),
                text: "policy is enforced in the agent".to_owned(),
                next_step: "build with cargo xtask build-ebpf".to_owned(),
            }],
        });
        insta::assert_snapshot!(status.join("\n"), @r"
        running  100.64.0.1  fd01::1  tag:node  gpu-1.mesh.internal
        coordinator connected, generation 7, backend kernel

        PEER    ADDRESS     OWNER                     PATH                    HANDSHAKE  RECEIVED  SENT
        laptop  100.64.0.2  ann@example.org\u{1b}[2J  direct 192.0.2.1:51820  12 s ago   4.0 KiB   10 B

        warning: BuiltWithoutEbpf: policy is enforced in the agent
            build with cargo xtask build-ebpf
        ");
    }
}
