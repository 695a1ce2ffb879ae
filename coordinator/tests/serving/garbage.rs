//! Rubbish at every door: an error or silence, and the next honest caller is served.

use std::time::{Duration, Instant};

use mesh_api::v1;
use mesh_api::v1::agent_message::Message;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tonic::Code;

use crate::support::{Agent, Coordinator, PATIENCE, Process};

/// Things that no client of ours says.
fn rubbish() -> Vec<Vec<u8>> {
    let mut lines: Vec<Vec<u8>> = vec![
        Vec::new(),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        vec![0; 4096],
        vec![0xff; 70_000],
        "é\u{0}\u{1b}[2J".repeat(100).into_bytes(),
    ];
    // Any bytes at all, the same in each run.
    let mut state = 0x9e37_79b9_u32;
    for length in [1, 7, 100, 3000] {
        let bytes = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        });
        lines.push(bytes.take(length).collect());
    }
    lines
}

async fn throw(
    mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    bytes: &[u8],
) {
    let thrown = async {
        drop(stream.write_all(bytes).await);
        drop(stream.shutdown().await);
        let mut answer = Vec::new();
        drop(stream.read_to_end(&mut answer).await);
    };
    drop(tokio::time::timeout(Duration::from_secs(15), thrown).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn rubbish_on_every_socket_changes_nothing() {
    let coordinator = Coordinator::start().await;
    let node = coordinator.running().node_address;
    let metrics = coordinator.running().metrics_address;
    for bytes in rubbish() {
        throw(TcpStream::connect(node).await.unwrap(), &bytes).await;
        throw(TcpStream::connect(metrics).await.unwrap(), &bytes).await;
        let socket = coordinator.dir.path().join("admin.sock");
        throw(UnixStream::connect(socket).await.unwrap(), &bytes).await;
        // And inside the channel, where HTTP/2 is expected.
        let stream = Agent::make().channel(&coordinator.join()).await.unwrap();
        throw(stream, &bytes).await;
    }
    let (_, session) = coordinator
        .agent(&coordinator.key(false).await, "honest")
        .await;
    drop(session);
    assert_eq!(coordinator.nodes().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_fields_are_named_and_end_only_their_own_session() {
    let coordinator = Coordinator::start().await;
    let secret = coordinator.key(true).await;
    let (_, mut honest) = coordinator.agent(&secret, "honest").await;
    for report in [
        v1::Report {
            endpoints: vec![v1::Endpoint {
                address: vec![1, 2, 3],
                port: 1,
            }],
            ..v1::Report::default()
        },
        v1::Report {
            endpoints: vec![v1::Endpoint {
                address: vec![192, 0, 2, 1],
                port: 70_000,
            }],
            ..v1::Report::default()
        },
        v1::Report {
            advertised_routes: vec![v1::Prefix {
                address: vec![10, 0, 0, 1],
                length: 8,
            }],
            ..v1::Report::default()
        },
    ] {
        let (_, mut session) = coordinator.agent(&secret, "odd").await;
        session.say(Message::Report(report)).await;
        let error = loop {
            match session.next().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the session ended without a word"),
                Err(error) => break error,
            }
        };
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(error.message().contains("field"), "{error}");
    }
    honest.until(|map| map.peers.len() == 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_or_empty_proof_is_refused_in_words() {
    let coordinator = Coordinator::start().await;
    let mut link = Agent::make().connect(&coordinator.join()).await;
    for (node, words) in [
        (None, "missing"),
        (Some(v1::NodeProof::default()), "32 bytes"),
        (
            Some(v1::NodeProof {
                key: vec![0; 32],
                proof: vec![1; 31],
            }),
            "32 bytes",
        ),
        (
            Some(v1::NodeProof {
                key: vec![0; 32],
                proof: vec![0; 32],
            }),
            "does not hold",
        ),
    ] {
        let request = v1::EnrollRequest {
            auth_key: "x".repeat(100_000),
            node,
            ..v1::EnrollRequest::default()
        };
        let refused = link.client.enroll(request).await.unwrap_err();
        assert!(refused.message().contains(words), "{refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_beyond_all_measure_is_refused() {
    let coordinator = Coordinator::start().await;
    let mut link = Agent::make().connect(&coordinator.join()).await;
    let request = v1::EnrollRequest {
        auth_key: "x".repeat(5 * 1024 * 1024),
        ..v1::EnrollRequest::default()
    };
    let refused = link.client.enroll(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn half_open_connections_do_not_keep_others_out() {
    let coordinator = Coordinator::start().await;
    let mut idle = Vec::new();
    for _ in 0..200 {
        idle.push(
            TcpStream::connect(coordinator.running().node_address)
                .await
                .unwrap(),
        );
    }
    let begin = Instant::now();
    coordinator
        .agent(&coordinator.key(false).await, "honest")
        .await;
    assert!(
        begin.elapsed() < Duration::from_secs(5),
        "{:?}",
        begin.elapsed()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_listener_outlives_a_lack_of_file_descriptors() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start_with(dir.path(), Some(40)).await;
    let join = process.join().await;
    let mut flood = Vec::new();
    for _ in 0..100 {
        flood.push(
            TcpStream::connect((join.host.as_str(), join.port))
                .await
                .unwrap(),
        );
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    drop(flood);
    let served = async {
        // Until the descriptors are back, a connection may be closed in our face.
        while Agent::make().channel(&join).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Agent::make().connect(&join).await
    };
    let link = tokio::time::timeout(PATIENCE, served).await.unwrap();
    assert_eq!(link.node_id, None);
}
