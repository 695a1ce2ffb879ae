//! What the log tells of one TCP connection, and of the next between the same ports.
//!
//! The end that serves closes first, so the other may take its port again at once: to the packet filter
//! a new flow under the key of one that it still holds.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::Context as _;
use mesh_tests::mesh::{Family, Mesh};
use mesh_tests::{Lab, User, eventually, scaled, silence};
use rustix::net::sockopt::set_socket_reuseaddr;
use rustix::net::{AddressFamily, SocketType};
use serde_json::Value;

use super::field::{SOON, backend, policy};

const SERVICE: u16 = 22;
const SOURCE: u16 = 45_000;
const QUESTION: usize = 100_000;
const ANSWER: usize = 30_000;
/// Between two connections of the same ports, and far less than the log waits with an end. Within the
/// millisecond a kernel takes the second for the first (RFC 6191), and the client gives it up by a reset and
/// tries again: a flow more, and rightly.
const APART: Duration = Duration::from_millis(20);
/// Two walks over the flows.
const WALKED: Duration = Duration::from_secs(21);

fn connect(to: IpAddr) -> io::Result<TcpStream> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
    set_socket_reuseaddr(&socket, true)?;
    let source = SocketAddr::from((Ipv4Addr::UNSPECIFIED, SOURCE));
    rustix::net::bind(&socket, &source)?;
    rustix::net::connect(&socket, &SocketAddr::new(to, SERVICE))?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(scaled(SOON)))?;
    Ok(stream)
}

fn listener(mesh: &Mesh) -> TcpListener {
    let node = &mesh.node("node").host;
    let listener = node.inside(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, SERVICE)));
    listener.unwrap().unwrap()
}

/// One connection, from its first packet to its last.
fn talk(mesh: &Mesh, listener: &TcpListener, to: IpAddr) {
    let operator = &mesh.node("operator").host;
    // The port is free again when the last packet has come.
    let connection = eventually(SOON, || Ok(operator.inside(|| connect(to))??));
    let mut connection = connection.unwrap();
    let (mut served, _) = listener.accept().unwrap();
    served.set_read_timeout(Some(scaled(SOON))).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            served.read_exact(&mut vec![0; QUESTION]).unwrap();
            served.write_all(&vec![0; ANSWER]).unwrap();
            served.shutdown(Shutdown::Write).unwrap();
            assert_eq!(served.read(&mut [0]).unwrap(), 0);
        });
        connection.write_all(&vec![0; QUESTION]).unwrap();
        let mut answer = Vec::new();
        connection.read_to_end(&mut answer).unwrap();
        assert_eq!(answer.len(), ANSWER);
        drop(connection);
    });
}

/// What `name` tells of these connections: the kinds of its records by when the flow was opened, and the
/// counts of each close.
fn told(mesh: &Mesh, name: &str) -> (Vec<Vec<String>>, Vec<[u64; 4]>) {
    let arguments = ["flows", "--json", "--port", "22", "--proto", "tcp"];
    let text = mesh.node(name).host.run("mesh", &arguments).unwrap();
    let mut flows: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    let mut closed = Vec::new();
    for line in text.lines() {
        let record: Value = serde_json::from_str(line).unwrap();
        if record["source"]["port"] != SOURCE {
            continue;
        }
        let number = |field: &str| record[field].as_u64().unwrap();
        let kind = record["kind"].as_str().unwrap().to_owned();
        if kind == "closed" {
            closed.push(["packets", "reply_packets", "bytes", "reply_bytes"].map(number));
        }
        flows.entry(number("start_ns")).or_default().push(kind);
    }
    (flows.into_values().collect(), closed)
}

fn is_told_of_from_open_to_close(mesh: &Mesh) {
    let to = mesh.node("node").address(Family::V4).unwrap();
    let listener = listener(mesh);
    talk(mesh, &listener, to);
    std::thread::sleep(APART);
    talk(mesh, &listener, to);
    for name in ["node", "operator"] {
        let closed = eventually(SOON, || {
            let (_, closed) = told(mesh, name);
            anyhow::ensure!(closed.len() == 2, "not told yet");
            Ok(closed)
        });
        let closed = closed.unwrap_or_else(|error| panic!("{error:#}: {:?}", told(mesh, name)));
        for [packets, replies, bytes, reply_bytes] in closed {
            // Payload, and headers, of which segments that travel together have one.
            let is_whole = |packets: u64, bytes: u64, payload: usize| {
                let headers = bytes.checked_sub(payload as u64).unwrap();
                headers > 3 * 40 && headers < packets * 60
            };
            assert!(is_whole(packets, bytes, QUESTION), "{packets} {bytes}");
            assert!(
                is_whole(replies, reply_bytes, ANSWER),
                "{replies} {reply_bytes}"
            );
        }
    }
    std::thread::sleep(silence(WALKED));
    for name in ["node", "operator"] {
        let (flows, _) = told(mesh, name);
        assert_eq!(flows.len(), 2, "{flows:?}");
        for kinds in flows {
            assert_eq!(
                kinds.first().map(String::as_str),
                Some("opened"),
                "{kinds:?}"
            );
            assert_eq!(
                kinds.last().map(String::as_str),
                Some("closed"),
                "{kinds:?}"
            );
            let ends = kinds
                .iter()
                .filter(|kind| ["closed", "idle"].contains(&kind.as_str()));
            assert_eq!(ends.count(), 1, "{kinds:?}");
        }
    }
    // What it carried is not forgotten with it.
    let top = mesh.node("node").mesh(&["top"]).unwrap();
    let mut peers = top["peers"].as_array().unwrap().iter();
    let operator = peers.find(|peer| peer["name"] == "operator").unwrap();
    assert_eq!(operator["flows"], 0, "{operator}");
    let received = operator["received_bytes"].as_u64().unwrap();
    assert!(received > 2 * QUESTION as u64, "{operator}");
}

#[test]
fn a_connection_is_told_of_from_open_to_close_and_once() {
    let lab = Lab::of_release_build().unwrap();
    let mesh = Mesh::of_roles(lab, &policy(), backend()).unwrap();
    is_told_of_from_open_to_close(&mesh);
}

#[test]
fn a_connection_judged_in_process_is_told_of_alike() {
    let lab = Lab::of_release_build().unwrap();
    is_told_of_from_open_to_close(&Mesh::in_process(lab, &policy()).unwrap());
}

#[test]
fn flows_end_with_the_filter_and_with_all_that_they_carried() {
    let lab = Lab::of_release_build().unwrap();
    let mesh = Mesh::of_roles(lab, &policy(), backend()).unwrap();
    let to = mesh.node("node").address(Family::V4).unwrap();
    let listener = listener(&mesh);
    let operator = &mesh.node("operator").host;
    let mut connection = operator.inside(|| connect(to)).unwrap().unwrap();
    let (mut served, _) = listener.accept().unwrap();
    connection.write_all(&vec![0; QUESTION]).unwrap();
    served.read_exact(&mut vec![0; QUESTION]).unwrap();
    mesh.node("node").mesh(&["down"]).unwrap();
    let last = eventually(SOON, || {
        let arguments = ["flows", "--json", "--port", "22"];
        let text = mesh.node("node").host.run("mesh", &arguments)?;
        let last = text.lines().last().context("no record")?;
        let last: Value = serde_json::from_str(last)?;
        anyhow::ensure!(last["kind"] == "idle", "{last}");
        Ok(last)
    });
    let carried = last.unwrap()["bytes"].as_u64().unwrap();
    assert!(carried > QUESTION as u64, "{carried}");
}

#[test]
fn flows_is_asked_in_words_that_it_knows_and_says_when_the_agent_ends() {
    let lab = Lab::of_release_build().unwrap();
    let mut mesh = Mesh::of_roles(lab, &policy(), backend()).unwrap();
    let node = mesh.node("node");
    let refused = |arguments: &[&str]| {
        let mut all = vec!["flows"];
        all.extend(arguments);
        format!("{:#}", node.host.run("mesh", &all).unwrap_err())
    };
    let verdict = refused(&["--verdict", "dennied"]);
    assert!(
        verdict.contains("no rule") && verdict.contains("allowed"),
        "{verdict}"
    );
    let rule = refused(&["--rule", "0"]);
    assert!(rule.contains("--rule"), "{rule}");

    let mut command = node.host.command(User::Root, "mesh");
    command.args(["flows", "--follow"]);
    let mut follower = node.host.spawn("follower", command).unwrap();
    // It has connected when it shows what is remembered.
    let text = eventually(SOON, || {
        // What the policy does not allow is told of.
        drop(node.mesh(&["ping", "--timeout", "100", "operator"]));
        let log = follower.log();
        anyhow::ensure!(log.contains(" > "), "nothing yet: {log}");
        Ok(log)
    });
    drop(text.unwrap());
    mesh.node_mut("node").kill().unwrap();
    let ended = follower.wait(scaled(SOON)).unwrap();
    assert_eq!(ended.code(), Some(3), "{}", follower.log());
    assert!(
        follower.log().contains("the agent has ended"),
        "{}",
        follower.log()
    );
}
