//! Figures for Prometheus, and whether this coordinator is ready.
//!
//! `/metrics` and `/readyz` are served over plain HTTP on loopback. There is nothing to change
//! there and nothing secret: names, keys and addresses of nodes never become labels.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::sessions::Sessions;
use crate::world::Handle;

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug, Default)]
pub struct Metrics {
    pub fulls: Counter,
    pub deltas: Counter,
    pub unchanged: Counter,
    pub enrolled: Counter,
    pub enrolments_refused: Counter,
    pub connections: Counter,
    pub connections_refused: Counter,
    pub handshakes_failed: Counter,
    pub accept_errors: Counter,
}

impl Metrics {
    fn counters(&self) -> [(&'static str, &'static str, &Counter); 9] {
        [
            ("netmap_full_total", "Whole netmaps sent.", &self.fulls),
            ("netmap_delta_total", "Netmap deltas sent.", &self.deltas),
            (
                "netmap_unchanged_total",
                "Reconnects answered with \"unchanged\".",
                &self.unchanged,
            ),
            ("enrolled_total", "Nodes enrolled.", &self.enrolled),
            (
                "enrolments_refused_total",
                "Enrolments refused.",
                &self.enrolments_refused,
            ),
            (
                "connections_total",
                "Channels that finished their handshake.",
                &self.connections,
            ),
            (
                "connections_refused_total",
                "Connections turned away because there were too many.",
                &self.connections_refused,
            ),
            (
                "handshakes_failed_total",
                "Handshakes that failed or took too long.",
                &self.handshakes_failed,
            ),
            (
                "accept_errors_total",
                "Failures of the listener to accept.",
                &self.accept_errors,
            ),
        ]
    }

    fn render(&self, world: &Handle, sessions: &Sessions) -> String {
        let current = world.current();
        let ready = world.trouble().is_none();
        let gauges = [
            (
                "generation",
                "Generation of the world.",
                current.world.generation.0,
            ),
            ("epoch", "Epoch of the world.", current.world.epoch.0),
            ("nodes", "Enrolled nodes.", current.world.nodes.len() as u64),
            (
                "nodes_connected",
                "Nodes with a session.",
                sessions.connected() as u64,
            ),
            (
                "ready",
                "Whether the database takes writes.",
                u64::from(ready),
            ),
        ];
        let mut text = String::new();
        let mut family = |kind: &str, name: &str, help: &str, value: u64| {
            let name = format!("mesh_coordinator_{name}");
            let _ = writeln!(text, "# HELP {name} {help}");
            let _ = writeln!(text, "# TYPE {name} {kind}");
            let _ = writeln!(text, "{name} {value}");
        };
        for (name, help, value) in gauges {
            family("gauge", name, help, value);
        }
        for (name, help, counter) in self.counters() {
            family("counter", name, help, counter.value());
        }
        text
    }
}

/// Answers until `shutdown`.
pub async fn serve(
    listener: TcpListener,
    metrics: Arc<Metrics>,
    world: Handle,
    sessions: Sessions,
    shutdown: CancellationToken,
) {
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "accept on the metrics listener");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (metrics, world, sessions) = (metrics.clone(), world.clone(), sessions.clone());
        let stop = shutdown.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| {
                let answer = answer(&request, &metrics, &world, &sessions);
                async { Ok::<_, Infallible>(answer) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(5))
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            let served = tokio::select! {
                () = stop.cancelled() => return,
                served = tokio::time::timeout(Duration::from_secs(10), connection) => served,
            };
            if let Ok(Err(error)) = served {
                debug!(%error, "serve metrics");
            }
        });
    }
}

fn answer<B>(
    request: &http::Request<B>,
    metrics: &Metrics,
    world: &Handle,
    sessions: &Sessions,
) -> http::Response<String> {
    let (status, body) = match (request.method(), request.uri().path()) {
        // A page in a browser has no business here (DNS rebinding).
        _ if request.headers().contains_key(http::header::ORIGIN) => {
            (403, "no browsers\n".to_owned())
        }
        (&http::Method::GET, "/metrics") => (200, metrics.render(world, sessions)),
        (&http::Method::GET, "/readyz") => match world.trouble() {
            None => (200, "ready\n".to_owned()),
            Some(trouble) => (503, format!("not ready: {trouble}\n")),
        },
        (_, "/metrics" | "/readyz") => (405, "only GET\n".to_owned()),
        _ => (404, "here are /metrics and /readyz\n".to_owned()),
    };
    let mut response = http::Response::new(body);
    *response.status_mut() =
        http::StatusCode::from_u16(status).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(
        http::header::CONTENT_TYPE,
        http::HeaderValue::from_static("text/plain; version=0.0.4"),
    );
    response
}
