//! Many nodes at once: one edit, and how long until the last one has it.

use std::time::Instant;

use crate::support::{Agent, Coordinator, DENY_ALL, PATIENCE};

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_edit_reaches_two_hundred_nodes_at_once() {
    const NODES: usize = 200;
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

    let begin = Instant::now();
    let generation = coordinator.set_policy(DENY_ALL).await.unwrap();
    let waiting: Vec<_> = sessions
        .into_iter()
        .map(|mut session| {
            tokio::spawn(async move {
                session.until(|map| map.peers.is_empty()).await;
                (begin.elapsed(), session)
            })
        })
        .collect();
    let mut last = std::time::Duration::ZERO;
    let mut kept = Vec::new();
    for session in waiting {
        let (took, session) = session.await.unwrap();
        assert_eq!(session.map().generation.0, generation);
        last = last.max(took);
        kept.push(session);
    }
    eprintln!("a policy edit reached {NODES} nodes in {last:?}");
    assert!(last < PATIENCE);
}
