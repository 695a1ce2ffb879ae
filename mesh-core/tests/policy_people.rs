//! What people are told of a policy: why a flow is allowed or not, who can, what a change changes.
#![expect(clippy::unwrap_used, reason = "tests panic freely")]

use insta::assert_snapshot;
use mesh_core::node::NodeId;
use mesh_core::policy::{
    Answer, Document, Explainer, Question, Way, ask as ask_policy, compile, diff, diff_answer,
    explain_own, what_can_i_reach, who_can_reach_me,
};

mod support;

use support::Mesh;

const POLICY: &str = r#"{
  "groups": {"group:dev": ["ann@example.com"]},
  "tagOwners": {"tag:db": [], "tag:ops": [], "tag:router": []},
  "hosts": {"printer": "10.0.0.9"},
  "postures": {"posture:fresh": ["node:osVersion >= '6.1'"]},
  "acls": [
    {"action": "accept", "proto": "tcp", "src": ["group:dev"], "dst": ["tag:db:5432"]},
    {"action": "accept", "proto": "tcp", "src": ["tag:ops"], "dst": ["tag:db:22"]},
    {"action": "accept", "src": ["autogroup:member"], "dst": ["printer:631"]},
    {"action": "accept", "proto": "tcp", "src": ["autogroup:member"], "srcPosture": ["posture:fresh"], "dst": ["tag:ops:443"]},
  ],
  "denies": [
    {"src": ["bob@example.com"], "dst": ["tag:db:*"]},
    {"src": ["tag:ops"], "dst": ["100.64.0.4:22"]},
  ],
}"#;

fn mesh() -> Mesh {
    let mut mesh = Mesh::default();
    mesh.user("ann@example.com");
    mesh.user("bob@example.com");
    mesh.node("ann-laptop", "ann@example.com");
    mesh.node("bob-laptop", "bob@example.com");
    mesh.node("db-1", "tag:db");
    mesh.node("db-2", "tag:db");
    mesh.node("ops", "tag:ops");
    let router = mesh.node("router", "tag:router");
    mesh.route(router, "10.0.0.0/24");
    mesh
}

fn ask(question: impl FnOnce(&Explainer<'_>) -> Answer) -> String {
    let mesh = mesh();
    let document = Document::parse(POLICY).unwrap().in_file("policy.hujson");
    let compiled = compile(&document, &mesh.subjects(), None);
    let world = mesh.world();
    question(&Explainer::new(&world, &document, &compiled))
        .lines
        .join("\n")
}

fn explain(src: &str, dst: &str) -> String {
    ask(|explainer| explainer.explain(src, dst).unwrap().into())
}

fn refused(src: &str, dst: &str) -> String {
    let mesh = mesh();
    let document = Document::parse(POLICY).unwrap();
    let compiled = compile(&document, &mesh.subjects(), None);
    let world = mesh.world();
    let explainer = Explainer::new(&world, &document, &compiled);
    explainer.explain(src, dst).unwrap_err().to_string()
}

#[test]
fn what_is_allowed_names_its_rule_at_both_ends() {
    assert_snapshot!(explain("ann-laptop", "tag:db:5432/tcp"), @r#"
    ann-laptop (ann@example.com) -> db-1 (tag:db) tcp/5432: allowed
      egress at ann-laptop: allowed by policy.hujson:7  accept group:dev -> tag:db:tcp/5432
      ingress at db-1: allowed by policy.hujson:7  accept group:dev -> tag:db:tcp/5432
      it is allowed by policy.hujson:7 alone: take it from there, or add it to "denies"
    ann-laptop (ann@example.com) -> db-2 (tag:db) tcp/5432: allowed
      egress at ann-laptop: allowed by policy.hujson:7  accept group:dev -> tag:db:tcp/5432
      ingress at db-2: allowed by policy.hujson:7  accept group:dev -> tag:db:tcp/5432
      it is allowed by policy.hujson:7 alone: take it from there, or add it to "denies"
    "#);
}

#[test]
fn what_no_rule_allows_names_the_nearest() {
    assert_snapshot!(explain("ann@example.com", "db-1:22"), @r"
    ann-laptop (ann@example.com) -> db-1 (tag:db) tcp/22: denied
      egress at ann-laptop: denied, for no rule allows it
      ingress at db-1: denied, for no rule allows it
      no rule has ann@example.com as source and tcp/22 to tag:db as destination
      nearest: policy.hujson:7 allows tcp/5432 ping there, not tcp/22
      nearest: policy.hujson:8 allows it to tag:ops
    ");
    assert_snapshot!(explain("tag:ops", "db-1.mesh.internal:5432/tcp"), @r"
    ops (tag:ops) -> db-1 (tag:db) tcp/5432: denied
      egress at ops: denied, for no rule allows it
      ingress at db-1: denied, for no rule allows it
      no rule has tag:ops as source and tcp/5432 to tag:db as destination
      nearest: policy.hujson:8 allows tcp/22 ping there, not tcp/5432
      nearest: policy.hujson:7 allows it to group:dev
    ");
    assert_snapshot!(explain("db-1", "ann-laptop:22"), @r"
    db-1 (tag:db) -> ann-laptop (ann@example.com) tcp/22: denied
      egress at db-1: denied, for no rule allows it
      ingress at ann-laptop: denied, for no rule allows it
      no rule has tag:db as source and tcp/22 to ann@example.com as destination
    ");
}

#[test]
fn a_deny_is_named_with_what_it_overrules() {
    assert_snapshot!(explain("bob-laptop", "db-2:5432/tcp"), @r"
    bob-laptop (bob@example.com) -> db-2 (tag:db) tcp/5432: denied
      egress at bob-laptop: denied: nothing is open between the two, so they do not know each other
      ingress at db-2: denied: nothing is open between the two, so they do not know each other
      the deny at policy.hujson:13 decides; without it no rule would allow it either
      no rule has bob@example.com as source and tcp/5432 to tag:db as destination
      nearest: policy.hujson:7 allows it to group:dev
    ");
}

#[test]
fn a_deny_of_one_address_shows_that_the_other_stays_open() {
    assert_snapshot!(explain("ops", "db-2:22"), @r#"
    ops (tag:ops) -> db-2 (tag:db) tcp/22 over IPv4: denied
      egress at ops: denied by policy.hujson:14  deny tag:ops -> (an address):22
      ingress at db-2: denied by policy.hujson:14  deny tag:ops -> (an address):22
      the deny at policy.hujson:14 decides; without it policy.hujson:8 would allow it
    ops (tag:ops) -> db-2 (tag:db) tcp/22 over IPv6: allowed
      egress at ops: allowed by policy.hujson:8  accept tag:ops -> tag:db:tcp/22
      ingress at db-2: allowed by policy.hujson:8  accept tag:ops -> tag:db:tcp/22
      it is allowed by policy.hujson:8 alone: take it from there, or add it to "denies"
    "#);
}

#[test]
fn a_posture_that_fails_is_named_with_what_was_reported() {
    assert_snapshot!(explain("ann-laptop", "ops:443/tcp"), @r"
    ann-laptop (ann@example.com) -> ops (tag:ops) tcp/443: denied
      egress at ann-laptop: denied: nothing is open between the two, so they do not know each other
      ingress at ops: denied: nothing is open between the two, so they do not know each other
      no rule has ann@example.com as source and tcp/443 to tag:ops as destination
      nearest: policy.hujson:10 asks for posture:fresh, which ann-laptop has not: node:osVersion >= '6.1' (it was not reported)
    ");
}

#[test]
fn what_lies_behind_a_router_is_judged_there() {
    assert_snapshot!(explain("group:dev", "printer:631/tcp"), @r#"
    ann-laptop (ann@example.com) -> 10.0.0.9 tcp/631: allowed
      egress at ann-laptop: allowed by policy.hujson:9  accept autogroup:member -> printer:631
      ingress at router: allowed by policy.hujson:9  accept autogroup:member -> printer:631
      it is allowed by policy.hujson:9 alone: take it from there, or add it to "denies"
    "#);
    assert_snapshot!(explain("ann-laptop", "10.0.0.10:80"), @r"
    ann-laptop (ann@example.com) -> 10.0.0.10 tcp/80: denied
      egress at ann-laptop: denied, for no rule allows it
      ingress at router: denied, for no rule allows it
      no rule has ann@example.com as source and tcp/80 to 10.0.0.10 as destination
    ");
    assert_snapshot!(explain("ann-laptop", "192.0.2.1:80"), @r"
    ann-laptop (ann@example.com) -> 192.0.2.1 tcp/80: denied
      egress at ann-laptop: denied: nothing is open between the two, so they do not know each other
      ingress at nobody: denied: there is nobody to take it
      no node has 192.0.2.1, and there is no router for it that the other end is given
      no rule has ann@example.com as source and tcp/80 to 192.0.2.1 as destination
    ");
}

#[test]
fn a_ping_is_asked_about_by_its_name() {
    assert_snapshot!(explain("ann-laptop", "db-1/icmp"), @r#"
    ann-laptop (ann@example.com) -> db-1 (tag:db) ping: allowed
      egress at ann-laptop: allowed by policy.hujson:7  accept group:dev -> tag:db:tcp/5432
      ingress at db-1: allowed by policy.hujson:7  accept group:dev -> tag:db:tcp/5432
      it is allowed by policy.hujson:7 alone: take it from there, or add it to "denies"
    "#);
    assert_snapshot!(explain("db-1", "db-2/icmp"), @r"
    db-1 (tag:db) -> db-2 (tag:db) ping: denied
      egress at db-1: denied: nothing is open between the two, so they do not know each other
      ingress at db-2: denied: nothing is open between the two, so they do not know each other
      no rule has tag:db as source and ping to tag:db as destination
      nearest: policy.hujson:7 allows it to group:dev
      nearest: policy.hujson:8 allows it to tag:ops
    ");
}

#[test]
fn questions_that_make_no_sense_say_what_would() {
    assert_snapshot!(refused("nobody", "db-1:22"), @r#"no node and no host of the policy is called "nobody""#);
    assert_snapshot!(refused("tag:none", "db-1:22"), @r#"
    no node has tag:none, and the policy does not define it
    "#);
    assert_snapshot!(refused("group:none", "db-1:22"), @r"the policy has no group:none");
    assert_snapshot!(refused("db-1", "db-1:22"), @r"the two share no address family, or are the same node: nothing between them is judged");
    assert_snapshot!(refused("ann-laptop", "db-1"), @r#""db-1": it names no port; write DST:PORT/PROTO, such as db:5432/tcp, [fd7a::1]:53/udp or web/icmp"#);
    assert_snapshot!(refused("ann-laptop", "db-1:22/tpc"), @r#""db-1:22/tpc": proto name "tpc" not known; use a name such as tcp, udp, icmp, sctp, or a number from 1 to 255; write DST:PORT/PROTO, such as db:5432/tcp, [fd7a::1]:53/udp or web/icmp"#);
    assert_snapshot!(refused("ann-laptop", "db-1:70000"), @r#""db-1:70000": a port is a number from 1 to 65535; write DST:PORT/PROTO, such as db:5432/tcp, [fd7a::1]:53/udp or web/icmp"#);
    assert_snapshot!(refused("ann-laptop", "tag:db/tcp"), @r#""tag:db/tcp": it names no port; write DST:PORT/PROTO, such as db:5432/tcp, [fd7a::1]:53/udp or web/icmp"#);
    assert_snapshot!(refused("autogroup:self", "db-1:22"), @r"autogroup:self is no node: name a node, an address, a tag, a user, a group or a host");
}

#[test]
fn who_can_and_what_can_list_by_rule() {
    let who = |dst: &'static str| ask(move |e| e.who_can(dst).unwrap().answer(Way::WhoCan));
    let what = |src: &'static str| ask(move |e| e.what_can(src).unwrap().answer(Way::WhatCan));
    assert_snapshot!(who("tag:db:5432/tcp"), @r"
    db-1 (tag:db), db-2 (tag:db): these can
      ann-laptop (ann@example.com): tcp/5432, by policy.hujson:7  accept group:dev -> tag:db:tcp/5432
    ");
    assert_snapshot!(who("db-1:9999"), @r"db-1 (tag:db): nobody can");
    assert_snapshot!(who("printer:631/udp"), @r"
    10.0.0.9: these can
      ann-laptop (ann@example.com), bob-laptop (bob@example.com): udp/631, by policy.hujson:9  accept autogroup:member -> printer:631
    ");
    assert_snapshot!(what("ann-laptop"), @r"
    ann-laptop (ann@example.com) can open
      tcp/5432 ping to db-1 (tag:db), db-2 (tag:db), by policy.hujson:7  accept group:dev -> tag:db:tcp/5432
      tcp/631 udp/631 icmp to 10.0.0.9, by policy.hujson:9  accept autogroup:member -> printer:631
    ");
    assert_snapshot!(what("tag:db"), @r"db-1 (tag:db), db-2 (tag:db) can open nothing");
}

#[test]
fn a_node_answers_for_itself_and_for_nobody_else() {
    let mesh = mesh();
    let document = Document::parse(POLICY).unwrap().in_file("policy.hujson");
    let compiled = compile(&document, &mesh.subjects(), None);
    let world = mesh.world();
    let map = |id| mesh_core::netmap::build::build(&world, &compiled, NodeId(id)).unwrap();
    let (ann, db) = (map(1), map(3));
    let shown = |answer: Answer| answer.lines.join("\n");
    let allowed = explain_own(&ann, "ann-laptop", "db-1:5432")
        .unwrap()
        .unwrap();
    assert_snapshot!(shown(allowed.into()), @r"
    ann-laptop (ann@example.com) -> db-1 (tag:db) tcp/5432: allowed
      egress at ann-laptop: allowed by policy.hujson:7  accept group:dev -> tag:db:tcp/5432
      ingress at db-1: judged there, by the same policy
      it is allowed by policy.hujson:7
    ");
    let denied = explain_own(&ann, "ann-laptop", "db-1:22").unwrap().unwrap();
    assert_snapshot!(shown(denied.into()), @r"
    ann-laptop (ann@example.com) -> db-1 (tag:db) tcp/22: denied
      egress at ann-laptop: denied, for no rule allows it
      ingress at db-1: judged there, by the same policy
      no rule allows it; nearest: policy.hujson:7 allows tcp/5432 ping
    ");
    let allowed = explain_own(&db, "ops", "db-1:22").unwrap().unwrap();
    assert_snapshot!(shown(allowed.into()), @r"
    ops (tag:ops) -> db-1 (tag:db) tcp/22: allowed
      egress at ops: judged there, by the same policy
      ingress at db-1: allowed by policy.hujson:8  accept tag:ops -> tag:db:tcp/22
      it is allowed by policy.hujson:8
    ");
    assert_eq!(explain_own(&db, "bob-laptop", "db-1:5432"), Ok(None));
    let routed = explain_own(&ann, "ann-laptop", "10.0.0.9:631/udp")
        .unwrap()
        .unwrap();
    assert_snapshot!(shown(routed.into()), @r"
    ann-laptop (ann@example.com) -> 10.0.0.9 udp/631: allowed
      egress at ann-laptop: allowed by policy.hujson:9  accept autogroup:member -> printer:631
      ingress at router: judged there, by the same policy
      it is allowed by policy.hujson:9
    ");
    assert_eq!(explain_own(&ann, "bob-laptop", "db-1:22"), Ok(None));
    assert_eq!(explain_own(&ann, "ann-laptop", "bob-laptop:22"), Ok(None));
    assert_snapshot!(shown(what_can_i_reach(&ann, "ann-laptop").unwrap().answer(Way::WhatCan)), @r"
    ann-laptop (ann@example.com) can open
      tcp/5432 ping to db-1 (tag:db), db-2 (tag:db), by policy.hujson:7  accept group:dev -> tag:db:tcp/5432
      tcp/631 udp/631 icmp to 10.0.0.9/32, by policy.hujson:9  accept autogroup:member -> printer:631
    ");
    assert_snapshot!(shown(who_can_reach_me(&db, "db-1:5432").unwrap().unwrap().answer(Way::WhoCan)), @r"
    db-1 (tag:db): these can
      ann-laptop (ann@example.com): tcp/5432, by policy.hujson:7  accept group:dev -> tag:db:tcp/5432
    ");
    assert_eq!(who_can_reach_me(&ann, "db-1:5432"), Ok(None));
}

#[test]
fn a_change_of_logins_is_said_too() {
    let mesh = mesh();
    let world = mesh.world();
    let compiled = |ssh: &str| {
        let text =
            format!("{{\"acls\": [], \"tagOwners\": {{\"tag:db\": []}},\n\"ssh\": [\n{ssh}]}}");
        let document = Document::parse(&text).unwrap().in_file("p.hujson");
        let compiled = compile(&document, &mesh.subjects(), None);
        (document, compiled)
    };
    let old = compiled(
        r#"{"action": "accept", "src": ["autogroup:member"], "dst": ["tag:db"], "users": ["root"]}"#,
    );
    let new = compiled(
        r#"{"action": "check", "src": ["ann@example.com"], "dst": ["tag:db"], "users": ["root", "autogroup:nonroot"]}"#,
    );
    let changes = diff(&world, (&old.0, &old.1), (&new.0, &new.1));
    assert_snapshot!(diff_answer(&changes).lines.join("\n"), @r"
    - ann@example.com, bob@example.com may no longer log in to tag:db as root (was p.hujson:3)
    + ann@example.com may now log in to tag:db as any account but root, after a check (p.hujson:3)
    + ann@example.com may now log in to tag:db as root, after a check (p.hujson:3)
    ");
}

#[test]
fn a_change_is_said_as_who_gains_and_who_loses() {
    let mesh = mesh();
    let world = mesh.world();
    let compiled = |text: &str| {
        let document = Document::parse(text).unwrap().in_file("policy.hujson");
        let compiled = compile(&document, &mesh.subjects(), None);
        (document, compiled)
    };
    let old = compiled(POLICY);
    let new = compiled(
        &POLICY
            .replace("tag:db:5432", "tag:db:5432,6432-6440")
            .replace(
                "{\"src\": [\"bob@example.com\"], \"dst\": [\"tag:db:*\"]},",
                "",
            )
            .replace(
                "\"src\": [\"tag:ops\"], \"dst\": [\"tag:db:22\"]",
                "\"src\": [\"db-1\"], \"dst\": [\"tag:ops:22\"]",
            )
            .replace("\"printer\":", "\"db-1\": \"100.64.0.3\", \"printer\":"),
    );
    let changes = diff(&world, (&old.0, &old.1), (&new.0, &new.1));
    assert_snapshot!(diff_answer(&changes).lines.join("\n"), @r"
    - tag:ops may no longer open tcp/22 ping to tag:db (was policy.hujson:8)
    + ann@example.com may now open tcp/6432-6440 to tag:db (policy.hujson:7)
    + db-1 may now open tcp/22 ping to tag:ops (policy.hujson:8)
    ");
    let back = diff(&world, (&new.0, &new.1), (&old.0, &old.1));
    assert_eq!(back.len(), changes.len());
    assert!(diff(&world, (&old.0, &old.1), (&old.0, &old.1)).is_empty());
}

#[test]
fn a_change_of_what_is_no_flow_is_said_too() {
    let mesh = mesh();
    let compiled = |text: &str| {
        let document = Document::parse(text).unwrap().in_file("policy.hujson");
        let compiled = compile(&document, &mesh.subjects(), None);
        (document, compiled)
    };
    let old = compiled(
        r#"{"tagOwners": {"tag:db": [], "tag:router": []},
        "autoApprovers": {"routes": {"10.0.0.0/8": ["tag:router"]}},
        "nodeAttrs": [{"target": ["autogroup:member", "100.64.0.3"], "attr": ["magic"]}],
        "grants": [{"src": ["ann@example.com"], "dst": ["tag:db"], "app": {"example.com/cap/sql": [{"role": "reader"}]}}],
        }"#,
    );
    let new = compiled(
        r#"{"tagOwners": {"tag:db": [], "tag:router": []},
        "autoApprovers": {"routes": {"10.0.0.0/8": ["ann@example.com"]}, "exitNode": ["tag:router"]},
        "nodeAttrs": [{"target": ["tag:db"], "attr": ["magic"]}, {"target": ["tag:db"], "ipPool": ["100.81.0.0/24"]}],
        "grants": [{"src": ["autogroup:member"], "dst": ["tag:db"], "app": {"example.com/cap/sql": [{"role": "writer"}]}},
          {"src": ["ann@example.com"], "dst": ["tag:db"], "app": {"example.com/cap/log": []}}],
        }"#,
    );
    let world = mesh.world();
    let changes = diff(&world, (&old.0, &old.1), (&new.0, &new.1));
    let answer = diff_answer(&changes);
    assert_snapshot!(answer.lines.join("\n"), @r#"
    - ann@example.com may no longer hold example.com/cap/sql at tag:db with {"role":"reader"} (was policy.hujson:4)
    + ann@example.com, bob@example.com may now hold example.com/cap/sql at tag:db with {"role":"writer"} (policy.hujson:4)
    + ann@example.com may now hold example.com/cap/log at tag:db (policy.hujson:5)
    - tag:router may no longer serve 10.0.0.0/8 without an administrator (was policy.hujson:2)
    + tag:router may now serve 0.0.0.0/0 without an administrator (policy.hujson:2)
    + ann@example.com may now serve 10.0.0.0/8 without an administrator (policy.hujson:2)
    + tag:router may now serve ::/0 without an administrator (policy.hujson:2)
    + tag:db may now take addresses of 100.81.0.0/24 for new nodes (policy.hujson:3)
    - ann@example.com, bob@example.com may no longer have the attribute magic (was policy.hujson:3)
    + db-2 may now have the attribute magic (policy.hujson:3)
    "#);
    assert_eq!(
        answer.json["changes"][2]["capability"]["name"],
        "example.com/cap/log"
    );
    assert!(diff(&world, (&new.0, &new.1), (&new.0, &new.1)).is_empty());
}

/// In a mesh where only ann has a node.
fn asked_early(question: Question<'_>) -> String {
    let mut mesh = Mesh::default();
    mesh.user("ann@example.com");
    mesh.node("ann-laptop", "ann@example.com");
    let document = Document::parse(POLICY).unwrap().in_file("policy.hujson");
    let compiled = compile(&document, &mesh.subjects(), None);
    match ask_policy(&mesh.world(), &document, &compiled, question) {
        Ok(answer) => answer.lines.join("\n"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn what_nobody_has_yet_is_answered_for_one_who_had_it() {
    let explain = |src, dst| asked_early(Question::Explain { src, dst });
    assert_snapshot!(explain("ann-laptop", "tag:db:5432"), @r#"
    no node has tag:db now: this is about an imagined one
    ann-laptop (ann@example.com) -> imagined (tag:db) tcp/5432: allowed
      egress at ann-laptop: allowed by policy.hujson:7  accept group:dev -> tag:db:tcp/5432
      ingress at imagined: allowed by policy.hujson:7  accept group:dev -> tag:db:tcp/5432
      it is allowed by policy.hujson:7 alone: take it from there, or add it to "denies"
    "#);
    assert_snapshot!(explain("tag:ops", "tag:db:5432"), @r#"
    no node has tag:ops now: this is about an imagined one
    no node has tag:db now: this is about an imagined one
    imagined (tag:ops) -> imagined-1 (tag:db) tcp/5432: denied
      egress at imagined: denied, for no rule allows it
      ingress at imagined-1: denied, for no rule allows it
      no rule has tag:ops as source and tcp/5432 to tag:db as destination
      nearest: policy.hujson:8 allows tcp/22 ping there, not tcp/5432
      nearest: policy.hujson:7 allows it to group:dev
    "#);
    assert_snapshot!(asked_early(Question::WhoCan { dst: "tag:db:22" }), @r#"
    no node has tag:db now: this is about an imagined one
    imagined (tag:db): nobody can
    "#);
    assert_snapshot!(asked_early(Question::WhatCan { src: "bob@example.com" }), @r#"
    bob@example.com has no node now: this is about an imagined one
    imagined (bob@example.com) can open nothing
    "#);
    assert_snapshot!(explain("tag:nothing", "ann-laptop:22"), @r#"
    no node has tag:nothing, and the policy does not define it
    "#);
    assert_snapshot!(explain("printer2", "ann-laptop:22"), @r#"
    no node and no host of the policy is called "printer2"
    "#);
}
