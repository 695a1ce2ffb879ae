//! Rubbish on every socket: an error or silence, and everything lives on.
//!
//! ```text
//!   sandbox ── noise ──► node: WireGuard's port, DNS, agent's unix socket
//!           ── noise ──► coordinator: node listener, inside and outside of TLS, admin socket
//! ```

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use mesh_api::Join;
use tokio::io::AsyncWriteExt;

use crate::mesh::{Family, Mesh, Stranger, WIREGUARD_PORT};

use super::{Check, reach};

/// Bytes of all kinds, the same each time: xorshift, as good as any for noise.
struct Noise(u64);

impl Noise {
    fn bytes(&mut self, length: usize) -> Vec<u8> {
        std::iter::repeat_with(|| {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0.to_be_bytes()[0]
        })
        .take(length)
        .collect()
    }

    /// Noise behind beginnings that get it past the first look.
    fn messages(&mut self, beginnings: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        for beginning in beginnings {
            for length in [0, 1, 12, 64, 300, 1200] {
                all.push([beginning, self.bytes(length).as_slice()].concat());
            }
        }
        all
    }
}

pub fn run(mesh: &mut Mesh, check: &mut Check) -> Result<()> {
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
    check.that(
        "garbage on WireGuard's port and on DNS is met with silence or an error",
        || datagrams(mesh, &mut noise),
    )?;
    check.that(
        "garbage at the coordinator's door, before and inside TLS, harms nobody",
        || door(mesh, &mut noise),
    )?;
    check.that("garbage on the unix sockets harms nobody", || {
        let node = mesh.node("node").host.path("/run/mesh-agent/agent.sock");
        let coordinator = mesh
            .coordinator
            .host
            .path("/run/mesh-coordinator/admin.sock");
        let helper = mesh.node("node").host.path("/run/mesh-dns-helper.sock");
        for socket in [node, coordinator, helper] {
            for message in noise.messages(&[b"", HTTP2, b"GET / HTTP/1.1\r\n\r\n", b"\0"]) {
                unix(&socket, &message)?;
            }
        }
        Ok(())
    })?;
    check.that("settings that make no sense are refused in words", || {
        settings(mesh)
    })?;
    check.that("nobody panicked, and the mesh is as it was", || {
        for node in &mut mesh.nodes {
            node.agent.check_running()?;
            no_panic(&node.agent.log())?;
        }
        mesh.coordinator.process.check_running()?;
        no_panic(&mesh.coordinator.process.log())?;
        let cells = reach::measure(mesh, &reach::KINDS, crate::scaled(reach::LIMIT))?;
        reach::compare(&cells, |cell| reach::is_open(cell.from, cell.to, cell.kind))
    })
}

/// The client's first bytes of HTTP/2 (RFC 9113, section 3.4).
const HTTP2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

fn no_panic(log: &str) -> Result<()> {
    match log.lines().find(|line| line.contains("panicked")) {
        Some(line) => bail!("{line}"),
        None => Ok(()),
    }
}

fn datagrams(mesh: &Mesh, noise: &mut Noise) -> Result<()> {
    let (from, to) = (mesh.node("operator"), mesh.node("node"));
    // WireGuard's four kinds of message, STUN's and none.
    let wireguard = noise.messages(&[
        b"",
        b"\x01\0\0\0",
        b"\x02\0\0\0",
        b"\x03\0\0\0",
        b"\x04\0\0\0",
        b"\0\x01\0\0\x21\x12\xa4\x42",
    ]);
    let own: Vec<_> = Family::BOTH
        .into_iter()
        .map(|family| to.address(family))
        .collect::<Result<_>>()?;
    let questions = noise.messages(&[
        b"",
        b"\0\0\x01\0\0\x01\0\0\0\0\0\0",
        b"\0\0\x81\x80\xff\xff\xff\xff\0\0\0\0",
        b"\0\0\x01\0\0\x01\0\0\0\0\0\0\xc0\x0c\0\x01\0\x01",
    ]);
    let underlay: Vec<_> = to
        .host
        .underlay_addresses()
        .into_iter()
        .map(|ip| SocketAddr::new(ip, WIREGUARD_PORT))
        .collect();
    from.host.inside(|| send_all(&underlay, &wireguard))??;
    // DNS is for the node's own programs: they are the ones that may send rubbish to it.
    let resolvers: Vec<_> = own
        .into_iter()
        .map(|ip: IpAddr| SocketAddr::new(ip, 53))
        .collect();
    to.host.inside(|| {
        send_all(&resolvers, &questions)?;
        for resolver in &resolvers {
            for question in &questions {
                tcp(*resolver, question);
            }
        }
        anyhow::Ok(())
    })??;
    Ok(())
}

fn send_all(to: &[SocketAddr], messages: &[Vec<u8>]) -> Result<()> {
    for address in to {
        let any = if address.is_ipv4() {
            "0.0.0.0:0"
        } else {
            "[::]:0"
        };
        let socket = UdpSocket::bind(any).context("make a socket")?;
        for message in messages {
            // An error here is the answer to the message before.
            let _ = socket.send_to(message, address);
        }
    }
    Ok(())
}

/// Sends, and waits a moment for whatever comes back, be it nothing.
fn tcp(to: SocketAddr, message: &[u8]) {
    let Ok(mut stream) = TcpStream::connect_timeout(&to, Duration::from_secs(1)) else {
        return;
    };
    let _ = stream.set_read_timeout(Some(GLANCE));
    let _ = stream.write_all(message);
    let _ = stream.read(&mut [0; 64]);
}

const GLANCE: Duration = Duration::from_millis(20);

fn unix(socket: &Path, message: &[u8]) -> Result<()> {
    let mut stream =
        UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
    let _ = stream.set_read_timeout(Some(GLANCE));
    let _ = stream.write_all(message);
    let _ = stream.read(&mut [0; 64]);
    Ok(())
}

fn door(mesh: &Mesh, noise: &mut Noise) -> Result<()> {
    let join: Join = mesh
        .coordinator
        .join()
        .parse()
        .context("read the join string")?;
    let address = SocketAddr::new(join.host.parse().context("an address")?, join.port);
    // TLS's own beginning of a record among others.
    let outside = noise.messages(&[b"", b"\x16\x03\x01\x02\0", HTTP2, b"GET / HTTP/1.1\r\n\r\n"]);
    let inside = noise.messages(&[b"", HTTP2, HTTP2_PATH]);
    mesh.node("sandbox").host.inside(|| {
        for message in &outside {
            tcp(address, message);
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("start a runtime")?;
        runtime.block_on(async {
            for message in &inside {
                let mut channel = Stranger::new(200).channel(&join).await?;
                // The coordinator may well hang up before all is said.
                let _ = channel.write_all(message).await;
                let _ = channel.flush().await;
            }
            anyhow::Ok(())
        })
    })??;
    Ok(())
}

/// HTTP/2's beginning, empty settings, and a header block that is none.
const HTTP2_PATH: &[u8] =
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\x20\x01\x05\0\0\0\x01";

fn settings(mesh: &Mesh) -> Result<()> {
    let host = &mesh.node("node").host;
    let file = host.folder().join("settings.toml");
    for (text, program, arguments) in [
        ("lisen_port = 8", "mesh-agent", vec!["--config"]),
        ("\u{1}\u{2}= [[", "mesh-agent", vec!["--config"]),
        (
            "unheard_of = true",
            "mesh-coordinator",
            vec!["serve", "--config"],
        ),
        (
            "\u{1}\u{2}= [[",
            "mesh-coordinator",
            vec!["serve", "--config"],
        ),
    ] {
        std::fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
        let mut arguments = arguments;
        let path = file.to_str().context("a path in UTF-8")?;
        arguments.push(path);
        let Err(error) = host.run(program, &arguments) else {
            bail!("{program} starts with the settings {text:?}");
        };
        let words = format!("{error:#}");
        ensure!(
            words.contains("settings.toml"),
            "{program} does not say which file: {words}"
        );
        no_panic(&words)?;
    }
    Ok(())
}
