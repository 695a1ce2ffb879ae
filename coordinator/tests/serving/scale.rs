//! Many nodes at once: one edit, and how long until the last one has it.
//!
//! The nodes' ends run in this process too, on the same cores, so what a node does with an update,
//! its signature and digest first of all, is left until the last update has arrived.

use std::time::{Duration, Instant};

use mesh_core::policy::ALLOW_ALL;

use crate::support::{Agent, Coordinator, DENY_ALL, Session};

const NODES: usize = 200;

/// From the edit to the last update on its way. What is not optimised gets time for being so.
const BAR: Duration = Duration::from_secs(if cfg!(debug_assertions) { 15 } else { 1 });

/// Joins nothing that was not joined before: a rule more in the middle of others.
const ONE_RULE: &str = r#"{"grants": [
    {"src": ["*"], "dst": ["*"], "ip": ["*"]},
    {"src": ["tag:node"], "dst": ["tag:node"], "ip": ["tcp:22"]}],
    "tagOwners": {"tag:node": []}, "denies": [
    {"src": ["tag:node"], "dst": ["tag:node:23"]}]}"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_edit_reaches_two_hundred_nodes_at_once() {
    let coordinator = Coordinator::start().await;
    let secret = coordinator.key(true).await;
    let begin = Instant::now();
    let mut agents = Vec::new();
    for n in 0..NODES {
        let agent = Agent::make();
        let mut link = agent.connect(&coordinator.join()).await;
        link.enroll(&agent, &secret, &format!("n{n}"))
            .await
            .unwrap();
        agents.push((agent, link));
    }
    eprintln!("{NODES} nodes enrolled one by one in {:?}", begin.elapsed());
    let begin = Instant::now();
    let mut sessions = Vec::new();
    for (agent, link) in &mut agents {
        let session = link.begin(agent, None).await;
        assert_eq!(session.map().peers.len(), NODES - 1);
        sessions.push(session);
    }
    eprintln!(
        "{NODES} whole maps taken one by one in {:?}",
        begin.elapsed()
    );
    for (what, text, peers) in [
        ("everybody loses everybody", DENY_ALL, 0),
        ("everybody gains everybody", ALLOW_ALL, NODES - 1),
        ("one rule more", ONE_RULE, NODES - 1),
    ] {
        let figures;
        (sessions, figures) = edit(&coordinator, sessions, text, peers).await;
        let Figures {
            set,
            first,
            last,
            taken,
        } = figures;
        eprintln!(
            "{what}: in force after {set:?}, first update after {first:?}, last after {last:?}, \
             all taken after {taken:?}"
        );
        assert!(last <= BAR, "{what}: the last update came after {last:?}");
    }
}

/// Since the edit was asked for.
struct Figures {
    set: Duration,
    first: Duration,
    last: Duration,
    taken: Duration,
}

async fn edit(
    coordinator: &Coordinator,
    sessions: Vec<Session>,
    text: &str,
    peers: usize,
) -> (Vec<Session>, Figures) {
    let begin = Instant::now();
    let generation = coordinator.set_policy(text).await.unwrap();
    let set = begin.elapsed();
    let waiting = sessions.into_iter().map(|mut session| {
        tokio::spawn(async move {
            let update = session.next().await.unwrap().unwrap();
            (begin.elapsed(), session, update)
        })
    });
    let waiting: Vec<_> = waiting.collect();
    let mut arrived = Vec::new();
    for session in waiting {
        arrived.push(session.await.unwrap());
    }
    let last = arrived.iter().map(|(at, ..)| *at).max().unwrap();
    let first = arrived.iter().map(|(at, ..)| *at).min().unwrap();
    let mut sessions = Vec::new();
    for (_, mut session, update) in arrived {
        session.take(update).await;
        session
            .until(|map| map.generation.0 == generation && map.peers.len() == peers)
            .await;
        sessions.push(session);
    }
    let figures = Figures {
        set,
        first,
        last,
        taken: begin.elapsed(),
    };
    (sessions, figures)
}
