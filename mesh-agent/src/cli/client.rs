//! Connects to the agent, and says what to do when that does not work.

use std::io;
use std::path::Path;

use hyper_util::rt::TokioIo;
use mesh_api::v1::local_client::LocalClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

use super::Failed;

pub(super) type Client = LocalClient<Channel>;

pub(super) async fn connect(socket: &Path) -> Result<Client, Failed> {
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|error| explain(socket, &error))?;
    let mut once = Some(TokioIo::new(stream));
    let connector = tower::service_fn(move |_: Uri| {
        let stream = once.take();
        async move { stream.ok_or_else(|| io::Error::other("the agent closed the connection")) }
    });
    let channel = Endpoint::from_static("http://agent.mesh")
        .connect_with_connector(connector)
        .await
        .map_err(|error| {
            let text = format!(
                "{} does not answer like a mesh agent: {error}",
                socket.display()
            );
            Failed::new(Failed::UNREACHABLE, text)
        })?;
    Ok(LocalClient::new(channel).max_decoding_message_size(64 << 20))
}

fn explain(socket: &Path, error: &io::Error) -> Failed {
    let socket = socket.display();
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Failed::new(
            Failed::UNREACHABLE,
            format!(
                "no agent listens at {socket}; start it with `sudo systemctl start mesh-agent`, or name its socket with --socket"
            ),
        ),
        io::ErrorKind::PermissionDenied => Failed::new(
            Failed::NOT_ALLOWED,
            format!(
                "you may not open {socket}; use sudo, or join the socket's group (`sudo usermod -aG mesh $USER`, then log in again)"
            ),
        ),
        _ => Failed::new(Failed::UNREACHABLE, format!("open {socket}: {error}")),
    }
}
