//! The policy language through its public door: what is refused, who reaches whom, who sees whom.
#![expect(clippy::unwrap_used, reason = "tests panic freely")]

use mesh_core::netmap::Action;
use mesh_core::policy::{ALLOW_ALL, CompiledPolicy, Document, EXAMPLE};

#[path = "../support/mod.rs"]
mod support;

mod people;
mod town;

use support::Mesh;

const TCP: u8 = 6;

/// One node of each of the example's roles, two where they talk to each other.
fn roles() -> Mesh {
    let mut mesh = Mesh::default();
    mesh.node("operator", "tag:operator");
    mesh.node("node-a", "tag:node");
    mesh.node("node-b", "tag:node");
    mesh.node("sandbox", "tag:sandbox");
    mesh.node("developer", "tag:developer");
    mesh
}

fn tcp(policy: &CompiledPolicy, mesh: &Mesh, src: u64, dst: u64, port: u16) -> bool {
    let [src, dst] = [src, dst].map(mesh_core::node::NodeId);
    let v4 = policy.evaluate(mesh.v4(src), mesh.v4(dst), TCP, port);
    let v6 = policy.evaluate(mesh.v6(src), mesh.v6(dst), TCP, port);
    assert_eq!(v4, v6);
    v4.action == Action::Accept
}

#[test]
fn the_example_passes_its_own_tests() {
    let mesh = roles();
    let policy = mesh.policy(EXAMPLE);
    assert!(tcp(&policy, &mesh, 1, 2, 22), "operator to node by SSH");
    assert!(tcp(&policy, &mesh, 2, 3, 4000), "node to node");
    assert!(tcp(&policy, &mesh, 4, 2, 443), "sandbox to the API");
    assert!(!tcp(&policy, &mesh, 4, 2, 22), "sandbox to SSH");
    assert!(!tcp(&policy, &mesh, 5, 4, 22), "developer to sandbox");
}

#[test]
fn nodes_that_no_rule_joins_do_not_know_each_other() {
    let mesh = roles();
    let policy = mesh.policy(EXAMPLE);
    let [sandbox, developer, node] = [4, 5, 2].map(mesh_core::node::NodeId);
    assert!(!policy.peers(sandbox).contains(&developer));
    assert!(!policy.peers(developer).contains(&sandbox));
    assert!(policy.peers(sandbox).contains(&node) && policy.peers(node).contains(&sandbox));
    let told = policy.node(sandbox);
    assert!(
        told.identities
            .keys()
            .all(|net| !net.contains(&mesh.v4(developer)))
    );
}

#[test]
fn whom_a_deny_hides_is_not_taken_for_the_world() {
    let mesh = roles();
    let text = r#"{
        "tagOwners": {"tag:node": [], "tag:sandbox": []},
        "acls": [{"action": "accept", "src": ["autogroup:danger-all"], "dst": ["tag:node:*"]}],
        "denies": [{"src": ["tag:sandbox"], "dst": ["tag:node:*"]}],
    }"#;
    let policy = mesh.policy(text);
    let [node, sandbox] = [2, 4].map(mesh_core::node::NodeId);
    assert!(!policy.sees(node, sandbox));
    assert!(tcp(&policy, &mesh, 1, 2, 22) && !tcp(&policy, &mesh, 4, 2, 22));
    // Nor by the table: the longest prefix around the hidden address is nobody's.
    let told = policy.node(node);
    let around = |address| {
        let around = told
            .identities
            .iter()
            .filter(|(net, _)| net.contains(&address));
        around
            .max_by_key(|(net, _)| net.prefix_len())
            .map(|(_, identity)| *identity)
    };
    let hidden = around(mesh.v4(sandbox));
    assert_ne!(hidden, around("198.51.100.1".parse().unwrap()));
    assert!(told.entries.keys().all(|key| Some(key.remote) != hidden));
}

#[test]
fn the_default_allows_everything() {
    let mesh = roles();
    for text in [ALLOW_ALL, "", "{}", "// nothing\n"] {
        let policy = mesh.policy(text);
        assert!(tcp(&policy, &mesh, 4, 5, 22), "{text:?}");
    }
    for text in [r#"{"acls": []}"#, r#"{"grants": []}"#] {
        let policy = mesh.policy(text);
        assert!(!tcp(&policy, &mesh, 4, 5, 22), "{text:?}");
    }
}

#[test]
fn every_problem_is_named_with_line_and_column() {
    let text = r#"{
  "acls": [
    {"action": "drop", "src": ["tag:a"], "dst": ["tag:b:ssh"]},
    {"action": "accept", "scr": ["*"], "dst": ["web"]},
  ],
}"#;
    let problems = Document::parse(text).unwrap_err().in_file("p.hujson");
    let shown = problems.to_string();
    let expected = [
        "p.hujson:3:16: action=\"drop\" is not supported",
        "p.hujson:3:50: dst=\"tag:b:ssh\": port range \"ssh\": invalid first integer",
        "p.hujson:4:26: unknown field: \"scr\"",
        "p.hujson:4:48: hostport must contain a colon",
    ];
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(lines.len(), expected.len(), "{shown}");
    for (line, start) in lines.iter().zip(expected) {
        assert!(line.starts_with(start), "{line}\nshould start with {start}");
    }
    let first = problems.iter().next().unwrap();
    assert_eq!((first.line, first.offending.as_str()), (3, "\"drop\""));
}

#[test]
fn rules_may_use_the_old_names_and_say_nothing() {
    let mesh = roles();
    let tags = r#""tagOwners": {"tag:node": [], "tag:operator": []}"#;
    let rule = |rule: &str| format!("{{{tags}, {rule}}}");
    let old =
        r#""acls": [{"action": "accept", "users": ["tag:operator"], "ports": ["tag:node:22"]}]"#;
    assert!(tcp(&mesh.policy(&rule(old)), &mesh, 1, 2, 22));
    let both = r#""acls": [{"action": "accept", "users": ["*"], "src": ["*"], "dst": ["*:*"]}]"#;
    assert!(mesh.try_policy(&rule(both)).is_err());
    let nobody = r#""acls": [{"action": "accept", "dst": ["*:*"]}]"#;
    assert!(!tcp(&mesh.policy(&rule(nobody)), &mesh, 1, 2, 22));
    let deny = r#""denies": [{"dst": ["*:*"]}]"#;
    let problems = mesh.try_policy(&rule(deny)).unwrap_err().to_string();
    assert!(problems.contains("must be specified"), "{problems}");
}

#[test]
fn names_that_nobody_defined_are_refused() {
    let mesh = roles();
    let refused = |text: &str| mesh.try_policy(text).unwrap_err().to_string();
    let acl = |src: &str, dst: &str| {
        format!(r#"{{"acls": [{{"action": "accept", "src": ["{src}"], "dst": ["{dst}:22"]}}]}}"#)
    };
    assert!(refused(&acl("tag:x", "*")).contains("src=tag not found: \"tag:x\""));
    assert!(refused(&acl("*", "tag:x")).contains("dst=\"tag:x\": tag not found"));
    assert!(refused(&acl("group:x", "*")).contains("group not defined in policy"));
    assert!(refused(&acl("*", "web")).contains("host not defined in policy"));
    assert!(refused(&acl("autogroup:self", "*")).contains("not valid on the src side"));
}

#[test]
fn an_expired_node_is_nobody() {
    let mut mesh = roles();
    let node = mesh_core::node::NodeId(2);
    mesh.expire(node);
    let policy = mesh.policy(ALLOW_ALL);
    assert!(policy.peers(node).is_empty());
    assert_eq!(policy.node(node), Default::default());
    assert!(
        mesh.nodes
            .keys()
            .all(|id| !policy.peers(*id).contains(&node))
    );
    assert!(!tcp(&policy, &mesh, 1, 2, 22));
}
