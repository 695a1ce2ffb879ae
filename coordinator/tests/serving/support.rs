//! A coordinator to talk to, an operator's client, and the least agent that there can be.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use coordinator::app::{self, Running};
use coordinator::config::{Config, Settings};
use hyper_util::rt::TokioIo;
use mesh_api::channel::{self, Trust};
use mesh_api::held::Held;
use mesh_api::update::Verifier;
use mesh_api::v1::admin_client::AdminClient;
use mesh_api::v1::control_client::ControlClient;
use mesh_api::{Join, v1};
use mesh_core::key::{MachineKey, NodeKey, NodePublic, ProofContext};
use mesh_core::netmap::Netmap;
use tempfile::TempDir;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Status, Streaming};

/// Nothing that is asked here takes as long, on a busy machine either.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A policy that keeps everybody apart.
pub const DENY_ALL: &str = r#"{"acls": []}"#;

pub fn settings(dir: &Path) -> Settings {
    Settings {
        state_dir: Some(dir.join("state")),
        listen: Some("127.0.0.1:0".parse().unwrap()),
        socket: Some(dir.join("admin.sock")),
        metrics: Some("127.0.0.1:0".parse().unwrap()),
        ephemeral_grace: Some(2),
        ..Settings::default()
    }
}

/// A coordinator in this process.
#[derive(Debug)]
pub struct Coordinator {
    pub dir: TempDir,
    pub running: Option<Running>,
}

impl Coordinator {
    pub async fn start() -> Self {
        let mut coordinator = Self {
            dir: tempfile::tempdir().unwrap(),
            running: None,
        };
        coordinator.launch().await.unwrap();
        coordinator
    }

    pub async fn launch(&mut self) -> anyhow::Result<()> {
        let config = Config::new(settings(self.dir.path()))?;
        self.running = Some(app::start(config).await?);
        Ok(())
    }

    pub async fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            running.stop().await;
        }
    }

    pub async fn restart(&mut self) {
        self.stop().await;
        self.launch().await.unwrap();
    }

    pub fn running(&self) -> &Running {
        self.running.as_ref().unwrap()
    }

    pub fn join(&self) -> Join {
        self.running().joins[0].clone()
    }

    pub fn state(&self, file: &str) -> PathBuf {
        self.dir.path().join("state").join(file)
    }

    pub async fn admin(&self) -> AdminClient<Channel> {
        admin(&self.dir.path().join("admin.sock")).await
    }

    /// A secret for nodes with a tag.
    pub async fn key(&self, reusable: bool) -> String {
        let request = v1::CreateKeyRequest {
            reusable,
            tags: vec!["tag:node".to_owned()],
            ..v1::CreateKeyRequest::default()
        };
        self.admin()
            .await
            .create_key(request)
            .await
            .unwrap()
            .into_inner()
            .secret
    }

    pub async fn set_policy(&self, text: &str) -> Result<u64, Status> {
        let request = v1::SetPolicyRequest {
            text: text.to_owned(),
            file: "test.hujson".to_owned(),
            expect_version: None,
            author: None,
        };
        let set = self.admin().await.set_policy(request).await?;
        Ok(set.into_inner().generation)
    }

    pub async fn nodes(&self) -> Vec<v1::Node> {
        let list = self.admin().await.list_nodes(v1::ListNodesRequest {}).await;
        list.unwrap().into_inner().nodes
    }

    /// An agent with a session of its own.
    pub async fn agent(&self, secret: &str, name: &str) -> (Agent, Session) {
        let agent = Agent::make();
        let mut link = agent.connect(&self.join()).await;
        link.enroll(&agent, secret, name).await.unwrap();
        let session = link.begin(&agent, None).await;
        (agent, session)
    }
}

pub async fn admin(socket: &Path) -> AdminClient<Channel> {
    let socket = socket.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
    });
    let endpoint = Endpoint::from_static("http://coordinator.mesh");
    AdminClient::new(endpoint.connect_with_connector(connector).await.unwrap())
}

/// Two private keys; every agent of a test run has others.
#[derive(Debug, Clone)]
pub struct Agent {
    pub machine: MachineKey,
    pub node: NodeKey,
}

impl Agent {
    pub fn make() -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let mut seed = [0; 32];
        seed[8..16].copy_from_slice(&NUMBER.fetch_add(1, Ordering::Relaxed).to_be_bytes());
        Self {
            machine: MachineKey::from_seed(seed),
            node: NodeKey::from_seed(seed),
        }
    }

    /// The pinned channel, with nothing in it yet.
    pub async fn channel(&self, join: &Join) -> std::io::Result<TlsStream<TcpStream>> {
        let tcp = TcpStream::connect((join.host.as_str(), join.port)).await?;
        let config = channel::client(&self.machine, Trust::Pin(join.pins[0])).unwrap();
        TlsConnector::from(Arc::new(config))
            .connect(channel::server_name(), tcp)
            .await
    }

    pub async fn connect(&self, join: &Join) -> Link {
        let stream = self.channel(join).await.unwrap();
        let exporter = channel::exporter(stream.get_ref().1).unwrap();
        let coordinator = channel::peer_key(stream.get_ref().1).unwrap();
        let mut once = Some(TokioIo::new(stream));
        let connector = tower::service_fn(move |_: Uri| {
            let stream = once.take();
            async move { stream.ok_or_else(|| std::io::Error::other("one channel only")) }
        });
        let endpoint = Endpoint::from_static("http://coordinator.mesh");
        let channel = endpoint.connect_with_connector(connector).await.unwrap();
        let mut client = ControlClient::new(channel);
        let hello = client.hello(hello()).await.unwrap().into_inner();
        let challenge = NodePublic(hello.challenge.as_slice().try_into().unwrap());
        Link {
            client,
            verifier: Verifier {
                coordinator,
                addressee: None,
            },
            node_id: hello.node_id,
            host: None,
            exporter,
            challenge,
        }
    }
}

pub fn hello() -> v1::HelloRequest {
    v1::HelloRequest {
        protocol: mesh_api::PROTOCOL,
        agent_version: "test".to_owned(),
    }
}

/// A channel after Hello.
#[derive(Debug, Clone)]
pub struct Link {
    pub client: ControlClient<Channel>,
    pub node_id: Option<u64>,
    /// What the next session reports of its host.
    pub host: Option<v1::HostInfo>,
    verifier: Verifier,
    exporter: [u8; 32],
    challenge: NodePublic,
}

impl Link {
    pub fn proof(&self, agent: &Agent) -> v1::NodeProof {
        let context = ProofContext {
            exporter: &self.exporter,
            machine: &agent.machine.public(),
            node: &agent.node.public(),
        };
        v1::NodeProof {
            key: agent.node.public().0.to_vec(),
            proof: agent.node.prove(&self.challenge, &context).0.to_vec(),
        }
    }

    pub async fn enroll(
        &mut self,
        agent: &Agent,
        secret: &str,
        name: &str,
    ) -> Result<v1::EnrollResponse, Status> {
        let request = v1::EnrollRequest {
            auth_key: secret.to_owned(),
            node: Some(self.proof(agent)),
            host: Some(v1::HostInfo {
                hostname: name.to_owned(),
                ..v1::HostInfo::default()
            }),
            name: String::new(),
        };
        Ok(self.client.enroll(request).await?.into_inner())
    }

    /// Opens the session and does not wait for the first map.
    pub async fn open(&mut self, agent: &Agent, held: Option<&Netmap>) -> Session {
        let (outbox, messages) = mpsc::channel(16);
        let begin = v1::Begin {
            node: Some(self.proof(agent)),
            host: self.host.clone(),
            held: held.map(|map| v1::Held::from(&Held::of(map))),
        };
        let session = Session {
            outbox,
            inbound: None,
            verifier: self.verifier,
            map: held.cloned(),
            last: None,
            // Dropped with the session: the channel closes.
            _link: self.clone(),
        };
        session.say(v1::agent_message::Message::Begin(begin)).await;
        let inbound = self.client.session(ReceiverStream::new(messages)).await;
        Session {
            inbound: Some(inbound.unwrap().into_inner()),
            ..session
        }
    }

    pub async fn begin(&mut self, agent: &Agent, held: Option<&Netmap>) -> Session {
        let mut session = self.open(agent, held).await;
        session.update().await;
        session
    }
}

/// A node's session: what it holds is verified as an agent would.
#[derive(Debug)]
pub struct Session {
    pub outbox: mpsc::Sender<v1::AgentMessage>,
    inbound: Option<Streaming<v1::CoordinatorMessage>>,
    verifier: Verifier,
    map: Option<Netmap>,
    pub last: Option<v1::NetmapUpdate>,
    _link: Link,
}

impl Session {
    pub async fn say(&self, message: v1::agent_message::Message) {
        let message = v1::AgentMessage {
            message: Some(message),
        };
        self.outbox.send(message).await.unwrap();
    }

    pub fn map(&self) -> &Netmap {
        self.map.as_ref().unwrap()
    }

    pub fn peer_names(&self) -> Vec<&str> {
        let peers = self.map().peers.values();
        peers.map(|peer| peer.name.as_str()).collect()
    }

    /// Whether the last update was a whole map.
    pub fn was_full(&self) -> bool {
        let body = self.last.as_ref().unwrap().body.as_ref().unwrap();
        matches!(body, v1::netmap_update::Body::Full(_))
    }

    /// Whether the last update changed nothing.
    pub fn was_unchanged(&self) -> bool {
        let update = self.last.as_ref().unwrap();
        update.digest_before == update.digest_after
    }

    pub async fn next(&mut self) -> Result<Option<v1::CoordinatorMessage>, Status> {
        let inbound = self.inbound.as_mut().unwrap();
        tokio::time::timeout(PATIENCE, inbound.message())
            .await
            .expect("the coordinator says something")
    }

    /// Takes the next update and acknowledges it.
    pub async fn update(&mut self) -> &Netmap {
        let message = self.next().await.unwrap();
        self.take(message.unwrap_or_default()).await
    }

    /// Takes an update that has arrived, and acknowledges it.
    pub async fn take(&mut self, message: v1::CoordinatorMessage) -> &Netmap {
        let Some(v1::coordinator_message::Message::Update(signed)) = message.message else {
            panic!("not an update: {message:?}");
        };
        let map = self.verifier.accept(self.map.as_ref(), &signed).unwrap();
        self.last = Some(prost::Message::decode(signed.update.as_slice()).unwrap());
        let applied = v1::Applied {
            epoch: map.epoch.0,
            generation: map.generation.0,
            error: String::new(),
        };
        self.map = Some(map);
        self.say(v1::agent_message::Message::Applied(applied)).await;
        self.map()
    }

    /// Takes updates until the map is as wanted.
    pub async fn until(&mut self, wanted: impl Fn(&Netmap) -> bool) -> &Netmap {
        while !wanted(self.map()) {
            self.update().await;
        }
        self.map()
    }

    /// Takes updates until the coordinator ends the session, and says why.
    pub async fn notice(&mut self) -> v1::notice::Kind {
        loop {
            let message = self.next().await.unwrap().and_then(|m| m.message);
            match message {
                Some(v1::coordinator_message::Message::Update(_)) => {}
                Some(v1::coordinator_message::Message::Notice(notice)) => return notice.kind(),
                None => panic!("the session ended without a word"),
            }
        }
    }
}

/// Waits for something that happens by itself.
pub async fn eventually<F: Future<Output = bool>>(what: &str, condition: impl Fn() -> F) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !condition().await {
        assert!(tokio::time::Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A coordinator in a process of its own, so that it can be killed.
#[derive(Debug)]
pub struct Process {
    child: std::process::Child,
    socket: PathBuf,
}

impl Process {
    pub async fn start(dir: &Path) -> Self {
        Self::start_with(dir, None).await
    }

    /// With so many file descriptors at most.
    pub async fn start_with(dir: &Path, descriptors: Option<u32>) -> Self {
        let socket = dir.join("admin.sock");
        let limit = descriptors.map_or_else(String::new, |limit| format!("ulimit -n {limit}; "));
        let child = std::process::Command::new("sh")
            .args(["-c", &format!("{limit}exec \"$@\""), "sh"])
            .arg(env!("CARGO_BIN_EXE_mesh-coordinator"))
            .args([
                "serve",
                "--listen",
                "127.0.0.1:0",
                "--metrics",
                "127.0.0.1:0",
            ])
            .args(["--log", "warn", "--state-dir"])
            .arg(dir.join("state"))
            .arg("--socket")
            .arg(&socket)
            .spawn()
            .unwrap();
        let process = Self { child, socket };
        eventually("the coordinator answers", || async {
            UnixStream::connect(&process.socket).await.is_ok()
        })
        .await;
        process
    }

    pub async fn admin(&self) -> AdminClient<Channel> {
        admin(&self.socket).await
    }

    pub async fn join(&self) -> Join {
        let status = self.admin().await.status(v1::StatusRequest {}).await;
        status.unwrap().into_inner().join.parse().unwrap()
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
