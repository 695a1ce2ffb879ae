//! What people ask of the coordinator: why, who, what changes, who set it, and back again.

use std::time::Duration;

use mesh_api::v1;
use mesh_api::v1::policy_question::{Explain, Question};
use mesh_core::netmap::Netmap;
use serde_json::json;
use tonic::Code;

use crate::admin::{json, ok, refused, run};
use crate::support::{Coordinator, Session};

const POLICY: &str = r#"{
  "groups": {"group:dev": ["ann@example.org"]},
  "tagOwners": {"tag:node": [], "tag:db": []},
  "postures": {"posture:managed": ["custom:managed == true"]},
  "autoApprovers": {"routes": {"10.0.0.0/8": ["tag:node"]}},
  "acls": [
    {"action": "accept", "proto": "tcp", "src": ["tag:node"], "dst": ["tag:node:22"]},
    {"action": "accept", "proto": "tcp", "src": ["group:dev"], "srcPosture": ["posture:managed"], "dst": ["tag:node:443"]},
  ],
}
"#;

fn write(c: &Coordinator, name: &str, text: &str) -> String {
    let path = c.dir.path().join(name);
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

fn users_key(c: &Coordinator, user: &str) -> String {
    ok(c, &["user", "create", user]);
    let key = json(c, &["key", "create", "--user", user]);
    key["secret"].as_str().unwrap().to_owned()
}

fn sees(map: &Netmap, name: &str) -> bool {
    map.peers.values().any(|peer| peer.name.as_str() == name)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_version_has_its_author_and_can_be_had_back() {
    let c = Coordinator::start().await;
    assert!(ok(&c, &["policy", "history"]).contains("no policy was ever set"));
    let first = write(&c, "first.hujson", POLICY);
    let second = write(&c, "second.hujson", "{\"acls\": []}\n");
    ok(&c, &["policy", "set", &first, "--author", "ann"]);
    ok(&c, &["policy", "set", &second]);
    let versions = json(&c, &["policy", "history"])["policies"].clone();
    assert_eq!(versions[0]["version"], 2);
    assert_eq!(versions[0]["file"], "second.hujson");
    assert_eq!(versions[0]["author"], "root");
    assert_eq!(versions[1]["author"], "ann");
    assert_eq!(ok(&c, &["policy", "get", "--version", "1"]), POLICY);
    refused(&c, &["policy", "get", "--version", "9"], "is not kept");
    refused(&c, &["policy", "rollback", "2"], "is the one in force");

    ok(&c, &["policy", "rollback", "1", "--author", "bob"]);
    assert_eq!(ok(&c, &["policy", "get"]), POLICY);
    let versions = json(&c, &["policy", "history"])["policies"].clone();
    assert_eq!(versions.as_array().unwrap().len(), 3);
    assert_eq!(versions[0]["version"], 3);
    assert_eq!(versions[0]["author"], "bob");
    assert_eq!(versions[0]["file"], "first.hujson");

    // What is to be known of a text is said again.
    let open = write(&c, "open.hujson", "{}\n");
    ok(&c, &["policy", "set", &open]);
    ok(&c, &["policy", "rollback", "3"]);
    let text = ok(&c, &["policy", "rollback", "4"]);
    assert!(text.starts_with("open.hujson:1:1: warning: "), "{text}");
    ok(&c, &["policy", "rollback", "5"]);
    let warnings = json(&c, &["policy", "rollback", "6"])["warnings"].clone();
    assert_eq!(warnings.as_array().unwrap().len(), 1, "{warnings}");
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_outlive_a_restart_and_the_oldest_are_forgotten() {
    let mut c = Coordinator::start().await;
    for n in 0..105 {
        c.set_policy(&format!("{{\"acls\": []}} // {n}\n"))
            .await
            .unwrap();
    }
    c.restart().await;
    let versions = json(&c, &["policy", "history"])["policies"].clone();
    let versions = versions.as_array().unwrap();
    assert_eq!(versions.len(), 101, "the one in force and a hundred before");
    assert_eq!(versions[0]["version"], 105);
    assert_eq!(versions[100]["version"], 5);
    assert!(ok(&c, &["policy", "get", "--version", "5"]).ends_with("// 4\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_is_damaged_says_so_and_what_to_do() {
    let c = Coordinator::start().await;
    for text in [POLICY, "{\"acls\": []}\n", "{}\n"] {
        c.set_policy(text).await.unwrap();
    }
    let options =
        sqlx::sqlite::SqliteConnectOptions::new().filename(c.state("").join("coordinator.db"));
    let mut connection = sqlx::ConnectOptions::connect(&options).await.unwrap();
    let edit = "UPDATE policy_history SET text = '{}' WHERE version = 1";
    sqlx::raw_sql(edit).execute(&mut connection).await.unwrap();
    sqlx::Connection::close(connection).await.unwrap();
    for verb in [
        &["policy", "get", "--version", "1"][..],
        &["policy", "rollback", "1"],
    ] {
        refused(
            &c,
            verb,
            "policy version 1 is damaged in the database: a row of policy_history does not have",
        );
        refused(&c, verb, "mesh-coordinator db restore FILE");
    }
    assert_eq!(ok(&c, &["policy", "get"]), "{}\n");
    assert_eq!(
        ok(&c, &["policy", "get", "--version", "2"]),
        "{\"acls\": []}\n"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_is_checked_like_a_set() {
    let c = Coordinator::start().await;
    let (_, _a) = c.agent(&c.key(false).await, "a").await;
    let tested = r#"{"tagOwners": {"tag:node": []}, "acls": [
        {"action": "accept", "src": ["tag:node"], "dst": ["tag:node:*"]}],
        "tests": [{"src": "tag:node", "accept": ["tag:node:22"]}]}"#;
    c.set_policy(tested).await.unwrap();
    c.set_policy("{\"acls\": []}").await.unwrap();
    ok(&c, &["node", "delete", "a"]);
    refused(&c, &["policy", "rollback", "1"], "test(s) failed");
    assert_eq!(ok(&c, &["policy", "get"]), "{\"acls\": []}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_coordinator_explains_with_file_and_line() {
    let c = Coordinator::start().await;
    let file = write(&c, "policy.hujson", POLICY);
    let key = c.key(true).await;
    let (_, _a) = c.agent(&key, "a").await;
    let (_, _b) = c.agent(&key, "b").await;
    ok(&c, &["policy", "set", &file]);
    let why = ok(&c, &["policy", "explain", "a", "tag:node:22/tcp"]);
    assert!(
        why.contains("a (tag:node) -> a, b (tag:node) tcp/22: allowed"),
        "{why}"
    );
    assert!(
        why.contains("egress at a: allowed by policy.hujson:7"),
        "{why}"
    );
    let why = json(&c, &["policy", "explain", "a", "b:80"]);
    assert_eq!(why["flows"][0]["allowed"], false);
    assert_eq!(why["flows"][0]["egress"]["reason"], "no rule");
    assert!(ok(&c, &["policy", "who-can", "b:22"]).contains("policy.hujson:7"));
    assert!(ok(&c, &["policy", "what-can", "tag:node"]).contains("tcp/22"));
    refused(
        &c,
        &["policy", "explain", "nobody", "b:22"],
        "no node and no host",
    );
    refused(&c, &["policy", "explain", "a", "b"], "it names no port");

    let wider = write(
        &c,
        "wider.hujson",
        &POLICY.replace("tag:node:22", "tag:node:22,80"),
    );
    let change = ok(&c, &["policy", "diff", &wider]);
    assert_eq!(
        change,
        format!("+ tag:node may now open tcp/80 to tag:node ({wider}:7)\n")
    );
    let change = json(&c, &["policy", "diff", &wider, &file]);
    assert_eq!(change["changes"][0]["change"], "lost");
    assert!(ok(&c, &["policy", "diff", &file]).contains("nothing changes"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_administrators_node_is_answered_and_no_other() {
    let c = Coordinator::start().await;
    c.set_policy(POLICY).await.unwrap();
    let ann = users_key(&c, "ann@example.org");
    let (agent, _session) = c.agent(&ann, "laptop").await;
    let mut link = agent.connect(&c.join()).await;
    let question = v1::PolicyQuestion {
        question: Some(Question::Explain(Explain {
            src: "laptop".to_owned(),
            dst: "laptop:22".to_owned(),
        })),
    };
    let refused = link.client.ask_policy(question.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    refused_role(&c);
    ok(&c, &["user", "set", "ann@example.org", "--role", "admin"]);
    // About itself there is nothing to say; but now it is told so.
    let answered = link.client.ask_policy(question).await.unwrap_err();
    assert_eq!(answered.code(), Code::InvalidArgument);
    let question = v1::PolicyQuestion {
        question: Some(Question::WhatCan("laptop".to_owned())),
    };
    let answer = link.client.ask_policy(question).await.unwrap().into_inner();
    assert!(answer.lines[0].contains("can open nothing"), "{answer:?}");
}

fn refused_role(c: &Coordinator) {
    refused(
        c,
        &["user", "set", "ann@example.org", "--role", "boss"],
        "a role is one of",
    );
    refused(c, &["user", "set", "ann@example.org"], "nothing to set");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_posture_that_begins_or_ceases_to_hold_is_judged_at_once() {
    let c = Coordinator::start().await;
    c.set_policy(POLICY).await.unwrap();
    let (_, mut web) = c.agent(&c.key(false).await, "web").await;
    let ann = users_key(&c, "ann@example.org");
    let (_, mut laptop) = c.agent(&ann, "laptop").await;
    assert!(!sees(laptop.map(), "web"));
    ok(
        &c,
        &[
            "node",
            "attribute",
            "set",
            "laptop",
            "custom:managed",
            "true",
        ],
    );
    laptop.until(|map| sees(map, "web")).await;
    web.until(|map| sees(map, "laptop")).await;
    let shown = json(&c, &["node", "show", "laptop"]);
    assert_eq!(shown["attributes"], json!({"custom:managed": true}));
    assert!(ok(&c, &["node", "show", "laptop"]).contains("custom:managed = true"));
    ok(
        &c,
        &["node", "attribute", "unset", "laptop", "custom:managed"],
    );
    laptop.until(|map| !sees(map, "web")).await;
    web.until(|map| !sees(map, "laptop")).await;
    refused(
        &c,
        &["node", "attribute", "set", "laptop", "node:os", "linux"],
        "an attribute is",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_posture_that_a_node_no_longer_reports_is_taken_from_it_on_every_node() {
    const PATCHED: &str = r#"{
      "tagOwners": {"tag:node": []},
      "postures": {"posture:patched": ["node:os == 'linux'", "node:kernel >= '6.1'"]},
      "acls": [{"action": "accept", "proto": "tcp", "src": ["ann@example.org"],
                "srcPosture": ["posture:patched"], "dst": ["tag:node:443"]}],
    }"#;
    let c = Coordinator::start().await;
    c.set_policy(PATCHED).await.unwrap();
    let (_, mut web) = c.agent(&c.key(false).await, "web").await;
    let (ann, _unreported) = c.agent(&users_key(&c, "ann@example.org"), "laptop").await;
    let mut link = ann.connect(&c.join()).await;
    // The agent starts again, each time on another kernel.
    for (kernel, patched) in [
        ("6.12.9", true),
        ("5.10.0", false),
        ("6.1.0", true),
        ("", false),
    ] {
        link.host = Some(v1::HostInfo {
            hostname: "laptop".to_owned(),
            os: "linux".to_owned(),
            kernel: kernel.to_owned(),
            ..v1::HostInfo::default()
        });
        let laptop = link.begin(&ann, None).await;
        assert_eq!(sees(laptop.map(), "web"), patched, "{kernel}");
        web.until(|map| sees(map, "laptop") == patched).await;
        let entries = &web.map().policy.entries;
        assert_eq!(entries.is_empty(), !patched, "{kernel}: {entries:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_people_are_outlives_a_restart() {
    let mut c = Coordinator::start().await;
    ok(
        &c,
        &["user", "create", "ann@example.org", "--role", "auditor"],
    );
    ok(
        &c,
        &[
            "user",
            "set",
            "ann@example.org",
            "--idp-group",
            "ops",
            "--idp-group",
            "idp:dev",
        ],
    );
    let (_, _session) = c.agent(&c.key(false).await, "a").await;
    ok(&c, &["node", "attribute", "set", "a", "custom:score", "-3"]);
    ok(&c, &["node", "attribute", "set", "a", "custom:tier", "'7'"]);
    c.restart().await;
    let user = json(&c, &["user", "list"])["users"][0].clone();
    assert_eq!(user["role"], "auditor");
    assert_eq!(user["idp_groups"], json!(["dev", "ops"]));
    let node = json(&c, &["node", "show", "a"]);
    assert_eq!(
        node["attributes"],
        json!({"custom:score": -3, "custom:tier": "7"})
    );
    ok(&c, &["user", "set", "ann@example.org", "--no-idp-groups"]);
    let user = json(&c, &["user", "list"])["users"][0].clone();
    assert_eq!(user["idp_groups"], json!([]));
}

async fn approved(c: &Coordinator, wanted: serde_json::Value) {
    crate::support::eventually("the routes are approved", || async {
        json(c, &["node", "list"])["nodes"][0]["approved_routes"] == wanted
    })
    .await;
}

async fn offer(session: &Session, routes: &[&str]) {
    let prefix = |route: &&str| route.parse::<ipnet::IpNet>().unwrap().into();
    let report = v1::Report {
        endpoints: Vec::new(),
        advertised_routes: routes.iter().map(prefix).collect(),
    };
    session
        .say(v1::agent_message::Message::Report(report))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_policy_approves_routes_and_takes_none_back() {
    let c = Coordinator::start().await;
    let (_, session) = c.agent(&c.key(false).await, "router").await;
    offer(&session, &["10.1.0.0/16", "192.168.1.0/24"]).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    approved(&c, json!([])).await;
    // By a new policy, then by a new offer.
    c.set_policy(POLICY).await.unwrap();
    approved(&c, json!(["10.1.0.0/16"])).await;
    offer(&session, &["10.1.0.0/16", "10.2.0.0/16", "192.168.1.0/24"]).await;
    approved(&c, json!(["10.1.0.0/16", "10.2.0.0/16"])).await;
    c.set_policy("{\"acls\": []}").await.unwrap();
    approved(&c, json!(["10.1.0.0/16", "10.2.0.0/16"])).await;
    // What an administrator takes back is not approved again behind the administrator's back.
    c.set_policy(POLICY).await.unwrap();
    ok(&c, &["node", "routes", "router", "192.168.1.0/24"]);
    offer(&session, &["10.1.0.0/16", "10.2.0.0/16", "192.168.1.0/24"]).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    approved(&c, json!(["192.168.1.0/24"])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_is_laid_out_as_gofmt_would() {
    let c = Coordinator::start().await;
    let ugly = "{\"acls\":[\n// all\n{\"action\":\"accept\",\"src\":[\"*\"],\"dst\":[\"*:*\"]}]}";
    let neat = "{\"acls\": [\n\t// all\n\t{\"action\": \"accept\", \"src\": [\"*\"], \"dst\": [\"*:*\"]},\n]}\n";
    let file = write(&c, "p.hujson", ugly);
    assert_eq!(ok(&c, &["policy", "fmt", &file]), neat);
    let checked = run(&c, &["policy", "fmt", "--check", &file]);
    assert_eq!(checked.status.code(), Some(1));
    assert_eq!(
        String::from_utf8(checked.stdout).unwrap(),
        format!("{file}\n")
    );
    assert_eq!(ok(&c, &["policy", "fmt", "-w", &file]), "");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), neat);
    assert_eq!(ok(&c, &["policy", "fmt", "--check", &file]), "");
    let broken = write(&c, "broken.hujson", "{\"acls\" []}");
    refused(
        &c,
        &["policy", "fmt", "-w", &broken],
        "broken.hujson:1:9: expected ':'",
    );
    refused(&c, &["policy", "fmt", "-w", "-"], "leave -w out");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_no_effect_is_named_and_accepted() {
    let c = Coordinator::start().await;
    let file = write(
        &c,
        "elsewhere.hujson",
        "{\n\"acls\": [],\n\"derpMap\": {}}\n",
    );
    let checked = ok(&c, &["policy", "check", &file]);
    assert!(
        checked.contains(":3:1: warning: \"derpMap\" has no effect"),
        "{checked}"
    );
    assert!(checked.ends_with("is good\n"), "{checked}");
    let offline = json(&c, &["policy", "check", "--offline", &file]);
    assert_eq!(offline["warnings"][0]["line"], 3);
    ok(&c, &["policy", "set", &file]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_policy_is_said_to_open_the_mesh() {
    let c = Coordinator::start().await;
    let open = "the policy has no \"acls\" and no \"grants\": every node may reach every other";
    let empty = write(&c, "empty.hujson", "// to be written\n");
    for arguments in [
        &["policy", "check", &empty][..],
        &["policy", "check", "--offline", &empty],
        &["policy", "set", &empty],
        &["status"],
    ] {
        let told = ok(&c, arguments);
        assert_eq!(told.matches(open).count(), 1, "{arguments:?}: {told}");
    }
    let closed = write(&c, "closed.hujson", "{\"acls\": []}");
    ok(&c, &["policy", "set", &closed]);
    let status = ok(&c, &["status"]);
    assert!(!status.contains("every node"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_a_node_has_no_room_for_is_refused_before_any_node_is_told() {
    let c = Coordinator::start().await;
    let mut sessions = Vec::new();
    for tag in ["tag:a", "tag:b", "tag:c"] {
        let key = json(&c, &["key", "create", "--tag", tag]);
        let name = tag.replace(':', "-");
        sessions.push(c.agent(key["secret"].as_str().unwrap(), &name).await);
    }
    let ports: Vec<String> = (0..24_000).map(|n| (2 * n + 1).to_string()).collect();
    let to = |tag: &str| format!("\"tag:{tag}:{}\"", ports.join(","));
    let text = format!(
        "{{\n\"tagOwners\": {{\"tag:a\": [], \"tag:b\": [], \"tag:c\": []}},\n\"acls\": [\n\
         {{\"action\": \"accept\", \"src\": [\"autogroup:tagged\"], \"dst\": [{}, {}, {}]}}]}}\n",
        to("a"),
        to("b"),
        to("c"),
    );
    let file = write(&c, "ports.hujson", &text);
    let words = "the packet filter of tag-a (tag:a) would need 288012 rows and has room for 262144";
    let checked = run(&c, &["policy", "check", &file]);
    let checked = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(
        checked.contains(&format!("ports.hujson:4:1: {words}")),
        "{checked}"
    );
    refused(&c, &["policy", "set", &file], words);
    assert!(ok(&c, &["policy", "history"]).contains("no policy was ever set"));
}
