//! A policy that some node's packet filter has no room for is refused with the node and the numbers.
#![expect(clippy::unwrap_used, reason = "tests panic freely")]

use mesh_common::maps::POLICY_CAPACITY;
use mesh_core::node::NodeId;
use mesh_core::policy::{Document, MAX_SIZE, compile};

mod support;

use support::Mesh;

/// Three identities, one of them twice.
fn mesh() -> Mesh {
    let mut mesh = Mesh::default();
    mesh.node("a-1", "tag:a");
    mesh.node("a-2", "tag:a");
    mesh.node("b", "tag:b");
    mesh.node("c", "tag:c");
    mesh
}

/// Every other port of `count`, among the nodes of `tags`.
fn policy(tags: &str, count: usize, rest: &str) -> Document {
    let ports: Vec<String> = (0..count).map(|n| (2 * n + 1).to_string()).collect();
    let ports = ports.join(",");
    let tags: Vec<&str> = tags.split(' ').collect();
    let list = |end: &str| {
        let each = tags.iter().map(|tag| format!("\"tag:{tag}{end}\""));
        each.collect::<Vec<_>>().join(", ")
    };
    let text = format!(
        "{{\"tagOwners\": {{\"tag:a\": [], \"tag:b\": [], \"tag:c\": []}}, \"acls\": [\n\
         {{\"action\": \"accept\", \"src\": [{}], \"dst\": [{}]}},\n{rest}]}}",
        list(""),
        list(&format!(":{ports}")),
    );
    assert!(text.len() <= MAX_SIZE);
    Document::parse(&text).unwrap()
}

#[test]
fn who_has_no_room_is_named_with_what_it_would_take() {
    let mesh = mesh();
    let wide = r#"{"action": "accept", "src": ["tag:b"], "dst": ["tag:a:8000-8099"]},"#;
    let document = policy("a b c", 24_000, wide);
    let compiled = compile(&document, &mesh.subjects(), None);
    let problems = compiled.room(&document).unwrap_err();
    let problem = problems.iter().next().unwrap();
    assert_eq!((problem.line, problem.column), (2, 1));
    let needed = compiled.rows(NodeId(1));
    assert!(needed > POLICY_CAPACITY as usize);
    let expected =
        format!("the packet filter of a-1 (tag:a) would need {needed} rows and has room");
    assert!(
        problem.message.starts_with(&expected),
        "{}",
        problem.message
    );
    assert!(
        problem
            .message
            .ends_with("(3 more nodes have no room either)"),
        "{}",
        problem.message
    );
}

#[test]
fn what_every_node_can_load_is_taken() {
    let mesh = mesh();
    // As many ports, among fewer kinds of nodes; and as many kinds, for a stretch of ports.
    for document in [policy("a b", 24_000, ""), policy("a b c", 12_000, "")] {
        let compiled = compile(&document, &mesh.subjects(), None);
        compiled.room(&document).unwrap();
    }
}
