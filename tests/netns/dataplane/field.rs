//! A node under traffic that is allowed and traffic that is denied, counted where it arrives.

use std::collections::BTreeMap;
use std::net::{IpAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mesh_tests::mesh::{Backend, Family, Mesh, Node};
use mesh_tests::{Host, Lab, eventually, until};
use serde_json::Value;

pub(super) const PORT: u16 = 9000;
const PACE: Duration = Duration::from_millis(5);
/// For whatever must happen soon.
pub(super) const SOON: Duration = Duration::from_secs(10);

/// The kernel's WireGuard only where somebody asks for it: the machine may not have it.
pub(super) fn backend() -> Backend {
    match std::env::var("MESH_BACKEND").as_deref() {
        Ok("kernel") => Backend::Kernel,
        _ => Backend::Auto,
    }
}

/// The example policy, with one port of nodes open to operators.
pub(super) fn policy() -> String {
    let rule = "{\"action\": \"accept\", \"proto\": \"udp\", \"src\": [\"tag:operator\"], \"dst\": [\"tag:node:9000\"]},";
    mesh_core::policy::EXAMPLE.replacen("\"acls\": [", &format!("\"acls\": [{rule}"), 1)
}

pub(super) struct Field {
    // First, so that traffic stops before its hosts go.
    allowed: Source,
    /// Likewise, and each datagram is answered: its flow is established, the other's stays half-open.
    answered: Source,
    _denied: Source,
    sink: Sink,
    pub(super) mesh: Mesh,
    operator: IpAddr,
    sandbox: IpAddr,
}

impl Field {
    /// Traffic runs, and what is denied is dropped by the node itself.
    pub(super) fn new() -> Self {
        let lab = Lab::of_release_build().unwrap();
        Self::of(Mesh::of_roles(lab, &policy(), backend()).unwrap())
    }

    /// Likewise, and the node may load no programs.
    pub(super) fn in_process() -> Self {
        let lab = Lab::of_release_build().unwrap();
        Self::of(Mesh::in_process(lab, &policy()).unwrap())
    }

    fn of(mesh: Mesh) -> Self {
        let to = mesh.node("node").address(Family::V4).unwrap();
        let address = |name| mesh.node(name).address(Family::V4).unwrap();
        let (operator, sandbox) = (address("operator"), address("sandbox"));
        mesh.node("sandbox").disarm().unwrap();
        let field = Self {
            sink: Sink::start(&mesh.node("node").host),
            allowed: Source::start(&mesh.node("operator").host, to, STATEMENT),
            answered: Source::start(&mesh.node("operator").host, to, QUESTION),
            _denied: Source::start(&mesh.node("sandbox").host, to, QUESTION),
            mesh,
            operator,
            sandbox,
        };
        field.wait_for_traffic();
        until("denied packets arrive", SOON, || field.refused() > 10).unwrap();
        field
    }

    pub(super) fn node(&self) -> &Node {
        self.mesh.node("node")
    }

    pub(super) fn node_mut(&mut self) -> &mut Node {
        self.mesh.node_mut("node")
    }

    pub(super) fn is_kernel(&self) -> bool {
        self.node().status().unwrap()["backend"] == "kernel"
    }

    /// Denied packets that the node's filter has dropped.
    pub(super) fn refused(&self) -> u64 {
        self.node().dropped("no rule", "ingress").unwrap()
    }

    pub(super) fn delivered(&self) -> u64 {
        self.sink.count(self.operator)
    }

    pub(super) fn trespassed(&self) -> u64 {
        self.sink.count(self.sandbox)
    }

    /// When the last packet that should not have come came.
    pub(super) fn last_trespass(&self) -> Option<Instant> {
        self.sink.last(self.sandbox)
    }

    pub(super) fn wait_for_traffic(&self) {
        let before = self.delivered();
        let flows = until("allowed packets arrive", SOON, || {
            self.delivered() > before + 10
        });
        flows.unwrap_or_else(|error| panic!("{error:#}\n{}", self.mesh.logs()));
    }

    pub(super) fn condition(&self, name: &str) -> Option<Value> {
        let status = self.node().status().unwrap();
        let health = status["health"].as_array().unwrap();
        health.iter().find(|c| c["name"] == name).cloned()
    }

    pub(super) fn wait_for_condition(&self, name: &str) -> Value {
        let found = eventually(SOON, || {
            self.condition(name)
                .ok_or_else(|| anyhow::anyhow!("{name} does not stand"))
        });
        found.unwrap_or_else(|error| panic!("{error:#}\n{}", self.mesh.logs()))
    }

    /// Ends the traffic; how many allowed packets were lost, on the way there and on the way back.
    pub(super) fn lost(&self) -> [u64; 2] {
        self.allowed.stop();
        self.answered.stop();
        let sent = self.allowed.sent() + self.answered.sent();
        // What is on its way arrives.
        let _ = until("the last packets", Duration::from_secs(1), || {
            self.delivered() >= sent && self.answered.answers() >= self.sink.answers()
        });
        let answered = self.sink.answers();
        assert!(answered > 0, "nothing was answered");
        [sent - self.delivered(), answered - self.answered.answers()]
    }
}

/// What nobody answers, and what the sink does.
const STATEMENT: &[u8] = b"statement";
const QUESTION: &[u8] = b"question";

/// Sends a datagram every few milliseconds, from one socket, and counts the answers.
pub(super) struct Source {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    socket: Arc<UdpSocket>,
    answers: Arc<AtomicU64>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Source {
    fn start(host: &Host, to: IpAddr, content: &'static [u8]) -> Self {
        let socket = host
            .inside(|| UdpSocket::bind(("0.0.0.0", 0)))
            .unwrap()
            .unwrap();
        socket.set_nonblocking(true).unwrap();
        let source = Self {
            stop: Arc::default(),
            sent: Arc::default(),
            socket: Arc::new(socket),
            answers: Arc::default(),
            thread: Mutex::new(None),
        };
        let (stopping, counting) = (source.stop.clone(), source.sent.clone());
        let (socket, answers) = (source.socket.clone(), source.answers.clone());
        let thread = std::thread::spawn(move || {
            while !stopping.load(Ordering::Relaxed) {
                if socket.send_to(content, (to, PORT)).is_ok() {
                    counting.fetch_add(1, Ordering::Relaxed);
                }
                count_answers(&socket, &answers);
                std::thread::sleep(PACE);
            }
        });
        *source.thread.lock().unwrap() = Some(thread);
        source
    }

    fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.lock().unwrap().take() {
            thread.join().unwrap();
        }
    }

    /// How many were sent in all.
    fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    fn answers(&self) -> u64 {
        count_answers(&self.socket, &self.answers);
        self.answers.load(Ordering::Relaxed)
    }
}

fn count_answers(socket: &UdpSocket, answers: &AtomicU64) {
    while socket.recv_from(&mut [0; 64]).is_ok() {
        answers.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.stop();
    }
}

type Arrivals = BTreeMap<IpAddr, (u64, Instant)>;

/// Counts what arrives, by sender, and answers questions.
pub(super) struct Sink {
    stop: Arc<AtomicBool>,
    arrivals: Arc<Mutex<Arrivals>>,
    answers: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Sink {
    fn start(host: &Host) -> Self {
        let socket = host
            .inside(|| UdpSocket::bind(("0.0.0.0", PORT)))
            .unwrap()
            .unwrap();
        socket
            .set_read_timeout(Some(Duration::from_millis(50)))
            .unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let arrivals = Arc::new(Mutex::new(Arrivals::new()));
        let answers = Arc::new(AtomicU64::new(0));
        let (stopping, counting, answering) = (stop.clone(), arrivals.clone(), answers.clone());
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while !stopping.load(Ordering::Relaxed) {
                if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                    if &buffer[..length] == QUESTION && socket.send_to(b"answer", from).is_ok() {
                        answering.fetch_add(1, Ordering::Relaxed);
                    }
                    let mut arrivals = counting.lock().unwrap();
                    let now = Instant::now();
                    let (count, last) = arrivals.entry(from.ip()).or_insert((0, now));
                    *count += 1;
                    *last = now;
                }
            }
        });
        Self {
            stop,
            arrivals,
            answers,
            thread: Some(thread),
        }
    }

    fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }

    fn count(&self, from: IpAddr) -> u64 {
        self.arrivals
            .lock()
            .unwrap()
            .get(&from)
            .map_or(0, |(count, _)| *count)
    }

    fn last(&self, from: IpAddr) -> Option<Instant> {
        self.arrivals
            .lock()
            .unwrap()
            .get(&from)
            .map(|(_, last)| *last)
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
