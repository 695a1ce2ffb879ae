//! The nodes' door. Who is calling is what the channel says, in every handler.

use std::sync::atomic::Ordering;
use std::time::Duration;

use mesh_api::v1;
use mesh_core::node::HostInfo;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};
use tracing::{Instrument as _, info, info_span};

use super::caller::Caller;
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
