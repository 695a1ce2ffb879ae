//! The agent's side of the root helper: one connection, one line at a time.
//!
//! The connection is a lease. As long as it stands the host asks us; when either side dies, the
//! helper puts back what was there. So the agent holds it open, and when it breaks says everything
//! again.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use rustix::net::{AddressFamily, SocketType};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::protocol::{MAX_LINE, Report, Request, Setting};
use super::resolv_conf::{RESOLVED_STUB, ResolvConf};

/// The helper may wait for systemd-resolved, which D-Bus gives 25 seconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// The longest answer: eight upstreams, or a sentence.
const MAX_ANSWER: u64 = 4 * MAX_LINE as u64;

/// The host's resolver configuration, by way of the helper.
#[derive(Debug)]
pub struct System {
    socket: PathBuf,
    connection: Option<BufReader<UnixStream>>,
}

impl System {
    pub fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            connection: None,
        }
    }

    pub async fn set(&mut self, setting: &Setting) -> anyhow::Result<Report> {
        self.ask(&Request::Set(setting.clone()))
            .await
            .context("point the host's resolver at the mesh")
    }

    /// Restores, and gives the lease back.
    pub async fn restore(&mut self) -> anyhow::Result<()> {
        if self.connection.is_none() {
            return Ok(());
        }
        let restored = self.ask(&Request::Restore).await;
        self.connection = None;
        restored.context("restore the host's resolver").map(drop)
    }

    pub async fn status(&mut self) -> anyhow::Result<Report> {
        self.ask(&Request::Status)
            .await
            .context("ask for the host's resolver")
    }

    /// Returns when the lease has ended; never, while there is none.
    pub async fn lost(&mut self) {
        match &mut self.connection {
            Some(connection) => {
                // The helper says nothing unasked: whatever comes is the end.
                let _ = connection.fill_buf().await;
                self.connection = None;
            }
            None => std::future::pending().await,
        }
    }

    async fn ask(&mut self, request: &Request) -> anyhow::Result<Report> {
        let answer = timeout(PATIENCE, self.exchange(request)).await;
        let answer = answer.unwrap_or_else(|_| Err(anyhow!("no answer in {PATIENCE:?}")));
        let parsed = answer.and_then(|line| Ok(Report::parse(&line)?));
        match parsed {
            Ok(Ok(report)) => Ok(report),
            Ok(Err(words)) => bail!("the helper says: {words}"),
            Err(error) => {
                self.connection = None;
                Err(error)
            }
        }
    }

    async fn exchange(&mut self, request: &Request) -> anyhow::Result<String> {
        if self.connection.is_none() {
            let stream = UnixStream::connect(&self.socket)
                .await
                .with_context(|| format!("connect to {}", self.socket.display()))?;
            self.connection = Some(BufReader::new(stream));
        }
        let connection = self.connection.as_mut().context("no connection")?;
        // A refusal comes before our request does; then the write fails and the words wait.
        let written = connection
            .write_all(format!("{request}\n").as_bytes())
            .await;
        let mut line = String::new();
        let mut limited = connection.take(MAX_ANSWER);
        limited.read_line(&mut line).await?;
        match line.strip_suffix('\n') {
            Some(line) => Ok(line.to_owned()),
            None => {
                written?;
                bail!("the helper hung up");
            }
        }
    }
}

/// The servers that resolv.conf names, where there is no helper to ask.
pub fn host_servers() -> Vec<SocketAddr> {
    let read = |path: &str| -> io::Result<Vec<String>> {
        let text = fs::read_to_string(path)?;
        Ok(ResolvConf::parse(&text).servers)
    };
    let mut servers = read("/etc/resolv.conf").unwrap_or_default();
    servers.retain(|server| !RESOLVED_STUB.contains(&server.as_str()));
    if servers.is_empty() {
        servers = read("/run/systemd/resolve/resolv.conf").unwrap_or_default();
    }
    socket_addresses(&servers)
}

/// Port 53 of each address; link-local ones keep the interface that their `%zone` names.
pub fn socket_addresses(servers: &[String]) -> Vec<SocketAddr> {
    let parsed = servers.iter().filter_map(|server| {
        let (address, zone) = match server.split_once('%') {
            Some((address, zone)) => (address, Some(zone)),
            None => (server.as_str(), None),
        };
        match (address.parse().ok()?, zone) {
            (IpAddr::V6(v6), Some(zone)) => {
                let number = zone.parse().ok();
                let scope = number.or_else(|| interface_index(zone).ok())?;
                Some(SocketAddrV6::new(v6, 53, 0, scope).into())
            }
            (address, _) => Some(SocketAddr::new(address, 53)),
        }
    });
    parsed.collect()
}

/// The number of an interface of this network namespace; `/sys` may show another's.
pub fn interface_index(name: &str) -> io::Result<u32> {
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::DGRAM, None)?;
    Ok(rustix::net::netdevice::name_to_index(&socket, name)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_keep_their_zone() {
        let servers = ["192.0.2.1", "fe80::1%1", "fe80::1%lo", "fe80::1%../x", "x"];
        let servers = servers.map(str::to_owned);
        assert_eq!(
            socket_addresses(&servers),
            [
                "192.0.2.1:53".parse().unwrap(),
                SocketAddr::V6(SocketAddrV6::new("fe80::1".parse().unwrap(), 53, 0, 1)),
                SocketAddr::V6(SocketAddrV6::new("fe80::1".parse().unwrap(), 53, 0, 1)),
            ]
        );
    }
}
