//! `/metrics` and `/readyz` on loopback, for those who watch.
//!
//! Anybody on this machine may read them, so they hold counts and no names or addresses.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_common::maps::Count;
use mesh_core::agent::Standing;
use mesh_core::health::Severity;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::dataplane::Counters;
use crate::snapshot::Snapshot;
use crate::stack::Handle;

/// Scrapers at once.
const MOST_CONNECTIONS: usize = 8;
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

pub async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("listen for metrics at {address}"))
}

/// Serves until `stop`.
pub async fn serve(
    listener: TcpListener,
    snapshot: watch::Receiver<Snapshot>,
    handle: watch::Receiver<Option<Handle>>,
    stop: CancellationToken,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            accepted = listener.accept(), if connections.len() < MOST_CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(converse(stream, snapshot.clone(), handle.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "accept on the metrics port");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

async fn converse(
    stream: TcpStream,
    snapshot: watch::Receiver<Snapshot>,
    handle: watch::Receiver<Option<Handle>>,
) {
    let answer = service_fn(move |request: Request<Incoming>| {
        let handle = handle.borrow().clone();
        let counters = handle.and_then(|handle| handle.enforcer.counters().ok());
        let look = snapshot.borrow().clone();
        let response = respond(
            request.method(),
            request.uri().path(),
            &look,
            counters.as_ref(),
        );
        std::future::ready(Ok::<_, Infallible>(response))
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), answer)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "connection on the metrics port ended");
    }
}

fn respond(
    method: &Method,
    path: &str,
    look: &Snapshot,
    counters: Option<&Counters>,
) -> Response<String> {
    let (status, body) = match (method, path) {
        (&Method::GET, "/metrics") => (StatusCode::OK, metrics(look, counters)),
        (&Method::GET, "/readyz") => readiness(look),
        (&Method::GET, _) => (StatusCode::NOT_FOUND, "no such page\n".to_owned()),
        _ => (StatusCode::METHOD_NOT_ALLOWED, "only GET\n".to_owned()),
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
}

/// Ready: the node enforces what it was told and nothing essential is broken.
fn readiness(look: &Snapshot) -> (StatusCode, String) {
    let mut errors = look
        .health
        .iter()
        .filter(|(_, condition)| condition.severity == Severity::Error)
        .map(|(name, _)| name)
        .peekable();
    if errors.peek().is_some() {
        let names: Vec<&str> = errors.collect();
        let text = format!("not ready: {}\n", names.join(", "));
        (StatusCode::SERVICE_UNAVAILABLE, text)
    } else if look.is_ready() {
        (StatusCode::OK, "ready\n".to_owned())
    } else {
        let text = "not ready: no policy is applied yet\n".to_owned();
        (StatusCode::SERVICE_UNAVAILABLE, text)
    }
}

fn metrics(look: &Snapshot, counters: Option<&Counters>) -> String {
    let mut text = String::new();
    let mut one = |name: &str, help: &str, kind: &str, value: u64| {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}"
        );
    };
    let netmap = look.netmap.as_deref();
    one(
        "mesh_agent_up",
        "1 when the node runs with a valid key.",
        "gauge",
        u64::from(look.standing == Standing::Running),
    );
    one(
        "mesh_control_connected",
        "1 while a session with the coordinator stands.",
        "gauge",
        u64::from(look.connected),
    );
    one(
        "mesh_netmap_generation",
        "Generation of the netmap held.",
        "gauge",
        netmap.map_or(0, |netmap| netmap.generation.0),
    );
    one(
        "mesh_applied_generation",
        "Newest generation that every enforcing part has applied.",
        "gauge",
        look.applied.map_or(0, |(_, generation)| generation.0),
    );
    one(
        "mesh_netmap_peers",
        "Peers in the netmap.",
        "gauge",
        netmap.map_or(0, |netmap| netmap.peers.len() as u64),
    );
    one(
        "mesh_control_refused_updates_total",
        "Updates of the coordinator that were refused.",
        "counter",
        look.refused,
    );
    let name = "mesh_agent_health";
    let help = "1 for every condition that stands.";
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge");
    for (condition, _) in look.health.iter() {
        let _ = writeln!(text, "{name}{{condition=\"{condition}\"}} 1");
    }
    if let Some(counters) = counters {
        dataplane(&mut text, look, counters);
    }
    text
}

/// A counter of packets and one of bytes, of the same things.
fn counts(
    text: &mut String,
    what: &str,
    help: &str,
    counts: impl Iterator<Item = (String, Count)> + Clone,
) {
    for unit in ["packets", "bytes"] {
        let name = format!("mesh_dataplane_{what}_{unit}_total");
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} counter");
        for (labels, count) in counts.clone() {
            let value = match unit {
                "packets" => count.packets,
                _ => count.bytes,
            };
            let _ = writeln!(text, "{name}{{{labels}}} {value}");
        }
    }
}

/// As a label's value (Prometheus text format 0.0.4).
fn escaped(value: &str) -> String {
    let value = value.replace('\\', r"\\").replace('"', r#"\""#);
    value.replace('\n', r"\n")
}

fn dataplane(text: &mut String, look: &Snapshot, counters: &Counters) {
    let passed = counters.passed.iter().map(|(direction, count)| {
        let labels = format!("direction=\"{}\"", direction.name());
        (labels, *count)
    });
    counts(text, "passed", "What the policy let pass.", passed);
    let dropped = counters.dropped.iter().map(|((direction, reason), count)| {
        let (direction, reason) = (direction.name(), reason.name());
        let labels = format!("direction=\"{direction}\",reason=\"{reason}\"");
        (labels, *count)
    });
    counts(text, "dropped", "What was dropped, by reason.", dropped);
    let rules = look.netmap.as_deref().map(|netmap| &netmap.policy.rules);
    let rules = counters.rules.iter().map(|(rule, count)| {
        // A rule that the policy no longer has goes on counting until its counter is taken away.
        let known = rules.and_then(|rules| rules.get(rule));
        let (file, line) = known.map_or(("", 0), |rule| (&*rule.file, rule.line));
        let file = escaped(file);
        let labels = format!("rule=\"{}\",file=\"{file}\",line=\"{line}\"", rule.0);
        (labels, *count)
    });
    let help = "Flows that a rule admitted by their first packet, and packets that it refused.";
    counts(text, "rule", help, rules);
    let name = "mesh_dataplane_events_lost_total";
    let help = "Events of the flow log that could not be told, by kind.";
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} counter");
    for (kind, count) in &counters.events_lost {
        let _ = writeln!(text, "{name}{{kind=\"{}\"}} {count}", kind.name());
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::health::Condition;

    use super::*;

    fn broken() -> Snapshot {
        Snapshot::broken(
            "StateCorrupt",
            Condition {
                severity: Severity::Error,
                text: "keys is empty".to_owned(),
                next_step: "restore",
            },
        )
    }

    #[test]
    fn a_broken_agent_is_not_ready_and_says_why() {
        let response = respond(&Method::GET, "/readyz", &broken(), None);
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(response.body(), "not ready: StateCorrupt\n");
    }

    #[test]
    fn conditions_are_metrics() {
        let response = respond(&Method::GET, "/metrics", &broken(), None);
        let text = response.body();
        assert!(text.contains("mesh_agent_health{condition=\"StateCorrupt\"} 1\n"));
        assert!(text.contains("mesh_control_connected 0\n"));
    }

    #[test]
    fn packets_are_counted_by_reason_and_by_rule() {
        use mesh_common::{Direction, DropReason, RuleId};
        let count = Count {
            packets: 3,
            bytes: 180,
        };
        let counters = Counters {
            dropped: [((Direction::Ingress, DropReason::NoRule), count)].into(),
            rules: [(RuleId(7), count)].into(),
            ..Counters::default()
        };
        let response = respond(&Method::GET, "/metrics", &broken(), Some(&counters));
        for line in [
            "mesh_dataplane_dropped_bytes_total{direction=\"ingress\",reason=\"no rule\"} 180\n",
            "mesh_dataplane_rule_packets_total{rule=\"7\",file=\"\",line=\"0\"} 3\n",
        ] {
            assert!(response.body().contains(line), "{}", response.body());
        }
    }

    #[test]
    fn a_label_ends_where_it_should() {
        assert_eq!(escaped("a\"b\\c\nd.hujson"), r#"a\"b\\c\nd.hujson"#);
    }

    #[test]
    fn only_get_and_only_known_pages() {
        let status = |method, path| respond(method, path, &broken(), None).status();
        assert_eq!(
            status(&Method::POST, "/metrics"),
            StatusCode::METHOD_NOT_ALLOWED
        );
        assert_eq!(status(&Method::GET, "/"), StatusCode::NOT_FOUND);
    }
}
