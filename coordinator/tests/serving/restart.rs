//! Stopping, dying, coming back, and coming back from a backup.

use std::time::{Duration, Instant};

use coordinator::state_dir::StateDir;
use coordinator::store::restore::restore;
use mesh_api::v1;
use mesh_api::v1::notice::Kind;
use mesh_core::node::UnixTime;

use crate::support::{Agent, Coordinator, DENY_ALL, Process};

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_everything_and_answers_unchanged() {
    let mut coordinator = Coordinator::start().await;
    let secret = coordinator.key(true).await;
    let (agent, mut a) = coordinator.agent(&secret, "a").await;
    let (_, b) = coordinator.agent(&secret, "b").await;
    a.until(|map| map.peers.len() == 1).await;
    let held = a.map().clone();
    let before = coordinator.nodes().await;
    drop((a, b));
    coordinator.restart().await;

    let after = coordinator.nodes().await;
    let names = |nodes: &[v1::Node]| {
        nodes
            .iter()
            .map(|n| (n.id, n.key.clone()))
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&after), names(&before));
    assert!(after.iter().all(|node| node.last_seen.is_some()));
    let mut link = agent.connect(&coordinator.join()).await;
    let again = link.begin(&agent, Some(&held)).await;
    assert!(again.was_unchanged());
    assert_eq!(again.map().digest(), held.digest());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changed_while_a_node_was_away_comes_as_a_delta() {
    let mut coordinator = Coordinator::start().await;
    let secret = coordinator.key(true).await;
    let (agent, a) = coordinator.agent(&secret, "a").await;
    let held = a.map().clone();
    drop(a);
    coordinator.restart().await;
    let (_, _b) = coordinator.agent(&secret, "b").await;
    let mut link = agent.connect(&coordinator.join()).await;
    let a = link.begin(&agent, Some(&held)).await;
    assert!(!a.was_full() && !a.was_unchanged());
    assert_eq!(a.peer_names(), ["b"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_tells_every_node_and_takes_less_than_five_seconds() {
    let mut coordinator = Coordinator::start().await;
    let secret = coordinator.key(true).await;
    let mut sessions = Vec::new();
    for n in 0..20 {
        sessions.push(coordinator.agent(&secret, &format!("n{n}")).await.1);
    }
    let running = coordinator.running.take().unwrap();
    let begin = Instant::now();
    let stopped = tokio::spawn(running.stop());
    for session in &mut sessions {
        assert_eq!(session.notice().await, Kind::Shutdown);
    }
    // The nodes keep their channels open; that must not keep the coordinator.
    stopped.await.unwrap();
    assert!(
        begin.elapsed() < Duration::from_secs(5),
        "{:?}",
        begin.elapsed()
    );
    coordinator.launch().await.unwrap();
    assert_eq!(coordinator.nodes().await.len(), 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_before_a_kill_is_there_after_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged = Vec::new();
    for round in 0..4_u64 {
        let mut process = Process::start(dir.path()).await;
        let join = process.join().await;
        let request = v1::CreateKeyRequest {
            reusable: true,
            tags: vec!["tag:node".to_owned()],
            ..v1::CreateKeyRequest::default()
        };
        let key = process.admin().await.create_key(request).await.unwrap();
        let secret = key.into_inner().secret;
        let (sender, mut enrolled) = tokio::sync::mpsc::channel(1024);
        let crowd: Vec<_> = (0..8)
            .map(|_| {
                let (join, secret, sender) = (join.clone(), secret.clone(), sender.clone());
                tokio::spawn(async move {
                    loop {
                        let agent = Agent::make();
                        let mut link = agent.connect(&join).await;
                        let Ok(made) = link.enroll(&agent, &secret, "crowd").await else {
                            return;
                        };
                        sender.send((made.node_id, made.name)).await.unwrap();
                    }
                })
            })
            .collect();
        drop(sender);
        // Killed in the middle of it, each round at another moment.
        for _ in 0..10 + round * 7 {
            acknowledged.extend(enrolled.recv().await);
        }
        process.kill();
        while let Some(made) = enrolled.recv().await {
            acknowledged.push(made);
        }
        for task in crowd {
            // A connect to the dead process may well fail; that is not the matter here.
            drop(task.await);
        }
    }
    let process = Process::start(dir.path()).await;
    let list = process
        .admin()
        .await
        .list_nodes(v1::ListNodesRequest {})
        .await;
    let nodes = list.unwrap().into_inner().nodes;
    for (id, name) in &acknowledged {
        let found = nodes.iter().find(|node| node.id == *id);
        assert_eq!(
            found.map(|node| &node.name),
            Some(name),
            "node {id} is lost"
        );
    }
    assert!(acknowledged.len() >= 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_backup_begins_a_new_epoch_that_nodes_follow() {
    let mut coordinator = Coordinator::start().await;
    let secret = coordinator.key(true).await;
    let (agent, a) = coordinator.agent(&secret, "a").await;
    let backup = coordinator.dir.path().join("backup.db");
    let request = v1::BackupRequest {
        path: backup.to_str().unwrap().to_owned(),
    };
    let mut admin = coordinator.admin().await;
    admin.backup(request.clone()).await.unwrap();
    let again = admin.backup(request).await.unwrap_err();
    assert!(again.message().contains("exists"), "{again}");

    // The world moves on, and the node with it: its map is newer than the backup.
    let (_, b) = coordinator.agent(&secret, "b").await;
    let mut a = a;
    a.until(|map| map.peers.len() == 1).await;
    let held = a.map().clone();
    drop((a, b));
    let dir = coordinator.dir.path().join("state");
    let busy = StateDir::open(&dir).unwrap_err().to_string();
    assert!(busy.contains("running"), "{busy}");
    coordinator.stop().await;
    let restored = restore(&mut StateDir::open(&dir).unwrap(), &backup, UnixTime(7))
        .await
        .unwrap();
    assert_eq!((restored.epoch.0, restored.nodes), (2, 1));
    assert!(restored.moved_aside.unwrap().exists());

    coordinator.launch().await.unwrap();
    let mut link = agent.connect(&coordinator.join()).await;
    let a = link.begin(&agent, Some(&held)).await;
    assert!(a.was_full());
    assert!(a.map().generation < held.generation);
    assert_eq!(a.map().epoch.0, 2);
    assert!(a.peer_names().is_empty());

    // The same again: an epoch is never used twice.
    coordinator.stop().await;
    let restored = restore(&mut StateDir::open(&dir).unwrap(), &backup, UnixTime(8))
        .await
        .unwrap();
    assert_eq!(restored.epoch.0, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_backup_or_a_foreign_one_leaves_what_was_there() {
    let mut coordinator = Coordinator::start().await;
    let mut other = Coordinator::start().await;
    coordinator.key(false).await;
    coordinator.stop().await;
    other.stop().await;
    let before = std::fs::read(coordinator.state("coordinator.db")).unwrap();
    let mut state = StateDir::open(&coordinator.dir.path().join("state")).unwrap();
    let cut = coordinator.dir.path().join("cut.db");
    std::fs::write(&cut, &before[..before.len() / 2]).unwrap();
    for (file, words) in [
        (cut, "damaged"),
        (other.state("coordinator.db"), "another coordinator"),
        (coordinator.state("coordinator.db"), "itself"),
        (coordinator.dir.path().join("nothing"), "No such file"),
    ] {
        let error = restore(&mut state, &file, UnixTime(7)).await.unwrap_err();
        assert!(format!("{error:#}").contains(words), "{error:#}");
        assert_eq!(
            std::fs::read(coordinator.state("coordinator.db")).unwrap(),
            before
        );
    }
    drop(state);
    coordinator.launch().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_policy_in_force_survives_and_a_refused_one_changes_nothing() {
    let mut coordinator = Coordinator::start().await;
    let generation = coordinator.set_policy(DENY_ALL).await.unwrap();
    let refused = coordinator
        .set_policy("{\n  \"acls\": [{\"action\": \"accept\", \"src\": [\"tag:nope\"], \"dst\": [\"*:*\"]}],\n}")
        .await
        .unwrap_err();
    assert!(refused.message().starts_with("test.hujson:2:"), "{refused}");
    assert_eq!(
        coordinator.running().world.current().world.generation.0,
        generation
    );
    coordinator.restart().await;
    let policy = coordinator
        .admin()
        .await
        .get_policy(v1::GetPolicyRequest::default())
        .await
        .unwrap();
    assert_eq!(policy.into_inner().text, DENY_ALL);
}
