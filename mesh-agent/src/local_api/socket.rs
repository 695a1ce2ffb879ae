//! The unix socket, and who is at its other end.
//!
//! Credentials are taken from the kernel at connect (`SO_PEERCRED`): they cannot be forged, and a
//! process that changes its user afterwards keeps what it connected with.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tower::Service as _;
use tracing::Instrument as _;

use super::Service;
use crate::sys;

/// Callers at once; more have to wait.
const MOST_CONNECTIONS: usize = 64;
/// Calls under way on one connection: `mesh` makes one at a time.
const MOST_CALLS: u32 = 16;
const LARGEST_HEADERS: u32 = 16 << 10;
/// Finds callers that stopped without closing.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// Pause after the system had no file descriptor left for a caller.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Who is calling.
#[derive(Clone, Debug)]
pub struct Caller {
    uid: u32,
    groups: Vec<u32>,
}

impl Caller {
    fn of(stream: &UnixStream) -> io::Result<Self> {
        let credentials = stream.peer_cred()?;
        let mut groups = sys::peer_groups(stream)?;
        groups.push(credentials.gid());
        Ok(Self {
            uid: credentials.uid(),
            groups,
        })
    }

    /// Root, the agent's own user, and members of the agent's or the socket's group.
    pub fn may_write(&self, socket_group: u32) -> bool {
        let own = rustix::process::geteuid().as_raw();
        let group = rustix::process::getegid().as_raw();
        let member = |group| self.groups.contains(&group);
        self.uid == 0 || self.uid == own || member(group) || member(socket_group)
    }
}

/// Listens at `path`: the owner and the group may connect, nobody else. The socket goes to `group`
/// where this host has it and the agent belongs to it, else to the agent's own; its number is
/// returned.
pub async fn bind(path: &Path, group: &str) -> anyhow::Result<(UnixListener, u32)> {
    let shown = path.display();
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("make the folder of the socket {shown}"))?;
    }
    match UnixStream::connect(path).await {
        Ok(_) => anyhow::bail!("another agent answers at {shown} already"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        // Nobody listens: what an agent left that was killed.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).with_context(|| format!("remove the old socket {shown}"))?;
        }
        Err(error) => {
            return Err(error).with_context(|| format!("look for another agent at {shown}"));
        }
    }
    let listener = UnixListener::bind(path).with_context(|| format!("listen at {shown}"))?;
    let own = rustix::process::getegid().as_raw();
    let group = group_number(group)
        .filter(|group| std::os::unix::fs::chown(path, None, Some(*group)).is_ok())
        .unwrap_or(own);
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))
        .with_context(|| format!("open {shown} to the group"))?;
    Ok((listener, group))
}

/// The number of a group of this host.
fn group_number(name: &str) -> Option<u32> {
    let table = std::fs::read_to_string("/etc/group").ok()?;
    table.lines().find_map(|line| {
        let mut fields = line.split(':');
        let found = fields.next() == Some(name);
        let number = fields.nth(1)?;
        if found { number.parse().ok() } else { None }
    })
}

/// Serves until `stop`.
pub async fn serve(listener: UnixListener, service: Service, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            accepted = listener.accept(), if connections.len() < MOST_CONNECTIONS => {
                let known = accepted.and_then(|(stream, _)| Ok((Caller::of(&stream)?, stream)));
                match known {
                    Ok((caller, stream)) => {
                        let task = converse(stream, caller, service.clone());
                        connections.spawn(task.instrument(tracing::debug_span!("local")));
                    }
                    Err(error) => {
                        // Out of descriptors, as a rule: the loop must survive it.
                        tracing::warn!(%error, "accept on the local socket");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        }
    }
}

/// One connection: HTTP/2, each call marked with its caller.
async fn converse(stream: UnixStream, caller: Caller, service: Service) {
    let server = service.into_server();
    let answer = service_fn(move |mut request: http::Request<Incoming>| {
        request.extensions_mut().insert(caller.clone());
        let mut server = server.clone();
        async move { server.call(request).await }
    });
    let served = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(MOST_CALLS)
        .max_header_list_size(LARGEST_HEADERS)
        .keep_alive_interval(Some(KEEPALIVE))
        .serve_connection(TokioIo::new(stream), answer)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "connection on the local socket ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_the_agents_user_and_the_sockets_group_may_write_and_nobody_else() {
        let own = rustix::process::geteuid().as_raw();
        let group = rustix::process::getegid().as_raw();
        let caller = |uid, groups: &[u32]| Caller {
            uid,
            groups: groups.to_vec(),
        };
        let (stranger, mesh) = (own + 4_242, group + 4_242);
        assert!(caller(0, &[]).may_write(mesh));
        assert!(caller(own, &[]).may_write(mesh));
        assert!(caller(stranger, &[7_777_777, mesh]).may_write(mesh));
        assert!(caller(stranger, &[group]).may_write(mesh));
        assert!(!caller(stranger, &[7_777_777]).may_write(mesh));
        assert!(!caller(stranger, &[]).may_write(mesh));
    }

    #[test]
    fn groups_are_found_by_their_whole_name() {
        assert_eq!(group_number("root"), Some(0));
        assert_eq!(group_number("roo"), None);
        assert_eq!(group_number(""), None);
    }

    #[tokio::test]
    async fn the_kernel_says_who_is_at_the_other_end() {
        let (one, _other) = UnixStream::pair().unwrap();
        let caller = Caller::of(&one).unwrap();
        assert_eq!(caller.uid, rustix::process::geteuid().as_raw());
        let group = rustix::process::getegid().as_raw();
        assert!(caller.groups.contains(&group));
    }

    #[tokio::test]
    async fn a_socket_left_behind_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent.sock");
        let (first, _) = bind(&path, "no such group").await.unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o660);
        assert!(bind(&path, "no such group").await.is_err());
        drop(first);
        bind(&path, "no such group").await.unwrap();
    }
}
