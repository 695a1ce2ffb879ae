//! `mesh top` and `mesh debug maps`: who uses how much, and how full the maps are.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use mesh_api::v1;
use serde_json::{Value, json};

use super::client::Client;
use super::render::{bytes, counters_json, pretty, table};
use super::{Failed, Top, say};

/// Rows of each table that fit a small terminal together.
const ROWS: usize = 8;
/// Clears the terminal and goes to its corner.
const CLEAR: &str = "\u{1b}[2J\u{1b}[H";

pub(super) async fn run(agent: &mut Client, args: &Top, json: bool) -> Result<ExitCode, Failed> {
    let count = args.count.unwrap_or(if json { 1 } else { 0 });
    let mut before: Option<(Seen, Instant)> = None;
    for round in 1.. {
        let top = agent.top(v1::TopRequest {}).await?.into_inner();
        let now = Instant::now();
        let seen = Seen::of(&top);
        if json {
            say(&pretty(&top_json(&top)))?;
        } else {
            let elapsed = before.as_ref().map(|(_, at)| now.duration_since(*at));
            let past = before.as_ref().map(|(seen, _)| seen);
            let lines = lines(&top, &seen, past, elapsed.unwrap_or_default());
            let clear = std::io::stdout().is_terminal().then_some(CLEAR);
            say(&format!(
                "{}{}",
                clear.unwrap_or_default(),
                lines.join("\n")
            ))?;
        }
        if round == count {
            break;
        }
        before = Some((seen, now));
        tokio::time::sleep(Duration::from_secs(args.interval)).await;
    }
    Ok(ExitCode::SUCCESS)
}

/// Counters of one look, by what they count.
#[derive(Debug, Default)]
struct Seen(BTreeMap<String, u64>);

impl Seen {
    fn of(top: &v1::TopResponse) -> Self {
        let counters = top.counters.clone().unwrap_or_default();
        let peers = top.peers.iter().flat_map(|peer| {
            [
                (format!("received {}", peer.name), peer.received_bytes),
                (format!("sent {}", peer.name), peer.sent_bytes),
            ]
        });
        let rules = counters
            .rules
            .iter()
            .map(|rule| (format!("rule {}", rule.rule), rule.packets));
        let reasons = counters.reasons.iter().map(|counter| {
            let name = format!("reason {} {}", counter.reason, counter.direction);
            (name, counter.packets)
        });
        Self(peers.chain(rules).chain(reasons).collect())
    }

    /// How fast a counter grows, per second. An agent that starts begins anew.
    fn rate(&self, before: Option<&Self>, elapsed: Duration, name: &str) -> f64 {
        let before = before.and_then(|before| before.0.get(name));
        let (Some(before), Some(now)) = (before, self.0.get(name)) else {
            return 0.0;
        };
        let grown = now.saturating_sub(*before);
        grown as f64 / elapsed.as_secs_f64().max(0.001)
    }
}

/// Of packets: what comes once in a while is more than nothing.
fn per_second(rate: f64) -> String {
    match rate > 0.0 && rate < 10.0 {
        true => format!("{rate:.1}/s"),
        false => format!("{rate:.0}/s"),
    }
}

fn lines(
    top: &v1::TopResponse,
    seen: &Seen,
    before: Option<&Seen>,
    elapsed: Duration,
) -> Vec<String> {
    let rate = |name: String| seen.rate(before, elapsed, &name);
    let bytes_per_second = |rate: f64| format!("{}/s", bytes(rate as u64));
    let peers = top.peers.iter().take(ROWS).map(|peer| {
        [
            peer.name.clone(),
            peer.flows.to_string(),
            bytes(peer.received_bytes),
            bytes_per_second(rate(format!("received {}", peer.name))),
            bytes(peer.sent_bytes),
            bytes_per_second(rate(format!("sent {}", peer.name))),
        ]
    });
    let header = ["PEER", "FLOWS", "RECEIVED", "NOW", "SENT", "NOW"];
    let mut lines = table(header, peers);
    let counters = top.counters.clone().unwrap_or_default();

    let mut rules = counters.rules;
    rules.sort_by_key(|rule| std::cmp::Reverse(rule.packets));
    let rules = rules.iter().filter(|rule| rule.packets > 0).take(ROWS);
    let rules = rules.map(|rule| {
        [
            rule.place.clone(),
            rule.summary.clone(),
            rule.packets.to_string(),
            per_second(rate(format!("rule {}", rule.rule))),
        ]
    });
    lines.push(String::new());
    lines.extend(table(["POLICY", "RULE", "DECIDED", "NOW"], rules));

    let mut drops = counters.reasons;
    drops.retain(|counter| counter.reason != "passed");
    drops.sort_by_key(|counter| std::cmp::Reverse(counter.packets));
    let drops = drops.iter().take(ROWS).map(|counter| {
        let name = format!("reason {} {}", counter.reason, counter.direction);
        [
            counter.reason.clone(),
            counter.direction.clone(),
            counter.packets.to_string(),
            per_second(rate(name)),
        ]
    });
    lines.push(String::new());
    lines.extend(table(["DROPPED", "DIRECTION", "PACKETS", "NOW"], drops));
    lines
}

fn top_json(top: &v1::TopResponse) -> Value {
    json!({
        "peers": top.peers.iter().map(|peer| json!({
            "name": peer.name,
            "flows": peer.flows,
            "received_packets": peer.received_packets,
            "received_bytes": peer.received_bytes,
            "sent_packets": peer.sent_packets,
            "sent_bytes": peer.sent_bytes,
        })).collect::<Vec<_>>(),
        "counters": counters_json(&top.counters.clone().unwrap_or_default()),
    })
}

// === debug maps ===

pub(super) async fn maps(agent: &mut Client, json: bool) -> Result<(), Failed> {
    let maps = agent.maps(v1::MapsRequest {}).await?.into_inner().maps;
    if json {
        let maps: Vec<_> = maps
            .iter()
            .map(|usage| {
                json!({
                    "name": usage.name,
                    "entries": usage.entries,
                    "capacity": usage.capacity,
                    "memory_bytes": usage.memory_bytes,
                })
            })
            .collect();
        return say(&pretty(&json!({ "maps": maps })));
    }
    let rows = maps.iter().map(|usage| {
        [
            usage.name.clone(),
            usage.entries.to_string(),
            usage.capacity.to_string(),
            bytes(usage.memory_bytes),
        ]
    });
    for line in table(["MAP", "ENTRIES", "CAPACITY", "MEMORY"], rows) {
        say(&line)?;
    }
    Ok(())
}
