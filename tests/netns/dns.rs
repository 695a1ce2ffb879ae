//! MagicDNS as a host sees it: the C library's resolver, dig, a real file, the real helper.
//!
//! ```text
//!   web                      peer                   upstream
//!   100.64.0.1 (the server)  100.64.0.2             stub name server, port 53
//!     └──────────────── underlay 198.51.100.0/24 ──────┘
//! ```
//! The overlay is played by plain addresses on the underlay: names are under test here, and the
//! tunnels have scenarios of their own.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use mesh_agent::dns::{Actuator, Options, Status};
use mesh_core::dns::Config;
use mesh_core::key::NodeKey;
use mesh_core::netmap::{Me, Netmap, NodePolicy, Peer};
use mesh_core::node::{Addresses, Epoch, Generation, MeshId, Name, NodeId};
use mesh_core::world::{Mesh, Pools};
use mesh_tests::{Host, Lab, Process, User, until};
use tokio::sync::oneshot;

const LIMIT: Duration = Duration::from_secs(10);
const SOCKET: &str = "/run/mesh-dns-helper.sock";

fn addresses(host: u8) -> Addresses {
    Addresses {
        v4: Ipv4Addr::new(100, 64, 0, host),
        v6: Ipv6Addr::new(0xfd01, 0x203, 0x405, 0, 0, 0, 0x6440, host.into()),
    }
}

fn config() -> Config {
    let key = NodeKey::from_seed([7; 32]).public();
    let name = |text| Name::parse(text).unwrap();
    let peer = Peer {
        id: NodeId(2),
        name: name("db"),
        key,
        addresses: addresses(2),
        endpoints: BTreeSet::new(),
        routes: BTreeSet::new(),
        tags: BTreeSet::new(),
        user: None,
    };
    let netmap = Netmap {
        mesh: Mesh {
            id: MeshId([0; 16]),
            domain: "mesh.internal".to_owned(),
            pools: Pools {
                v4: Pools::default_v4(),
                v6: Pools::ula([1, 2, 3, 4, 5]),
            },
        },
        epoch: Epoch(0),
        generation: Generation(1),
        me: Me {
            id: NodeId(1),
            name: name("web"),
            key,
            addresses: addresses(1),
            tags: BTreeSet::new(),
            user: None,
            expires: None,
            expired: false,
        },
        peers: BTreeMap::from([(peer.id, peer)]),
        policy: NodePolicy::default(),
    };
    Config::of(&netmap).unwrap()
}

fn add_addresses(host: &Host, number: u8) {
    let Addresses { v4, v6 } = addresses(number);
    host.run("ip", &["addr", "add", &format!("{v4}/32"), "dev", "lo"])
        .unwrap();
    host.run("ip", &["addr", "add", &format!("{v6}/128"), "dev", "lo"])
        .unwrap();
}

/// The agent's part, in a thread of its own: applied until told otherwise.
struct Agent {
    stop: Option<oneshot::Sender<Stop>>,
    thread: Option<std::thread::JoinHandle<Result<()>>>,
}

enum Stop {
    Restore,
    /// Drops everything, as a killed process does.
    Die,
}

impl Agent {
    fn start(host: &Host) -> Result<(Self, Status)> {
        let (stop, stopped) = oneshot::channel();
        let (ready, started) = std::sync::mpsc::channel();
        let helper = host.path(SOCKET);
        let runtime = host.inside(|| {
            // Sockets are made by this thread's network for good, whoever polls them later.
            std::thread::spawn(move || serve(helper, ready, stopped))
        })?;
        let agent = Self {
            stop: Some(stop),
            thread: Some(runtime),
        };
        let status = started.recv().context("the agent failed to start")?;
        Ok((agent, status))
    }

    fn stop(mut self, how: Stop) {
        self.end(how).unwrap();
    }

    fn end(&mut self, how: Stop) -> Result<()> {
        let (Some(stop), Some(thread)) = (self.stop.take(), self.thread.take()) else {
            return Ok(());
        };
        stop.send(how).ok();
        thread.join().expect("the agent's thread does not panic")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.end(Stop::Die);
    }
}

fn serve(
    helper: PathBuf,
    ready: std::sync::mpsc::Sender<Status>,
    stopped: oneshot::Receiver<Stop>,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut actuator = Actuator::new(Options {
            interface: "mesh0".to_owned(),
            port: 53,
            helper: Some(helper),
            upstreams: None,
        });
        actuator.apply(Some(&config())).await?;
        ready.send(actuator.status())?;
        if let Ok(Stop::Restore) = stopped.await {
            actuator.apply(None).await?;
        }
        Ok(())
    })
}

fn start_helper(host: &Host) -> Process {
    let mut command = host.command(User::Root, "mesh-dns-helper");
    command.args(["--socket", SOCKET, "--state", "/run/mesh-dns-helper"]);
    command.args(["--user", "0"]);
    let helper = host.spawn("helper", command).unwrap();
    let socket = host.path(SOCKET);
    until("the helper listens", LIMIT, || socket.exists()).unwrap();
    helper
}

fn resolv_conf(host: &Host) -> String {
    std::fs::read_to_string(host.path("/etc/resolv.conf")).unwrap()
}

/// Answers every query, by UDP and TCP, with the address 192.0.2.99.
fn start_upstream(host: &Host) {
    let (udp, tcp) = host
        .inside(|| (UdpSocket::bind("[::]:53"), TcpListener::bind("[::]:53")))
        .unwrap();
    let (udp, tcp) = (udp.unwrap(), tcp.unwrap());
    std::thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((length, from)) = udp.recv_from(&mut query) {
            let _ = udp.send_to(&stub_answer(&query[..length]), from);
        }
    });
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = tcp.accept() {
            let _ = stub_answer_by_tcp(&mut stream);
        }
    });
}

fn stub_answer_by_tcp(stream: &mut std::net::TcpStream) -> Result<()> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut query = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut query)?;
    let answer = stub_answer(&query);
    stream.write_all(&u16::try_from(answer.len())?.to_be_bytes())?;
    Ok(stream.write_all(&answer)?)
}

fn stub_answer(query: &[u8]) -> Vec<u8> {
    // Header and question as they came, whatever follows left out.
    let name: usize = query[12..].iter().position(|b| *b == 0).unwrap() + 1;
    let mut answer = query[..12 + name + 4].to_vec();
    answer[2] |= 0x80;
    answer[6..12].copy_from_slice(&[0, 1, 0, 0, 0, 0]);
    // Of the question's name; A, IN, one minute, four octets.
    answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 99]);
    answer
}

fn dig(host: &Host, words: &[&str]) -> String {
    let all = [&["+tries=1", "+timeout=2"], words].concat();
    let mut command = host.command(User::Root, "dig");
    let output = command.args(all).stdin(Stdio::null()).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn dig_short(host: &Host, words: &[&str]) -> String {
    dig(host, &[&["+short"], words].concat()).trim().to_owned()
}

#[test]
fn a_host_finds_the_mesh_by_name_and_everything_else_as_before() {
    let lab = Lab::of_release_build().unwrap();
    let (web, upstream) = (lab.host("web").unwrap(), lab.host("upstream").unwrap());
    add_addresses(&web, 1);
    start_upstream(&upstream);
    let before = format!("# mine\nnameserver {}\noptions timeout:2\n", upstream.v4());
    std::fs::write(web.path("/etc/resolv.conf"), &before).unwrap();
    let _helper = start_helper(&web);
    let (agent, status) = Agent::start(&web).unwrap();
    // The file is a bind mount: nothing can be renamed onto it.
    assert_eq!(status.mode.to_string(), "in-place");
    assert_eq!(status.upstreams, [(upstream.v4(), 53).into()]);

    // The C library's own resolver, by the file.
    let getent = |name: &str| web.run("getent", &["ahostsv4", name]).unwrap();
    for name in ["db", "db.mesh.internal", "DB.Mesh.Internal"] {
        assert!(getent(name).starts_with("100.64.0.2 "), "{name}");
    }
    let six = web.run("getent", &["ahostsv6", "db"]).unwrap();
    assert!(six.starts_with("fd01:203:405::6440:2 "), "{six}");
    let back = web.run("getent", &["hosts", "100.64.0.2"]).unwrap();
    assert!(back.contains("db.mesh.internal"), "{back}");
    assert!(getent("www.example.org").starts_with("192.0.2.99 "));

    // Each address of the server, each transport.
    for server in ["@100.64.0.1", "@fd01:203:405::6440:1"] {
        for transport in ["+notcp", "+tcp"] {
            let ask = |name, kind| dig_short(&web, &[server, transport, name, kind]);
            assert_eq!(ask("db.mesh.internal", "A"), "100.64.0.2");
            assert_eq!(ask("db.mesh.internal", "AAAA"), "fd01:203:405::6440:2");
            assert_eq!(ask("www.example.org", "A"), "192.0.2.99");
        }
        let back = dig_short(&web, &[server, "-x", "fd01:203:405::6440:2"]);
        assert_eq!(back, "db.mesh.internal.");
    }
    let missing = dig(&web, &["@100.64.0.1", "nobody.mesh.internal", "A"]);
    assert!(
        missing.contains("NXDOMAIN") && missing.contains("SOA"),
        "{missing}"
    );
    let transfer = dig(&web, &["@100.64.0.1", "+tcp", "mesh.internal", "AXFR"]);
    assert!(!transfer.contains("100.64.0.2"), "{transfer}");

    agent.stop(Stop::Restore);
    assert_eq!(resolv_conf(&web), before);
    assert!(getent("www.example.org").starts_with("192.0.2.99 "));
}

#[test]
fn the_file_comes_back_whoever_is_killed() {
    let lab = Lab::of_release_build().unwrap();
    let web = lab.host("web").unwrap();
    add_addresses(&web, 1);
    let before = "nameserver 198.51.100.77\nsearch corp.example";
    std::fs::write(web.path("/etc/resolv.conf"), before).unwrap();
    let mut helper = start_helper(&web);

    let (agent, _) = Agent::start(&web).unwrap();
    assert!(resolv_conf(&web).contains("search mesh.internal corp.example\n"));
    agent.stop(Stop::Die);
    until("the file is back", LIMIT, || resolv_conf(&web) == before).unwrap();

    let (agent, _) = Agent::start(&web).unwrap();
    assert_ne!(resolv_conf(&web), before);
    helper.kill().unwrap();
    agent.stop(Stop::Die);
    assert_ne!(resolv_conf(&web), before);
    // What ExecStopPost= does, and what the next start would.
    let words = ["--restore", "--state", "/run/mesh-dns-helper"];
    web.run("mesh-dns-helper", &words).unwrap();
    assert_eq!(resolv_conf(&web), before);
}

#[test]
fn a_peer_is_refused_and_a_stranger_hears_nothing() {
    let lab = Lab::of_release_build().unwrap();
    let (web, peer) = (lab.host("web").unwrap(), lab.host("peer").unwrap());
    add_addresses(&web, 1);
    add_addresses(&peer, 2);
    let _helper = start_helper(&web);
    let (_agent, _) = Agent::start(&web).unwrap();
    let route = |host: &Host, to: &str, via: &Host| {
        let via = via.v4().to_string();
        host.run("ip", &["route", "add", to, "via", &via]).unwrap();
    };
    route(&peer, "100.64.0.1", &web);
    route(&web, "100.64.0.2", &peer);

    let ask = |source: &str| {
        dig(
            &peer,
            &["-b", source, "@100.64.0.1", "web.mesh.internal", "A"],
        )
    };
    let refused = ask("100.64.0.2");
    assert!(refused.contains("REFUSED"), "{refused}");
    let silence = ask(&peer.v4().to_string());
    assert!(silence.contains("timed out"), "{silence}");
}

#[test]
fn the_helper_serves_one_user_and_tells_others_no() {
    let lab = Lab::of_release_build().unwrap();
    let host = lab.host("alone").unwrap();
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();

    let ask = |user: u32| {
        let mut command = Command::new(lab.binaries().join("mesh-dns-helper"));
        command.arg("--state").arg(folder.path().join("state"));
        command
            .arg("--resolv-conf")
            .arg(host.path("/etc/resolv.conf"));
        command.args(["--user", "64321"]);
        // A listening socket as standard input: each life serves one connection.
        let socket = OwnedFd::from(listener.try_clone().unwrap());
        let mut helper = command.stdin(socket).stderr(Stdio::null()).spawn().unwrap();
        let answer = ask_as(user, &path);
        assert!(helper.wait().unwrap().success());
        answer.unwrap()
    };
    assert_eq!(ask(64321), "ok none \n");
    assert_eq!(ask(64322), "error user 64322 may not change the resolver\n");
    assert_eq!(ask(65534), "error user 65534 may not change the resolver\n");
}

/// Says `status` to the helper as another user: one thread becomes that user, and ends as it.
fn ask_as(user: u32, path: &std::path::Path) -> Result<String> {
    let ask = || {
        let uid = rustix::process::Uid::from_raw(user);
        rustix::thread::set_thread_res_uid(uid, uid, uid).context("become another user")?;
        let mut stream = UnixStream::connect(path)?;
        // Refused before it is read, perhaps: then the write fails, and the words count.
        let _ = stream.write_all(b"status\n");
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        Ok(answer)
    };
    std::thread::scope(|scope| scope.spawn(ask).join().expect("asking does not panic"))
}
