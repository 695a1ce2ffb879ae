//! Somebody at the coordinator's door who is no agent: joins by the bare protocol, or talks rubbish.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use mesh_api::channel::{self, Trust};
use mesh_api::v1::control_client::ControlClient;
use mesh_api::{Join, PROTOCOL, v1};
use mesh_core::key::{MachineKey, NodeKey, NodePublic, ProofContext};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub struct Stranger {
    machine: MachineKey,
    node: NodeKey,
}

impl Stranger {
    /// Every number is a stranger of its own, the same each time.
    pub fn new(number: u8) -> Self {
        Self {
            machine: MachineKey::from_seed([number; 32]),
            node: NodeKey::from_seed([number; 32]),
        }
    }

    /// The pinned channel without anything in it yet.
    pub async fn channel(&self, join: &Join) -> Result<TlsStream<TcpStream>> {
        let address = SocketAddr::new(join.host.parse().context("an address")?, join.port);
        let work = async {
            let tcp = TcpStream::connect(address).await.context("connect")?;
            let trust = Trust::Pin(*join.pins.first().context("a pin")?);
            let config = channel::client(&self.machine, trust).context("set TLS up")?;
            TlsConnector::from(Arc::new(config))
                .connect(channel::server_name(), tcp)
                .await
                .context("shake hands")
        };
        tokio::time::timeout(PATIENCE, work)
            .await
            .context("wait for the coordinator")?
    }

    /// Asks to become a node. The coordinator's own answer is the inner result.
    pub async fn enroll(
        &self,
        join: &Join,
        auth_key: &str,
        name: &str,
    ) -> Result<Result<v1::EnrollResponse, tonic::Status>> {
        let stream = self.channel(join).await?;
        let exporter = channel::exporter(stream.get_ref().1).context("export a secret")?;
        let mut client = ControlClient::new(http2(stream).await?);
        let hello = client
            .hello(v1::HelloRequest {
                protocol: PROTOCOL,
                agent_version: "stranger".to_owned(),
            })
            .await
            .context("say hello")?
            .into_inner();
        let challenge: [u8; 32] = hello
            .challenge
            .as_slice()
            .try_into()
            .context("a challenge of 32 bytes")?;
        let proof = self.node.prove(
            &NodePublic(challenge),
            &ProofContext {
                exporter: &exporter,
                machine: &self.machine.public(),
                node: &self.node.public(),
            },
        );
        let request = v1::EnrollRequest {
            auth_key: auth_key.to_owned(),
            node: Some(v1::NodeProof {
                key: self.node.public().0.to_vec(),
                proof: proof.0.to_vec(),
            }),
            host: Some(v1::HostInfo {
                hostname: name.to_owned(),
                ..v1::HostInfo::default()
            }),
            name: name.to_owned(),
        };
        let answer = tokio::time::timeout(PATIENCE, client.enroll(request))
            .await
            .context("wait for the coordinator")?;
        Ok(answer.map(tonic::Response::into_inner))
    }
}

/// HTTP/2 on a channel that stands; there is no second one.
async fn http2(stream: TlsStream<TcpStream>) -> Result<Channel> {
    let mut once = Some(TokioIo::new(stream));
    let connector = tower::service_fn(move |_| {
        let stream = once.take();
        async move { stream.ok_or_else(|| std::io::Error::other("there is one channel only")) }
    });
    Endpoint::from_static("http://coordinator.mesh")
        .connect_with_connector(connector)
        .await
        .context("open HTTP/2")
}
