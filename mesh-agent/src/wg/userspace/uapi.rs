//! WireGuard's userspace socket protocol, so that `wg show` and `wg set` work on our device.
//!
//! <https://www.wireguard.com/xplatform/>: lines of `key=value`, an empty line ends a request.
//! Whoever opens the socket is root or the agent's own user, and is believed; but a request is
//! parsed whole before any of it is done, is bounded in size and time, and ends in `errno=` at
//! worst. What it changes stands until the agent reconciles.

use std::fmt::Write as _;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, bail};
use mesh_core::key::NodeKey;
use mesh_core::wireguard::{DeviceOp, PeerConfig};
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tracing::debug;

use super::{Shared, Waker};
use request::{PeerRequest, Request, SetRequest};

mod request;

/// A request may configure ten thousand peers at some 300 bytes each.
const MAX_REQUEST: u64 = 8 << 20;
/// How long one connection may take in all, and how long it may be silent.
const PATIENCE: Duration = Duration::from_secs(10);
const SILENCE: Duration = Duration::from_secs(2);

/// Whether these lines, without the empty one that ends them, are a request at all.
pub fn is_uapi_request(lines: &[&str]) -> bool {
    Request::parse(lines).is_ok()
}

pub(super) struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Listens at `dir/name.sock`, for this user and root only.
    pub(super) fn bind(dir: &Path, name: &str) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        let path = dir.join(format!("{name}.sock"));
        if UnixStream::connect(&path).is_ok() {
            bail!("{} is served by another process", path.display());
        }
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove the stale {}", path.display()));
            }
            _ => {}
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // Before it has a name, so that there is no moment at which others may connect.
        rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR)?;
        rustix::net::bind(&fd, &SocketAddrUnix::new(&path)?)
            .with_context(|| format!("bind {}", path.display()))?;
        rustix::net::listen(&fd, 8)?;
        Ok(Self {
            socket: UnixListener::from(fd),
            path,
        })
    }

    pub(super) fn run(self, shared: &Shared) {
        while !shared.stopped() {
            match self.socket.accept() {
                Ok((stream, _)) => {
                    if let Err(error) = serve(shared, &stream) {
                        debug!(%error, "wg command");
                    }
                }
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        debug!(%error, "accept");
                    }
                    shared.wait(Waker::Uapi, &self.socket);
                }
            }
        }
        drop(std::fs::remove_file(&self.path));
    }
}

/// Answers requests until the client closes.
fn serve(shared: &Shared, stream: &UnixStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    let end = Instant::now() + PATIENCE;
    let mut reader = BufReader::new(stream);
    while !shared.stopped() {
        let Some(lines) = read_request(&mut reader, end)? else {
            return Ok(());
        };
        let answer = match Request::parse(&lines) {
            Ok(Request::Get) => format!("{}errno=0\n\n", show(shared)),
            Ok(Request::Set(set)) => match change(shared, &set) {
                Ok(()) => "errno=0\n\n".to_owned(),
                Err(error) => {
                    debug!(error = format!("{error:#}"), "wg set");
                    format!("errno={}\n\n", -errno_of(&error))
                }
            },
            Err(request::Invalid) => format!("errno={}\n\n", -libc::EINVAL),
        };
        (&*stream).write_all(answer.as_bytes())?;
    }
    Ok(())
}

/// The lines up to an empty one, or `None` at the end of the stream.
fn read_request(
    reader: &mut BufReader<&UnixStream>,
    end: Instant,
) -> io::Result<Option<Vec<String>>> {
    let mut lines = Vec::new();
    let mut room = MAX_REQUEST;
    loop {
        let mut line = String::new();
        let read = reader.by_ref().take(room).read_line(&mut line)? as u64;
        room -= read;
        let complete = line.ends_with('\n');
        if read == 0 && lines.is_empty() && room > 0 {
            return Ok(None);
        }
        if !complete || Instant::now() > end {
            return Err(io::ErrorKind::InvalidData.into());
        }
        line.pop();
        if line.is_empty() {
            return Ok(Some(lines));
        }
        lines.push(line);
    }
}

/// The answer to `get=1`.
fn show(shared: &Shared) -> String {
    let status = shared.status();
    let config = shared.config();
    let mut text = String::new();
    // Writing to a string cannot fail.
    let mut line = |key: &str, value: &dyn std::fmt::Display| {
        let _ = writeln!(text, "{key}={value}");
    };
    if let Some(key) = &config.key {
        line("private_key", &hex::encode(key.expose()));
    }
    line("listen_port", &status.listen_port);
    if status.fwmark != 0 {
        line("fwmark", &status.fwmark);
    }
    for (key, peer) in &status.peers {
        line("public_key", &hex::encode(key.0));
        let preshared_key = config
            .peers
            .peer(key)
            .ok()
            .and_then(|peer| peer.lock().as_ref()?.preshared_key());
        line(
            "preshared_key",
            &hex::encode(preshared_key.unwrap_or_default()),
        );
        line("protocol_version", &1);
        if let Some(endpoint) = peer.endpoint {
            line("endpoint", &endpoint);
        }
        let handshake = peer
            .handshake_age
            .and_then(|age| SystemTime::now().checked_sub(age))
            .and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok())
            .unwrap_or_default();
        line("last_handshake_time_sec", &handshake.as_secs());
        line("last_handshake_time_nsec", &handshake.subsec_nanos());
        line("tx_bytes", &peer.tx_bytes);
        line("rx_bytes", &peer.rx_bytes);
        line(
            "persistent_keepalive_interval",
            &peer.keepalive.unwrap_or(0),
        );
        for net in &peer.allowed_ips {
            line("allowed_ip", net);
        }
    }
    text
}

fn change(shared: &Shared, set: &SetRequest) -> anyhow::Result<()> {
    let mut ops = Vec::new();
    if let Some(key) = set.private_key {
        ops.push(DeviceOp::SetKey(NodeKey::from_seed(key)));
    }
    ops.extend(set.listen_port.map(DeviceOp::SetListenPort));
    ops.extend(set.fwmark.map(DeviceOp::SetFwmark));
    if set.replace_peers {
        let config = shared.config();
        ops.extend(config.peers.iter().map(|p| DeviceOp::RemovePeer(p.key)));
    }
    shared.apply(&ops)?;
    set.peers
        .iter()
        .try_for_each(|peer| change_peer(shared, peer))
}

fn change_peer(shared: &Shared, peer: &PeerRequest) -> anyhow::Result<()> {
    let key = peer.key;
    let exists = shared.config().peers.contains(&key);
    if peer.remove {
        return shared.apply(&[DeviceOp::RemovePeer(key)]);
    }
    if !exists && peer.update_only {
        return Ok(());
    }
    let mut ops = Vec::new();
    if !exists {
        ops.push(DeviceOp::AddPeer(key, PeerConfig::default()));
    }
    ops.extend(peer.endpoint.map(|to| DeviceOp::SetEndpoint(key, to)));
    if let Some(keepalive) = peer.keepalive {
        ops.push(DeviceOp::SetKeepalive(key, Some(keepalive)));
    }
    let nets = peer.allowed_ips.clone();
    if peer.replace_allowed_ips {
        ops.push(DeviceOp::ReplaceAllowedIps(key, nets));
    } else if !nets.is_empty() {
        ops.push(DeviceOp::AddAllowedIps(key, nets));
    }
    shared.apply(&ops)?;
    if let Some(preshared_key) = peer.preshared_key {
        let gate = shared.gate().context("the device has no key yet")?;
        let config = shared.config();
        if let Some(session) = config.peers.peer(&key)?.lock().as_mut() {
            session.set_preshared_key(Some(preshared_key), gate.identity())?;
        }
    }
    Ok(())
}

fn errno_of(error: &anyhow::Error) -> i32 {
    let os = |cause: &(dyn std::error::Error + 'static)| {
        let io = cause.downcast_ref::<io::Error>();
        let rustix = cause.downcast_ref::<rustix::io::Errno>();
        io.and_then(io::Error::raw_os_error)
            .or_else(|| rustix.map(|errno| errno.raw_os_error()))
    };
    error.chain().find_map(os).unwrap_or(libc::EINVAL)
}
