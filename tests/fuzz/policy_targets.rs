//! What operators write, beyond a policy itself: its layout, two policies, questions about one.

use std::sync::{Arc, LazyLock};

use mesh_core::netmap::Netmap;
use mesh_core::node::{Epoch, Generation};
use mesh_core::policy::{
    self, Change, CompiledPolicy, Document, Problem, Question, Subjects, explain_own,
    what_can_i_reach, who_can_reach_me,
};
use mesh_core::world::World;

use super::{netmap, nodes, users};

static WORLD: LazyLock<World> = LazyLock::new(|| World {
    mesh: Arc::new(netmap().mesh),
    epoch: Epoch(1),
    generation: Generation(1),
    users: users(),
    nodes: nodes(),
});

/// A policy that is good, and what it comes to.
fn good(text: &str) -> Option<(Document, CompiledPolicy)> {
    let subjects = Subjects::from(&*WORLD);
    let document = Document::parse(text).ok()?;
    policy::check(&document, &subjects).ok()?;
    let compiled = policy::compile(&document, &subjects, None);
    Some((document, compiled))
}

/// Laid out anew a text says the same, has the same without effect, and is laid out already.
pub fn policy_layout(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(formatted) = policy::format(text) else {
        assert!(
            Document::parse(text).is_err(),
            "what can be read has a layout"
        );
        return;
    };
    assert_eq!(policy::format(&formatted).as_ref(), Ok(&formatted));
    let messages = |text: &str| {
        let document = Document::parse(text).ok()?;
        let found = document.warnings().into_iter();
        Some(
            found
                .map(|Problem { message, .. }| message)
                .collect::<Vec<_>>(),
        )
    };
    assert_eq!(messages(text), messages(&formatted));
    let (before, after) = (good(text), good(&formatted));
    assert_eq!(before.is_some(), after.is_some());
    if let (Some((_, before)), Some((_, after))) = (before, after) {
        for id in WORLD.nodes.keys() {
            let (before, after) = (before.node(*id), after.node(*id));
            assert_eq!(before.identities, after.identities);
            assert_eq!(before.entries, after.entries);
        }
    }
}

/// Two policies with a zero byte between them: what one gains over the other, that loses against it.
pub fn policy_diff(data: &[u8]) {
    let mut texts = data.splitn(2, |byte| *byte == 0);
    let mut next = || good(std::str::from_utf8(texts.next()?).ok()?);
    let (Some(old), Some(new)) = (next(), next()) else {
        return;
    };
    let diff = |old: &(Document, CompiledPolicy), new: &(Document, CompiledPolicy)| {
        policy::diff(&WORLD, (&old.0, &old.1), (&new.0, &new.1))
    };
    let (there, mut back) = (diff(&old, &new), diff(&new, &old));
    let _ = policy::diff_answer(&there);
    for change in &mut back {
        change.gained = !change.gained;
    }
    let sorted = |mut changes: Vec<Change>| {
        changes.sort();
        changes
    };
    assert_eq!(sorted(there), sorted(back));
    assert!(diff(&old, &old).is_empty() && diff(&new, &new).is_empty());
}

/// A source and a destination, a line each, asked about in every way at both doors.
pub fn policy_question(data: &[u8]) {
    // Its own tests ask of nodes that are not in this world.
    static EXAMPLE: LazyLock<(Document, CompiledPolicy)> = LazyLock::new(|| {
        let document = Document::parse(policy::EXAMPLE).unwrap();
        let compiled = policy::compile(&document, &Subjects::from(&*WORLD), None);
        (document, compiled)
    });
    static OWN: LazyLock<Netmap> = LazyLock::new(netmap);
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let (src, dst) = text.split_once('\n').unwrap_or((text, text));
    let (document, compiled) = &*EXAMPLE;
    for question in [
        Question::Explain { src, dst },
        Question::WhoCan { dst },
        Question::WhatCan { src },
    ] {
        if let Ok(answer) = policy::ask(&WORLD, document, compiled, question) {
            assert!(!answer.lines.is_empty(), "an answer says something");
        }
    }
    let _ = explain_own(&OWN, src, dst);
    let _ = what_can_i_reach(&OWN, src);
    let _ = who_can_reach_me(&OWN, dst);
}
