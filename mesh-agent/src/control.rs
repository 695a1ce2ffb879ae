//! The shell of the control session: one TLS channel, tonic inside, and the steps of
//! [`mesh_core::control::Session`] carried out on it.
//!
//! Every channel has a number and a task of its own; what an old channel still has to say is
//! recognised by its number and dropped. So the machine never hears of the past.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use mesh_api::channel::Trust;
use mesh_api::update::{Refused as Rejected, Verifier};
use mesh_api::v1::control_client::ControlClient;
use mesh_api::v1::netmap_update::Body;
use mesh_api::{Join, PROTOCOL, v1};
use mesh_core::control::{
    Accepted, Failure, Hello, Keys, Kind, Membership, Notice, Refused, Transmit,
};
use mesh_core::key::{MachinePublic, NodePublic};
use mesh_core::netmap::{Netmap, StaleGeneration};
use mesh_core::node::{HostInfo, MeshId, NodeId, UnixTime};
use prost::Message as _;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tracing::Instrument as _;

mod connect;

/// Steps that may wait for a slow channel. The machine has at most a handful under way.
const STEPS: usize = 32;
/// No netmap is larger; a coordinator that says otherwise must not fill the memory.
const LARGEST_MESSAGE: usize = 16 << 20;
/// Longest text of the coordinator that is shown to people.
const LONGEST_TEXT: usize = 500;
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Where to connect, and as whom.
#[derive(Clone, Debug)]
pub struct Target {
    pub join: Join,
    /// The coordinator's key, if it was seen before.
    pub coordinator: Option<MachinePublic>,
    pub host: HostInfo,
}

/// What happened on a channel.
#[derive(Debug)]
pub enum Report {
    /// The key behind the pin.
    CoordinatorKey(MachinePublic),
    Hello(Hello),
    Enrolled(Membership),
    Update(v1::SignedUpdate),
    Notice(Notice),
    Failed(Failure),
}

/// A report, and the channel that it is from.
#[derive(Debug)]
pub struct Numbered {
    pub channel: u64,
    pub report: Report,
}

/// The channel in use, by its number, for questions that are none of the session's business.
pub type Line = Option<(u64, ControlClient<Channel>)>;

/// Asks the coordinator on whatever channel is open.
#[derive(Clone, Debug)]
pub struct Asker(watch::Receiver<Line>);

impl Asker {
    /// Who may open what, also where this node is no end of it.
    pub async fn ask_policy(
        &self,
        question: v1::PolicyQuestion,
    ) -> Result<v1::PolicyAnswer, tonic::Status> {
        let line = self.0.borrow().clone();
        let Some((_, mut client)) = line else {
            return Err(tonic::Status::unavailable(
                "this is about other nodes: the coordinator answers that, and there is no \
                 session with it now (`mesh status` says why)",
            ));
        };
        match tokio::time::timeout(CALL_TIMEOUT, client.ask_policy(question)).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) if status.code() == tonic::Code::Unimplemented => {
                Err(tonic::Status::failed_precondition(
                    "this coordinator answers no questions about the policy: update it",
                ))
            }
            Ok(Err(status)) => Err(tonic::Status::new(status.code(), shown(status.message()))),
            Err(_) => Err(tonic::Status::deadline_exceeded(
                "the coordinator did not answer in time",
            )),
        }
    }
}

/// The sending end of an [`Asker`].
pub fn asker() -> (watch::Sender<Line>, Asker) {
    let (line, reader) = watch::channel(None);
    (line, Asker(reader))
}

/// The agent's end of the control channel. Dropping it closes the channel.
#[derive(Debug)]
pub struct Client {
    keys: Keys,
    line: watch::Sender<Line>,
    reports: mpsc::Sender<Numbered>,
    number: u64,
    current: Option<(mpsc::Sender<Transmit>, JoinHandle<()>)>,
}

impl Client {
    pub fn new(keys: Keys, line: watch::Sender<Line>, reports: mpsc::Sender<Numbered>) -> Self {
        Self {
            keys,
            line,
            reports,
            number: 0,
            current: None,
        }
    }

    /// Whether a report is from the channel in use.
    pub fn is_current(&self, numbered: &Numbered) -> bool {
        self.current.is_some() && numbered.channel == self.number
    }

    /// Opens a new channel, closing the one before.
    pub fn connect(&mut self, target: Target) {
        self.close();
        self.number += 1;
        let (steps, inbox) = mpsc::channel(STEPS);
        let (keys, reports, channel) = (self.keys.clone(), self.reports.clone(), self.number);
        let line = self.line.clone();
        let task = async move {
            let out = Out {
                channel,
                reports,
                line,
            };
            if let Err(failure) = converse(&target, &keys, inbox, &out).await {
                out.tell(Report::Failed(failure)).await;
            }
        };
        let span = tracing::info_span!("control", channel);
        self.current = Some((steps, tokio::spawn(task.instrument(span))));
    }

    /// Hands a step to the channel; false when there is none that takes it.
    pub fn step(&self, step: Transmit) -> bool {
        self.current
            .as_ref()
            .is_some_and(|(steps, _)| steps.try_send(step).is_ok())
    }

    /// Lets what was handed over go out, then closes.
    pub fn close(&mut self) {
        // A client that somebody holds would keep the channel open.
        self.line.send_replace(None);
        if let Some((steps, task)) = self.current.take() {
            // The task ends when its steps do; a task that hangs is cut off.
            drop(steps);
            let abort = task.abort_handle();
            tokio::spawn(async move {
                if tokio::time::timeout(CALL_TIMEOUT, task).await.is_err() {
                    abort.abort();
                }
            });
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.line.send_replace(None);
        if let Some((_, task)) = self.current.take() {
            task.abort();
        }
    }
}

struct Out {
    channel: u64,
    reports: mpsc::Sender<Numbered>,
    line: watch::Sender<Line>,
}

impl Drop for Out {
    fn drop(&mut self) {
        let own = |line: &Line| {
            line.as_ref()
                .is_some_and(|(number, _)| *number == self.channel)
        };
        self.line
            .send_if_modified(|line| own(line) && line.take().is_some());
    }
}

impl Out {
    async fn tell(&self, report: Report) {
        let channel = self.channel;
        // Fails only when the event loop is gone, and then nobody wants to know.
        let _ = self.reports.send(Numbered { channel, report }).await;
    }
}

/// One channel from its first byte to its last.
async fn converse(
    target: &Target,
    keys: &Keys,
    mut steps: mpsc::Receiver<Transmit>,
    out: &Out,
) -> Result<(), Failure> {
    let trusts = match target.coordinator {
        Some(key) if target.join.pins.contains(&key.pin()) => vec![Trust::Key(key)],
        _ => target.join.pins.iter().copied().map(Trust::Pin).collect(),
    };
    let opened = connect::open(&target.join, &keys.machine, &trusts)
        .await
        .map_err(|error| Failure::Unreachable(format!("{error:#}")))?;
    out.tell(Report::CoordinatorKey(opened.coordinator)).await;
    let mut client = ControlClient::new(opened.channel).max_decoding_message_size(LARGEST_MESSAGE);
    let hello = hello(&mut client, opened.exporter).await?;
    out.tell(Report::Hello(hello)).await;
    out.line.send_replace(Some((out.channel, client.clone())));

    while let Some(step) = steps.recv().await {
        match step {
            Transmit::Enroll { enroll, proof } => {
                let request = v1::EnrollRequest {
                    auth_key: enroll.auth_key.clone(),
                    node: Some(node_proof(keys, proof)),
                    host: Some((&target.host).into()),
                    name: enroll.name.clone(),
                };
                let call = client.enroll(request);
                let response = timely(call).await?.into_inner();
                out.tell(Report::Enrolled(membership(&response)?)).await;
            }
            Transmit::Begin { proof, held } => {
                let begin = v1::Begin {
                    node: Some(node_proof(keys, proof)),
                    host: Some((&target.host).into()),
                    held: held.map(|held| (&mesh_api::held::Held::of(&held)).into()),
                };
                return stream(&mut client, begin, steps, out).await;
            }
            Transmit::Close => return Ok(()),
            Transmit::Connect | Transmit::Report(_) | Transmit::Applied(_) | Transmit::Logout => {}
        }
    }
    Ok(())
}

async fn hello(client: &mut ControlClient<Channel>, exporter: [u8; 32]) -> Result<Hello, Failure> {
    let request = v1::HelloRequest {
        protocol: PROTOCOL,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let response = timely(client.hello(request)).await?.into_inner();
    if response.protocol != PROTOCOL {
        return Err(Failure::Denied(format!(
            "the coordinator speaks protocol {}, this agent speaks {PROTOCOL}: update the older one",
            response.protocol
        )));
    }
    let challenge = NodePublic::try_from(response.challenge.as_slice())
        .map_err(|error| malformed("challenge", &error))?;
    Ok(Hello {
        challenge,
        exporter,
        now: UnixTime(response.now),
        node: response.node_id.map(NodeId),
    })
}

/// The session's stream: steps up, updates down, until either side ends it.
async fn stream(
    client: &mut ControlClient<Channel>,
    begin: v1::Begin,
    mut steps: mpsc::Receiver<Transmit>,
    out: &Out,
) -> Result<(), Failure> {
    let (up, outbound) = mpsc::channel(STEPS);
    let begin = message(v1::agent_message::Message::Begin(begin));
    up.send(begin).await.map_err(|_| ended())?;
    let outbound = tokio_stream::wrappers::ReceiverStream::new(outbound);
    let mut inbound = timely(client.session(outbound)).await?.into_inner();

    let send = async {
        while let Some(step) = steps.recv().await {
            let next = match step {
                Transmit::Report(report) => v1::agent_message::Message::Report(v1::Report {
                    endpoints: report.endpoints.iter().map(|at| (*at).into()).collect(),
                    advertised_routes: report
                        .advertised_routes
                        .iter()
                        .map(|net| (*net).into())
                        .collect(),
                }),
                Transmit::Applied(applied) => v1::agent_message::Message::Applied(v1::Applied {
                    epoch: applied.epoch.0,
                    generation: applied.generation.0,
                    error: applied.error.unwrap_or_default(),
                }),
                Transmit::Logout => v1::agent_message::Message::Logout(v1::Logout {}),
                Transmit::Connect | Transmit::Enroll { .. } | Transmit::Begin { .. } => continue,
                Transmit::Close => break,
            };
            up.send(message(next)).await.map_err(|_| ended())?;
        }
        // The stream up ends; the coordinator reads what is in it and ends the stream down.
        drop(up);
        Ok(())
    };
    let receive = async {
        while let Some(message) = inbound.message().await.map_err(|status| failure(&status))? {
            match message.message {
                Some(v1::coordinator_message::Message::Update(update)) => {
                    out.tell(Report::Update(update)).await;
                }
                Some(v1::coordinator_message::Message::Notice(told)) => {
                    out.tell(Report::Notice(notice(&told))).await;
                }
                // A newer coordinator may say more than this agent understands.
                None => {}
            }
        }
        Err::<(), _>(ended())
    };
    tokio::try_join!(send, receive).map(|_| ())
}

fn message(message: v1::agent_message::Message) -> v1::AgentMessage {
    v1::AgentMessage {
        message: Some(message),
    }
}

fn ended() -> Failure {
    Failure::Unreachable("the coordinator ended the session".to_owned())
}

async fn timely<T>(call: impl Future<Output = Result<T, tonic::Status>>) -> Result<T, Failure> {
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(result) => result.map_err(|status| failure(&status)),
        Err(_) => Err(Failure::Unreachable(
            "the coordinator did not answer in time".to_owned(),
        )),
    }
}

/// Sorts an answer into "no" and "not now".
fn failure(status: &tonic::Status) -> Failure {
    let text = shown(status.message());
    let text = if text.is_empty() {
        format!("the coordinator answered {:?}", status.code())
    } else {
        text
    };
    match status.code() {
        tonic::Code::PermissionDenied
        | tonic::Code::Unauthenticated
        | tonic::Code::InvalidArgument
        | tonic::Code::FailedPrecondition
        | tonic::Code::NotFound
        | tonic::Code::AlreadyExists
        | tonic::Code::Unimplemented => Failure::Denied(text),
        _ => Failure::Unreachable(text),
    }
}

/// Text from the other end, made fit for a terminal and a log line.
fn shown(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(LONGEST_TEXT)
        .collect()
}

fn malformed(field: &str, error: &dyn std::fmt::Display) -> Failure {
    Failure::Unreachable(format!(
        "the coordinator's answer is malformed: {field}: {error}"
    ))
}

fn node_proof(keys: &Keys, proof: mesh_core::key::NodeProof) -> v1::NodeProof {
    v1::NodeProof {
        key: keys.node.public().0.to_vec(),
        proof: proof.0.to_vec(),
    }
}

fn membership(response: &v1::EnrollResponse) -> Result<Membership, Failure> {
    let mesh = response.mesh.as_ref().map_or(&[][..], |mesh| &mesh.id);
    let mesh = mesh
        .try_into()
        .map_err(|_| malformed("mesh", &"an id is 16 bytes"))?;
    Ok(Membership {
        mesh: MeshId(mesh),
        node: NodeId(response.node_id),
    })
}

fn notice(notice: &v1::Notice) -> Notice {
    let text = shown(&notice.text);
    match notice.kind() {
        v1::notice::Kind::Deleted => Notice::Deleted(text),
        v1::notice::Kind::Replaced => Notice::Replaced(text),
        v1::notice::Kind::Shutdown | v1::notice::Kind::Unspecified => Notice::Shutdown {
            retry_after: Duration::from_millis(notice.retry_after_ms.into()),
        },
    }
}

/// Verifies `signed` and reads it: the door between the wire and [`mesh_core::control`].
pub fn accept(
    coordinator: &MachinePublic,
    membership: Option<Membership>,
    held: Option<&Netmap>,
    signed: &v1::SignedUpdate,
) -> Result<Accepted, Refused> {
    let verifier = Verifier {
        coordinator: *coordinator,
        addressee: membership.map(|membership| (membership.mesh, membership.node)),
    };
    let netmap = verifier
        .accept(held, signed)
        .map_err(|rejected| match rejected {
            Rejected::Gap | Rejected::Stale(StaleGeneration::Digest) => Refused::Gap,
            Rejected::Stale(StaleGeneration::Backwards {
                have: _,
                got: generation,
            }) => Refused::Stale {
                epoch: held.map_or_else(Default::default, |held| held.epoch),
                generation,
            },
            Rejected::Stale(StaleGeneration::Epoch { have, got }) if got > have => Refused::Gap,
            Rejected::Stale(StaleGeneration::Epoch {
                have: _,
                got: epoch,
            }) => Refused::Stale {
                epoch,
                generation: Default::default(),
            },
            Rejected::Signature | Rejected::Malformed(_) | Rejected::Misdirected => {
                Refused::Untrusted(chain_text(&rejected))
            }
        })?;
    let full = v1::NetmapUpdate::decode(signed.update.as_slice())
        .is_ok_and(|update| matches!(update.body, Some(Body::Full(_))));
    Ok(Accepted {
        netmap,
        kind: if full { Kind::Full } else { Kind::Delta },
        signed: Arc::from(signed.encode_to_vec()),
    })
}

fn chain_text(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// Parses a join string, with the hint that a user needs.
pub fn parse_join(text: &str) -> anyhow::Result<Join> {
    text.parse::<Join>().context("the join string is not valid")
}
