//! What an operator sees of the traffic: who, what, why, how much.

use std::net::UdpSocket;

use mesh_tests::mesh::Family;
use mesh_tests::{eventually, until};
use serde_json::Value;

use super::field::{Field, SOON};

/// Two walks over the flows.
const WALKED: std::time::Duration = std::time::Duration::from_secs(25);

fn flows(field: &Field, arguments: &[&str]) -> Vec<Value> {
    let mut all = vec!["flows", "--json"];
    all.extend(arguments);
    let text = field.node().host.run("mesh", &all).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn the_flow_log_says_who_was_let_in_by_which_line_and_who_was_not() {
    the_flow_log_tells_of(&Field::new());
}

#[test]
fn the_flow_log_says_the_same_of_packets_judged_in_process() {
    the_flow_log_tells_of(&Field::in_process());
}

fn the_flow_log_tells_of(field: &Field) {
    let find = |arguments: &[&str], kind: &str| {
        let found = eventually(WALKED, || {
            let found = flows(field, arguments);
            let found = found.into_iter().rfind(|record| record["kind"] == kind);
            found.ok_or_else(|| anyhow::anyhow!("no record of kind {kind}"))
        });
        found.unwrap_or_else(|error| panic!("{error:#}: {:#?}", flows(field, &[])))
    };
    let opened = find(
        &["--peer", "operator", "--port", "9000", "--proto", "udp"],
        "opened",
    );
    assert_eq!(opened["verdict"], "allowed");
    assert_eq!(opened["destination"]["node"], "node");
    let rule = opened["rule"]["policy"].as_str().unwrap();
    let line: usize = rule
        .strip_prefix("policy.hujson:")
        .unwrap()
        .parse()
        .unwrap();
    let policy = field.mesh.coordinator.policy().unwrap();
    assert!(
        policy
            .lines()
            .nth(line - 1)
            .unwrap()
            .contains("tag:node:9000"),
        "{rule}"
    );

    let denied = find(&["--peer", "tag:sandbox", "--verdict", "denied"], "denied");
    assert_eq!(denied["reason"], "no rule");
    assert_eq!(denied["source"]["node"], "sandbox");
    assert!(denied["packets"].as_u64().unwrap() > 0, "{denied}");
    assert!(flows(field, &["--verdict", "allowed", "--peer", "sandbox"]).is_empty());

    // Nobody answers it, and it is told of all the same: it goes on.
    find(&["--peer", "operator", "--port", "9000"], "active");
    let text = field.node().host.run("mesh", &["flows"]).unwrap();
    assert!(text.contains("denied     sandbox:"), "{text}");

    // What went before the question is in the answer.
    let operator = &field.mesh.node("operator").host;
    let to = field.node().address(Family::V4).unwrap();
    let sent = operator.inside(|| UdpSocket::bind(("0.0.0.0", 0))?.send_to(b"?", (to, 9001)));
    // The operator's own filter refuses it.
    drop(sent.unwrap());
    let text = operator.run("mesh", &["flows", "--port", "9001"]).unwrap();
    assert!(text.contains("denied     operator:"), "{text}");
}

#[test]
fn the_kernel_and_the_policy_give_the_same_answer_to_why() {
    why_agrees_with_the_policy(&Field::new(), "kernel  allowed");
}

#[test]
fn what_judges_in_process_and_the_policy_give_the_same_answer_to_why() {
    why_agrees_with_the_policy(&Field::in_process(), "in process  allowed");
}

fn why_agrees_with_the_policy(field: &Field, judge: &str) {
    let ask = |node: &str, source: &str, destination: &str| {
        let answer = field
            .mesh
            .node(node)
            .mesh(&["why", source, destination])
            .unwrap();
        assert_eq!(answer["differs"], false, "{answer}");
        let (kernel, policy) = (&answer["kernel"], &answer["policy"]);
        assert_eq!(kernel, policy, "{answer}");
        let reason = kernel["reason"].as_str().unwrap().to_owned();
        (kernel["allowed"] == true, reason)
    };
    let allowed = (true, String::new());
    let denied = |reason: &str| (false, reason.to_owned());
    // The sender's own programs and the receiver's agree.
    for node in ["operator", "node"] {
        assert_eq!(ask(node, "operator", "node:9000/udp"), allowed);
        assert_eq!(ask(node, "operator", "node:9001/udp"), denied("no rule"));
        assert_eq!(ask(node, "operator", "node:22/tcp"), allowed);
        // Whatever the policy has it, they agree.
        ask(node, "operator", "node/icmp");
    }
    assert_eq!(ask("node", "sandbox", "node:9000/udp"), denied("no rule"));
    assert_eq!(
        ask("node", "192.0.2.1", "node:22/tcp"),
        denied("unknown identity")
    );
    // And it was only a question.
    assert!(flows(field, &["--port", "9001"]).is_empty());

    let node = field.node();
    let why = ["why", "operator", "node:22/tcp"];
    let text = node.host.run("mesh", &why).unwrap();
    assert!(text.contains(judge), "{text}");
    let refused = |arguments: &[&str]| format!("{:#}", node.mesh(arguments).unwrap_err());
    let within = refused(&["why", "node", "node:22/tcp"]);
    assert!(within.contains("both ends are this node"), "{within}");
    node.mesh(&["down"]).unwrap();
    let down = refused(&["ping", "operator"]);
    assert!(down.contains("this node is down"), "{down}");
}

#[test]
fn top_and_debug_maps_show_the_traffic_and_the_room() {
    let field = Field::new();
    let node = field.node();
    until("denied packets are counted", SOON, || {
        let top = node.mesh(&["top"]).unwrap();
        let reasons = top["counters"]["reasons"].as_array().unwrap();
        reasons.iter().any(|counter| counter["reason"] == "no rule")
    })
    .unwrap();
    let text = node.host.run("mesh", &["top", "--count", "1"]).unwrap();
    assert!(text.contains("PEER") && text.contains("DROPPED"), "{text}");
    let maps = node.mesh(&["debug", "maps"]).unwrap();
    let maps = maps["maps"].as_array().unwrap();
    let of = |name: &str| maps.iter().find(|usage| usage["name"] == name).unwrap();
    assert!(
        of("ct_new")["entries"].as_u64().unwrap() > 0,
        "the one-way flow"
    );
    assert!(of("ct_est")["memory_bytes"].as_u64().unwrap() > 0);
}
