//! Becoming a node: once per one-off key, and never with a bad one.

use std::time::Duration;

use mesh_api::v1;
use tonic::Code;

use crate::support::{Agent, Coordinator, hello};

#[tokio::test(flavor = "multi_thread")]
async fn fifty_concurrent_enrolments_with_one_one_off_key_make_one_node() {
    let coordinator = Coordinator::start().await;
    let (secret, join) = (coordinator.key(false).await, coordinator.join());
    let attempts: Vec<_> = (0..50)
        .map(|_| {
            let (secret, join) = (secret.clone(), join.clone());
            tokio::spawn(async move {
                let agent = Agent::make();
                let mut link = agent.connect(&join).await;
                link.enroll(&agent, &secret, "web").await
            })
        })
        .collect();
    let mut enrolled = 0;
    for attempt in attempts {
        match attempt.await.unwrap() {
            Ok(_) => enrolled += 1,
            Err(refused) => {
                assert_eq!(refused.code(), Code::PermissionDenied);
                assert!(refused.message().contains("used up"), "{refused}");
            }
        }
    }
    assert_eq!(enrolled, 1);
    assert_eq!(coordinator.nodes().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_bad_key_gets_one_clear_error() {
    let coordinator = Coordinator::start().await;
    let used = coordinator.key(false).await;
    coordinator.agent(&used, "first").await;
    let revoked = coordinator.key(false).await;
    let mut admin = coordinator.admin().await;
    let keys = admin
        .list_keys(v1::Empty {})
        .await
        .unwrap()
        .into_inner()
        .keys;
    let id = keys
        .iter()
        .find(|key| revoked.starts_with(&key.prefix))
        .unwrap()
        .id;
    admin.revoke_key(v1::KeyRef { id }).await.unwrap();
    let expired = coordinator.key(false).await;
    let last = expired.chars().last().unwrap();
    let mut unknown = expired.clone();
    unknown.pop();
    unknown.push(if last == '0' { '1' } else { '0' });

    let agent = Agent::make();
    let mut link = agent.connect(&coordinator.join()).await;
    for (secret, words) in [
        ("hello", "malformed"),
        (unknown.as_str(), "unknown"),
        (revoked.as_str(), "revoked"),
        (used.as_str(), "used up"),
    ] {
        let refused = link.enroll(&agent, secret, "web").await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
        assert!(refused.message().contains(words), "{refused}");
    }
    coordinator.running().clock.skip(Duration::from_secs(3601));
    let refused = link.enroll(&agent, &expired, "web").await.unwrap_err();
    assert!(refused.message().contains("expired"), "{refused}");
    assert_eq!(coordinator.nodes().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_made_safe_and_a_clash_gets_a_number() {
    let coordinator = Coordinator::start().await;
    let secret = coordinator.key(true).await;
    for (host, name) in [
        ("Web.Example.org", "web"),
        ("web", "web-1"),
        ("../../etc/passwd\u{1b}[31m", "node"),
        ("web", "web-2"),
    ] {
        let agent = Agent::make();
        let mut link = agent.connect(&coordinator.join()).await;
        let enrolled = link.enroll(&agent, &secret, host).await.unwrap();
        assert_eq!(enrolled.name, name);
    }
    let addresses: Vec<_> = coordinator
        .nodes()
        .await
        .iter()
        .map(|n| n.addresses[0].clone())
        .collect();
    assert_eq!(
        addresses,
        ["100.64.0.1", "100.64.0.2", "100.64.0.3", "100.64.0.4"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_node_gets_an_address_of_its_pool_and_keeps_it() {
    let policy = |pool: &str| {
        format!(
            r#"{{"tagOwners": {{"tag:node": []}}, "grants": [],
            "nodeAttrs": [{{"target": ["tag:node"], "ipPool": ["{pool}"]}}]}}"#
        )
    };
    let coordinator = Coordinator::start().await;
    let secret = coordinator.key(true).await;
    let (agent, _session) = coordinator.agent(&secret, "before").await;
    coordinator
        .set_policy(&policy("100.64.0.0/31"))
        .await
        .unwrap();
    // .1 is taken, and .0 is the mesh's own.
    let late = Agent::make();
    let mut link = late.connect(&coordinator.join()).await;
    let refused = link.enroll(&late, &secret, "late").await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(
        refused
            .message()
            .contains("every address of the ipPool 100.64.0.0/31"),
        "{refused}"
    );
    coordinator
        .set_policy(&policy("100.90.0.8/30"))
        .await
        .unwrap();
    link.enroll(&late, &secret, "late").await.unwrap();

    // All at once, and no address twice.
    let crowd = (0..4).map(|_| {
        let (secret, join) = (secret.clone(), coordinator.join());
        tokio::spawn(async move {
            let agent = Agent::make();
            agent
                .connect(&join)
                .await
                .enroll(&agent, &secret, "crowd")
                .await
        })
    });
    let mut enrolled = 0;
    for one in crowd.collect::<Vec<_>>() {
        enrolled += usize::from(one.await.unwrap().is_ok());
    }
    assert_eq!(enrolled, 3);
    let other = v1::CreateKeyRequest {
        tags: vec!["tag:other".to_owned()],
        ..v1::CreateKeyRequest::default()
    };
    let mut admin = coordinator.admin().await;
    let other = admin.create_key(other).await.unwrap().into_inner().secret;
    coordinator.agent(&other, "other").await;
    link = agent.connect(&coordinator.join()).await;
    link.enroll(&agent, &secret, "before").await.unwrap();
    let nodes = coordinator.nodes().await;
    let mut addresses: Vec<_> = nodes
        .iter()
        .map(|node| node.addresses[0].as_str())
        .collect();
    addresses.sort();
    assert_eq!(
        addresses,
        [
            "100.64.0.1",
            "100.64.0.2",
            "100.90.0.10",
            "100.90.0.11",
            "100.90.0.8",
            "100.90.0.9"
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_enrolment_whose_answer_was_lost_can_be_asked_again() {
    let coordinator = Coordinator::start().await;
    let secret = coordinator.key(false).await;
    let agent = Agent::make();
    let first = agent
        .connect(&coordinator.join())
        .await
        .enroll(&agent, &secret, "web")
        .await;
    let mut link = agent.connect(&coordinator.join()).await;
    let first = first.unwrap();
    assert_eq!(link.node_id, Some(first.node_id));
    assert_eq!(link.enroll(&agent, &secret, "web").await.unwrap(), first);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_enrols_again_stays_the_same_node() {
    let coordinator = Coordinator::start().await;
    let (mut agent, session) = coordinator
        .agent(&coordinator.key(false).await, "web")
        .await;
    let before = session.map().me.clone();
    drop(session);
    let request = v1::NodeRef {
        node: "web".to_owned(),
    };
    coordinator
        .admin()
        .await
        .expire_node(request)
        .await
        .unwrap();

    agent.node = Agent::make().node;
    let mut link = agent.connect(&coordinator.join()).await;
    let request = v1::CreateKeyRequest {
        tags: vec!["tag:other".to_owned()],
        ..v1::CreateKeyRequest::default()
    };
    let key = coordinator.admin().await.create_key(request).await.unwrap();
    link.enroll(&agent, &key.into_inner().secret, "web")
        .await
        .unwrap();
    let session = link.begin(&agent, None).await;
    let after = &session.map().me;
    assert_eq!((after.id, after.addresses), (before.id, before.addresses));
    assert_eq!(after.key, agent.node.public());
    assert!(!after.expired);
    assert_eq!(
        after
            .tags
            .iter()
            .map(|tag| tag.as_str())
            .collect::<Vec<_>>(),
        ["tag:other"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proof_of_another_channel_or_key_is_refused() {
    let coordinator = Coordinator::start().await;
    let secret = coordinator.key(true).await;
    let agent = Agent::make();
    let here = agent.connect(&coordinator.join()).await;
    let mut there = agent.connect(&coordinator.join()).await;
    let request = v1::EnrollRequest {
        auth_key: secret.clone(),
        node: Some(here.proof(&agent)),
        ..v1::EnrollRequest::default()
    };
    let refused = there.client.enroll(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);

    let stolen = Agent {
        machine: agent.machine.clone(),
        node: Agent::make().node,
    };
    let mut proof = there.proof(&agent);
    proof.key = stolen.node.public().0.to_vec();
    let request = v1::EnrollRequest {
        auth_key: secret,
        node: Some(proof),
        ..v1::EnrollRequest::default()
    };
    assert!(there.client.enroll(request).await.is_err());
    assert!(coordinator.nodes().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn another_nodes_wireguard_key_is_not_taken() {
    let coordinator = Coordinator::start().await;
    let secret = coordinator.key(true).await;
    let (first, _session) = coordinator.agent(&secret, "first").await;
    let copy = Agent {
        machine: Agent::make().machine,
        node: first.node,
    };
    let mut link = copy.connect(&coordinator.join()).await;
    let refused = link.enroll(&copy, &secret, "second").await.unwrap_err();
    assert_eq!(refused.code(), Code::AlreadyExists);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_protocol_version_is_answered_in_words() {
    let coordinator = Coordinator::start().await;
    let mut link = Agent::make().connect(&coordinator.join()).await;
    for (protocol, words) in [(0, "update the agent"), (99, "update the coordinator")] {
        let request = v1::HelloRequest {
            protocol,
            ..hello()
        };
        let refused = link.client.hello(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        assert!(refused.message().contains(words), "{refused}");
    }
}
