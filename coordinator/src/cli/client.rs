//! The way to the coordinator: gRPC over its unix socket.

use std::io;

use anyhow::anyhow;
use hyper_util::rt::TokioIo;
use mesh_api::v1::admin_client::AdminClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

use super::{Admin, Failure};

pub(super) async fn connect(admin: &Admin) -> Result<AdminClient<Channel>, Failure> {
    let path = admin.socket.clone();
    // Asked once before: the error of the socket itself says more than a transport's.
    if let Err(error) = UnixStream::connect(&path).await {
        return Err(unreachable(admin, &error));
    }
    // The name in it is never looked up.
    let endpoint = Endpoint::from_static("http://coordinator.mesh");
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
    });
    let channel = endpoint.connect_with_connector(connector).await;
    let channel = channel.map_err(|error| Failure::Unreachable(error.into()))?;
    Ok(AdminClient::new(channel))
}

fn unreachable(admin: &Admin, error: &io::Error) -> Failure {
    let path = admin.socket.display();
    Failure::Unreachable(match error.kind() {
        io::ErrorKind::PermissionDenied => {
            anyhow!("you may not open {path}: run as root, or join the coordinator's admin group")
        }
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => anyhow!(
            "no coordinator answers at {path}: is `mesh-coordinator serve` running? \
             (--socket names another place)"
        ),
        _ => anyhow!("connect to {path}: {error}"),
    })
}
