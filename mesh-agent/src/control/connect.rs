//! Opens the channel: TCP, TLS 1.3 with raw public keys, HTTP/2.
//!
//! tonic must not dial for itself: a channel that it silently re-opened would have another exporter
//! than the one that the node key was proven on. So its connector hands out one stream, once.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use hyper_util::rt::TokioIo;
use mesh_api::Join;
use mesh_api::channel::{self, Trust};
use mesh_core::key::{MachineKey, MachinePublic};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint, Uri};

/// For each address of the coordinator, and for the handshake.
const STEP_TIMEOUT: Duration = Duration::from_secs(5);
/// Finds out that the coordinator is gone; also keeps a NAT's mapping alive (RFC 5382 asks TCP NATs
/// for two hours, many forget after minutes).
const KEEPALIVE: Duration = Duration::from_secs(15);

pub(super) struct Opened {
    pub(super) channel: Channel,
    pub(super) coordinator: MachinePublic,
    pub(super) exporter: [u8; 32],
}

pub(super) async fn open(
    join: &Join,
    machine: &MachineKey,
    trusts: &[Trust],
) -> anyhow::Result<Opened> {
    let mut last = anyhow::anyhow!("the join string has no pin");
    for trust in trusts {
        match secure(join, machine, *trust).await {
            Ok(stream) => return wrap(stream).await,
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn secure(
    join: &Join,
    machine: &MachineKey,
    trust: Trust,
) -> anyhow::Result<TlsStream<TcpStream>> {
    let tcp = dial(join).await?;
    let config = channel::client(machine, trust).context("set up TLS")?;
    let handshake = TlsConnector::from(Arc::new(config)).connect(channel::server_name(), tcp);
    tokio::time::timeout(STEP_TIMEOUT, handshake)
        .await
        .context("TLS handshake with the coordinator timed out")?
        .context("TLS handshake with the coordinator failed (another server, or another key than the join string pins)")
}

async fn dial(join: &Join) -> anyhow::Result<TcpStream> {
    let place = || format!("{}:{}", join.host, join.port);
    let addresses = tokio::net::lookup_host((join.host.as_str(), join.port))
        .await
        .with_context(|| format!("resolve the coordinator's name {:?}", join.host))?;
    let mut last = anyhow::anyhow!("the coordinator's name {:?} has no address", join.host);
    for address in addresses {
        match tokio::time::timeout(STEP_TIMEOUT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                stream.set_nodelay(true).context("set TCP_NODELAY")?;
                return Ok(stream);
            }
            Ok(Err(error)) => {
                last = anyhow::Error::new(error)
                    .context(format!("connect to the coordinator at {}", place()));
            }
            Err(_) => {
                last = anyhow::anyhow!("connect to the coordinator at {}: timed out", place());
            }
        }
    }
    Err(last)
}

async fn wrap(stream: TlsStream<TcpStream>) -> anyhow::Result<Opened> {
    let (_, connection) = stream.get_ref();
    let coordinator = channel::peer_key(connection).context("read the coordinator's key")?;
    let exporter = channel::exporter(connection).context("export keying material")?;
    let mut once = Some(stream);
    let connector = tower::service_fn(move |_: Uri| {
        let stream = once.take().map(TokioIo::new);
        async move { stream.ok_or_else(|| std::io::Error::other("the channel is closed")) }
    });
    let channel = Endpoint::from_static("http://coordinator.mesh")
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true)
        .connect_with_connector(connector)
        .await
        .context("open HTTP/2 to the coordinator")?;
    Ok(Opened {
        channel,
        coordinator,
        exporter,
    })
}
