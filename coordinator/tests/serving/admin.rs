//! The operator's verbs, by the program itself.

use std::process::{Command, Output, Stdio};

use crate::support::{Coordinator, DENY_ALL, PATIENCE, eventually};

/// `mesh-coordinator …` against this coordinator.
pub(crate) fn run(coordinator: &Coordinator, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mesh-coordinator"))
        .args(arguments)
        .env(
            "MESH_COORDINATOR_SOCKET",
            coordinator.dir.path().join("admin.sock"),
        )
        .output()
        .unwrap()
}

pub(crate) fn ok(coordinator: &Coordinator, arguments: &[&str]) -> String {
    let output = run(coordinator, arguments);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn json(coordinator: &Coordinator, arguments: &[&str]) -> serde_json::Value {
    let arguments = [arguments, &["--json"]].concat();
    serde_json::from_str(&ok(coordinator, &arguments)).unwrap()
}

pub(crate) fn refused(coordinator: &Coordinator, arguments: &[&str], words: &str) {
    let output = run(coordinator, arguments);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {errors}");
    assert!(errors.contains(words), "{arguments:?}: {errors}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_runs_the_mesh_from_the_command_line() {
    let c = Coordinator::start().await;
    let status = json(&c, &["status"]);
    assert_eq!(status["join"], c.join().to_string());
    assert!(
        status["problems"][0]
            .as_str()
            .unwrap()
            .contains("no policy is set")
    );

    ok(
        &c,
        &[
            "user",
            "create",
            "alice@example.org",
            "--display-name",
            "Alice",
        ],
    );
    refused(&c, &["user", "create", "alice@example.org"], "already");
    let key = json(
        &c,
        &[
            "key",
            "create",
            "--user",
            "alice@example.org",
            "--expires",
            "2h",
        ],
    );
    let lifetime = key["expires"].as_u64().unwrap() - key["created"].as_u64().unwrap();
    assert_eq!(lifetime, 7200);
    let (_, session) = c.agent(key["secret"].as_str().unwrap(), "laptop").await;
    drop(session);
    refused(
        &c,
        &["user", "delete", "alice@example.org"],
        "owns 1 node(s)",
    );

    assert!(ok(&c, &["node", "rename", "laptop", "Alice's Laptop"]).starts_with("alice-s-laptop"));
    ok(
        &c,
        &["node", "tag", "alice-s-laptop", "tag:kiosk", "tag:lobby"],
    );
    ok(
        &c,
        &[
            "node",
            "routes",
            "alice-s-laptop",
            "10.0.0.0/8",
            "0.0.0.0/0",
        ],
    );
    let node = json(&c, &["node", "show", "alice-s-laptop"]);
    assert_eq!(node["tags"], serde_json::json!(["tag:kiosk", "tag:lobby"]));
    assert_eq!(node["user"], serde_json::Value::Null);
    assert_eq!(node["expires"], serde_json::Value::Null);
    assert_eq!(
        node["approved_routes"],
        serde_json::json!(["0.0.0.0/0", "10.0.0.0/8"])
    );
    ok(&c, &["node", "expire", "alice-s-laptop"]);
    assert!(ok(&c, &["node", "list"]).contains("expired"));
    ok(
        &c,
        &["user", "rename", "alice@example.org", "alice@example.com"],
    );
    ok(&c, &["user", "delete", "alice@example.com"]);
    assert_eq!(json(&c, &["key", "list"])["keys"], serde_json::json!([]));
    ok(&c, &["node", "delete", "alice-s-laptop"]);
    assert_eq!(json(&c, &["node", "list"])["nodes"], serde_json::json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_no_sense_is_refused_with_the_next_step() {
    let c = Coordinator::start().await;
    let (_, _session) = c.agent(&c.key(false).await, "web").await;
    refused(&c, &["node", "show", "nobody"], "node list");
    for net in ["127.0.0.0/8", "fe80::/10", "::ffff:0:0/96", "224.0.0.0/4"] {
        refused(&c, &["node", "routes", "web", net], "link-local");
    }
    refused(&c, &["node", "rename", "web", "..."], "letter or a digit");
    refused(&c, &["node", "tag", "web", "web"], "tag:NAME");
    refused(
        &c,
        &["node", "routes", "web", "10.0.0.1/8"],
        "did you mean 10.0.0.0/8",
    );
    refused(
        &c,
        &["node", "routes", "web", "100.64.1.0/24"],
        "mesh's own addresses",
    );
    refused(&c, &["key", "create"], "--tag tag:NAME");
    refused(&c, &["key", "create", "--user", "nobody"], "user list");
    refused(
        &c,
        &["key", "create", "--tag", "tag:a", "--user", "b"],
        "not both",
    );
    refused(
        &c,
        &["key", "create", "--tag", "tag:a", "--expires", "91d"],
        "ninety days",
    );
    refused(&c, &["key", "revoke", "999"], "key list");
    refused(&c, &["user", "create", "a b"], "without spaces");
    refused(&c, &["db", "backup", "/proc/nothing/here"], "may write to");
    let usage = run(&c, &["node", "dance"]);
    assert_eq!(usage.status.code(), Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn policy_verbs_name_file_line_and_column() {
    let c = Coordinator::start().await;
    let file = c.dir.path().join("policy.hujson");
    let name = file.to_str().unwrap();
    std::fs::write(&file, "{\n  \"acls\": [,]\n}\n").unwrap();
    refused(&c, &["policy", "set", name], &format!("{name}:2:"));
    for offline in [&[][..], &["--offline"]] {
        let check = run(&c, &[&["policy", "check", name], offline].concat());
        assert_eq!(check.status.code(), Some(1));
        let text = String::from_utf8(check.stdout).unwrap();
        assert!(text.starts_with(&format!("{name}:2:")), "{text}");
    }
    std::fs::write(&file, DENY_ALL).unwrap();
    ok(&c, &["policy", "check", name, "--offline"]);
    ok(&c, &["policy", "set", name]);
    assert_eq!(ok(&c, &["policy", "get"]), DENY_ALL);
    refused(
        &c,
        &["policy", "set", name, "--expect", "7"],
        "version 1 by now",
    );
    assert_eq!(
        json(&c, &["policy", "set", name, "--expect", "1"])["version"],
        2
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_coordinator_the_exit_code_says_so() {
    let mut c = Coordinator::start().await;
    c.stop().await;
    let output = run(&c, &["status"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("is `mesh-coordinator serve` running?")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_goes_away_is_no_error() {
    let c = Coordinator::start().await;
    let mut child = Command::new(env!("CARGO_BIN_EXE_mesh-coordinator"))
        .args(["policy", "get"])
        .env("MESH_COORDINATOR_SOCKET", c.dir.path().join("admin.sock"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_socket_is_for_its_owner_and_group_only() {
    use std::os::unix::fs::PermissionsExt as _;
    let c = Coordinator::start().await;
    let socket = c.dir.path().join("admin.sock");
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_and_metrics_are_plain_http_and_not_for_browsers() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let c = Coordinator::start().await;
    let address = c.running().metrics_address;
    let get = |head: &'static str| async move {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("{head}\r\nHost: localhost\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        let read = stream.read_to_string(&mut text);
        tokio::time::timeout(PATIENCE, read).await.unwrap().unwrap();
        text
    };
    assert!(
        get("GET /readyz HTTP/1.1")
            .await
            .starts_with("HTTP/1.1 200")
    );
    assert!(
        get("POST /readyz HTTP/1.1")
            .await
            .starts_with("HTTP/1.1 405")
    );
    assert!(get("GET / HTTP/1.1").await.starts_with("HTTP/1.1 404"));
    let browser = get("GET /metrics HTTP/1.1\r\nOrigin: http://evil.example").await;
    assert!(browser.starts_with("HTTP/1.1 403"));
    let (_, _session) = c.agent(&c.key(false).await, "web").await;
    eventually("the node is counted", || async {
        let text = get("GET /metrics HTTP/1.1").await;
        text.contains("mesh_coordinator_nodes_connected 1")
            && text.contains("mesh_coordinator_enrolled_total 1")
    })
    .await;
}
