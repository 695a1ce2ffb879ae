//! The nodes' door. Who is calling is what the channel says, in every handler.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mesh_api::v1;
use mesh_core::key::{MachinePublic, NodeKey, NodeProof, NodePublic, ProofContext};
use mesh_core::node::HostInfo;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};
use tracing::{Instrument as _, info, info_span};

use super::error::status;
use super::policy;
use crate::clock::Clock;
use crate::netmap_stream::{self, OUTBOX, Shared};
use crate::preauth::Presented;
use crate::registry::{self, Enrolment};

/// Enrolments tried on one channel: an honest agent needs one or two.
const ENROLMENTS: u32 = 8;
/// What a refused enrolment costs the asker in time.
const REFUSAL_DELAY: Duration = Duration::from_millis(200);

/// What the channel proves of its other end.
#[derive(Clone, Debug)]
pub struct Caller {
    pub machine: MachinePublic,
    pub remote: SocketAddr,
    /// Keying material of this very channel.
    pub exporter: [u8; 32],
    /// Whose public half is this channel's challenge.
    pub challenge: Arc<NodeKey>,
    pub enrolments: Arc<AtomicU32>,
}

impl Caller {
    fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        let caller = request.extensions().get::<Self>().cloned();
        caller.ok_or_else(|| Status::internal("a connection without a caller"))
    }

    /// The WireGuard key that the caller holds the private half of.
    pub fn proven_key(&self, proof: Option<&v1::NodeProof>) -> Result<NodePublic, Status> {
        let proof =
            proof.ok_or_else(|| Status::invalid_argument("the node key's proof is missing"))?;
        let key = NodePublic::try_from(proof.key.as_slice())
            .map_err(|invalid| Status::invalid_argument(format!("the node key: {invalid}")))?;
        let bytes = <[u8; 32]>::try_from(proof.proof.as_slice())
            .map_err(|_| Status::invalid_argument("a proof is 32 bytes"))?;
        let context = ProofContext {
            exporter: &self.exporter,
            machine: &self.machine,
            node: &key,
        };
        if NodeProof(bytes).verify(&self.challenge, &context) {
            Ok(key)
        } else {
            Err(Status::unauthenticated(
                "the proof of the node key does not hold on this channel",
            ))
        }
    }
}

#[derive(Debug)]
pub struct Control {
    pub shared: Shared,
    pub clock: Clock,
    pub tasks: TaskTracker,
}

#[tonic::async_trait]
impl v1::control_server::Control for Control {
    async fn hello(
        &self,
        request: Request<v1::HelloRequest>,
    ) -> Result<Response<v1::HelloResponse>, Status> {
        let caller = Caller::of(&request)?;
        let theirs = request.get_ref().protocol;
        if theirs != mesh_api::PROTOCOL {
            let (ours, side) = (
                mesh_api::PROTOCOL,
                if theirs < mesh_api::PROTOCOL {
                    "update the agent"
                } else {
                    "update the coordinator"
                },
            );
            return Err(Status::failed_precondition(format!(
                "the agent speaks protocol {theirs}, this coordinator speaks {ours}: {side}"
            )));
        }
        let current = self.shared.world.current();
        Ok(Response::new(v1::HelloResponse {
            protocol: mesh_api::PROTOCOL,
            coordinator_version: env!("CARGO_PKG_VERSION").to_owned(),
            challenge: caller.challenge.public().0.to_vec(),
            now: self.clock.now().0,
            node_id: current.node_of(&caller.machine).map(|node| node.id.0),
        }))
    }

    async fn enroll(
        &self,
        request: Request<v1::EnrollRequest>,
    ) -> Result<Response<v1::EnrollResponse>, Status> {
        let caller = Caller::of(&request)?;
        let refused = |status: Status| {
            self.shared.metrics.enrolments_refused.add(1);
            info!(remote = %caller.remote, reason = status.message(), "enrolment refused");
            status
        };
        if caller.enrolments.fetch_add(1, Ordering::Relaxed) >= ENROLMENTS {
            return Err(refused(Status::resource_exhausted(
                "too many enrolments on one connection: connect anew",
            )));
        }
        let request = request.into_inner();
        let enrolment = async {
            let key = caller.proven_key(request.node.as_ref())?;
            let secret = Presented::parse(&request.auth_key)
                .map_err(|refused| Status::permission_denied(refused.to_string()))?;
            let prefix = secret.prefix.clone();
            let enrolment = Enrolment {
                machine: caller.machine,
                key,
                secret,
                name: request.name.chars().take(255).collect(),
                host: HostInfo::from(&request.host.unwrap_or_default()),
            };
            let change = move |draft: &mut _| registry::enroll(draft, enrolment);
            let node = self.shared.world.change(change).await.map_err(status)?;
            Ok((node, prefix))
        };
        let (node, prefix) = match enrolment.await {
            Ok(enrolled) => enrolled,
            Err(error) => {
                tokio::time::sleep(REFUSAL_DELAY).await;
                return Err(refused(error));
            }
        };
        self.shared.metrics.enrolled.add(1);
        info!(node = %node.id, name = %node.name, key = prefix, remote = %caller.remote, "node enrolled");
        let mesh = &self.shared.world.current().world.mesh;
        Ok(Response::new(v1::EnrollResponse {
            node_id: node.id.0,
            name: node.name.to_string(),
            mesh: Some(v1::Mesh::from(mesh.as_ref())),
        }))
    }

    async fn ask_policy(
        &self,
        request: Request<v1::PolicyQuestion>,
    ) -> Result<Response<v1::PolicyAnswer>, Status> {
        let caller = Caller::of(&request)?;
        let current = self.shared.world.current();
        if !current.is_administrators(&caller.machine) {
            return Err(Status::permission_denied(
                "the coordinator answers about other nodes to an administrator's node alone; this \
                 node's user is none (`mesh-coordinator user set USER --role admin` makes one)",
            ));
        }
        let answer = policy::ask(current, request.into_inner()).await?;
        Ok(Response::new(answer))
    }

    type SessionStream = ReceiverStream<Result<v1::CoordinatorMessage, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let caller = Caller::of(&request)?;
        let (outbox, messages) = mpsc::channel(OUTBOX);
        let span = info_span!("session", remote = %caller.remote);
        let run = netmap_stream::run(self.shared.clone(), caller, request.into_inner(), outbox);
        self.tasks.spawn(run.instrument(span));
        Ok(Response::new(ReceiverStream::new(messages)))
    }
}
