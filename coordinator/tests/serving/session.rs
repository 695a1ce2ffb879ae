//! Sessions: whole maps once, then differences, and an end that says why.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_api::v1;
use mesh_api::v1::agent_message::Message;
use mesh_api::v1::notice::Kind;
use tonic::Code;

use crate::support::{Agent, Coordinator, DENY_ALL, eventually};

fn node(name: &str) -> v1::NodeRef {
    v1::NodeRef {
        node: name.to_owned(),
    }
}

fn report(endpoints: &[&str]) -> Message {
    let endpoints = endpoints
        .iter()
        .map(|text| text.parse::<SocketAddr>().unwrap().into());
    Message::Report(v1::Report {
        endpoints: endpoints.collect(),
        advertised_routes: Vec::new(),
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newcomer_appears_by_a_delta_and_disappears_when_deleted() {
    let coordinator = Coordinator::start().await;
    let secret = coordinator.key(true).await;
    let (_, mut a) = coordinator.agent(&secret, "a").await;
    assert!(a.was_full());
    assert!(a.peer_names().is_empty());
    let (_, mut b) = coordinator.agent(&secret, "b").await;
    a.until(|map| map.peers.len() == 1).await;
    assert!(!a.was_full());
    assert_eq!((a.peer_names(), b.peer_names()), (vec!["b"], vec!["a"]));

    coordinator
        .admin()
        .await
        .delete_node(node("b"))
        .await
        .unwrap();
    assert_eq!(b.notice().await, Kind::Deleted);
    a.until(|map| map.peers.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_no_rule_joins_do_not_know_each_other() {
    let coordinator = Coordinator::start().await;
    coordinator.set_policy(DENY_ALL).await.unwrap();
    let secret = coordinator.key(true).await;
    let (_, mut a) = coordinator.agent(&secret, "a").await;
    let (_, b) = coordinator.agent(&secret, "b").await;
    assert!(a.peer_names().is_empty() && b.peer_names().is_empty());
    let joined = r#"{"tagOwners": {"tag:node": []},
        "acls": [{"action": "accept", "src": ["tag:node"], "dst": ["tag:node:22"]}]}"#;
    let generation = coordinator.set_policy(joined).await.unwrap();
    a.until(|map| map.peers.len() == 1).await;
    assert_eq!(a.map().generation.0, generation);
    assert!(!a.map().policy.entries.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_reach_those_who_see_the_node_and_odd_ones_nobody() {
    let coordinator = Coordinator::start().await;
    let secret = coordinator.key(true).await;
    let (_, mut a) = coordinator.agent(&secret, "a").await;
    let (_, b) = coordinator.agent(&secret, "b").await;
    b.say(report(&[
        "192.0.2.7:41641",
        "127.0.0.1:1",
        "100.64.0.9:1",
        "[fe80::1]:1",
        "0.0.0.0:1",
        "224.0.0.1:1",
    ]))
    .await;
    let map = a
        .until(|map| map.peers.values().any(|peer| !peer.endpoints.is_empty()))
        .await;
    let peer = map.peers.values().next().unwrap();
    let endpoints: Vec<_> = peer.endpoints.iter().map(ToString::to_string).collect();
    assert_eq!(endpoints, ["192.0.2.7:41641"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_reports_ends_in_the_last_one_and_a_bounded_list() {
    let coordinator = Coordinator::start().await;
    let (_, a) = coordinator.agent(&coordinator.key(true).await, "a").await;
    let before = coordinator.running().world.current().world.generation.0;
    for n in 0..200_u32 {
        let endpoints: Vec<String> = (1..=40)
            .map(|host| format!("192.0.2.{host}:{}", 1000 + n))
            .collect();
        a.say(report(
            &endpoints.iter().map(String::as_str).collect::<Vec<_>>(),
        ))
        .await;
    }
    eventually("the last report counts", || async {
        let nodes = coordinator.nodes().await;
        nodes[0].endpoints.iter().all(|e| e.ends_with(":1199")) && nodes[0].endpoints.len() == 32
    })
    .await;
    let after = coordinator.running().world.current().world.generation.0;
    assert!(
        after - before < 30,
        "{} reports were written",
        after - before
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_session_of_a_machine_replaces_the_first() {
    let coordinator = Coordinator::start().await;
    let (agent, mut first) = coordinator.agent(&coordinator.key(false).await, "a").await;
    let mut link = agent.connect(&coordinator.join()).await;
    let second = link.begin(&agent, None).await;
    assert_eq!(first.notice().await, Kind::Replaced);
    drop(first);
    eventually("the second session is the node's", || async {
        coordinator.nodes().await[0].connected
    })
    .await;
    drop(second);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_node_enforces_is_shown() {
    let coordinator = Coordinator::start().await;
    let (_, mut a) = coordinator.agent(&coordinator.key(false).await, "a").await;
    let generation = coordinator.set_policy(DENY_ALL).await.unwrap();
    a.until(|map| map.generation.0 == generation).await;
    eventually("the acknowledgement is seen", || async {
        coordinator.nodes().await[0].applied_generation == Some(generation)
    })
    .await;
    let failed = v1::Applied {
        epoch: 1,
        generation,
        error: "no room in the map\u{1b}[31m".to_owned(),
    };
    a.say(Message::Applied(failed)).await;
    eventually("the failure is seen", || async {
        coordinator.nodes().await[0].apply_error == "no room in the map[31m"
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_node_is_told_so_and_nobody_sees_it() {
    let coordinator = Coordinator::start().await;
    let secret = coordinator.key(true).await;
    let (_, mut a) = coordinator.agent(&secret, "a").await;
    let (_, mut b) = coordinator.agent(&secret, "b").await;
    coordinator
        .admin()
        .await
        .expire_node(node("b"))
        .await
        .unwrap();
    b.until(|map| map.me.expired && map.peers.is_empty()).await;
    a.until(|map| map.peers.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_persons_node_expires_when_its_time_is_up() {
    let coordinator = Coordinator::start().await;
    let mut admin = coordinator.admin().await;
    let request = v1::CreateUserRequest {
        name: "alice@example.org".to_owned(),
        ..v1::CreateUserRequest::default()
    };
    admin.create_user(request).await.unwrap();
    let request = v1::CreateKeyRequest {
        user: Some("alice@example.org".to_owned()),
        ..v1::CreateKeyRequest::default()
    };
    let key = admin.create_key(request).await.unwrap().into_inner();
    let (_, mut a) = coordinator.agent(&key.secret, "laptop").await;
    assert_eq!(
        a.map().me.user.as_ref().unwrap().as_str(),
        "alice@example.org"
    );
    coordinator
        .running()
        .clock
        .skip(Duration::from_secs(181 * 24 * 3600));
    a.until(|map| map.me.expired).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ephemeral_node_is_deleted_when_it_is_gone_for_a_while() {
    let coordinator = Coordinator::start().await;
    let request = v1::CreateKeyRequest {
        ephemeral: true,
        tags: vec!["tag:node".to_owned()],
        ..v1::CreateKeyRequest::default()
    };
    let key = coordinator
        .admin()
        .await
        .create_key(request)
        .await
        .unwrap()
        .into_inner();
    let (_, session) = coordinator.agent(&key.secret, "job").await;
    tokio::time::sleep(Duration::from_millis(3500)).await;
    assert_eq!(coordinator.nodes().await.len(), 1);
    drop(session);
    eventually("the node is deleted", || async {
        coordinator.nodes().await.is_empty()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn logging_out_ends_the_node() {
    let coordinator = Coordinator::start().await;
    let (agent, a) = coordinator.agent(&coordinator.key(false).await, "a").await;
    a.say(Message::Logout(v1::Logout {})).await;
    eventually("the node has expired", || async {
        coordinator.nodes().await[0].expired
    })
    .await;
    let mut link = agent.connect(&coordinator.join()).await;
    let again = link.begin(&agent, None).await;
    assert!(again.map().me.expired);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_wireguard_key_is_taken_with_its_proof() {
    let coordinator = Coordinator::start().await;
    let secret = coordinator.key(true).await;
    let (_, mut a) = coordinator.agent(&secret, "a").await;
    let (mut agent, b) = coordinator.agent(&secret, "b").await;
    drop(b);
    agent.node = Agent::make().node;
    let mut link = agent.connect(&coordinator.join()).await;
    let b = link.begin(&agent, None).await;
    assert_eq!(b.map().me.key, agent.node.public());
    let key = agent.node.public();
    a.until(|map| map.peers.values().any(|peer| peer.key == key))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_gets_no_session() {
    let coordinator = Coordinator::start().await;
    let agent = Agent::make();
    let mut link = agent.connect(&coordinator.join()).await;
    assert_eq!(link.node_id, None);
    let mut session = link.open(&agent, None).await;
    assert_eq!(session.notice().await, Kind::Deleted);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_does_not_begin_is_refused() {
    let coordinator = Coordinator::start().await;
    let (agent, session) = coordinator.agent(&coordinator.key(false).await, "a").await;
    drop(session);
    let mut link = agent.connect(&coordinator.join()).await;
    let messages = tokio_stream::once(v1::AgentMessage {
        message: Some(Message::Report(v1::Report::default())),
    });
    let mut inbound = link.client.session(messages).await.unwrap().into_inner();
    assert_eq!(
        inbound.message().await.unwrap_err().code(),
        Code::InvalidArgument
    );
}
