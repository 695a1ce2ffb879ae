//! The agent as a process, with its local socket: what it says before it is a node, when its state
//! is damaged, and when somebody writes garbage to it.
//!
//! None of this needs root or a network: `mesh down` and `mesh status` on a machine that is no node.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by a panic")]

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// An agent in a folder of its own, ended with the test.
struct Agent {
    folder: tempfile::TempDir,
    process: Child,
}

impl Agent {
    fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap())
    }

    fn start_in(folder: tempfile::TempDir) -> Self {
        let path = |name: &str| folder.path().join(name);
        let process = Command::new(env!("CARGO_BIN_EXE_mesh-agent"))
            .arg("--state-dir")
            .arg(path("state"))
            .arg("--run-dir")
            .arg(path("run"))
            .arg("--pin-dir")
            .arg(path("pins"))
            .args([
                "--interface",
                "mesh-test0",
                "--backend",
                "userspace",
                "--dns",
                "false",
            ])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let agent = Self { folder, process };
        let deadline = Instant::now() + Duration::from_secs(20);
        while UnixStream::connect(agent.socket()).is_err() {
            assert!(Instant::now() < deadline, "the agent does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        agent
    }

    fn socket(&self) -> std::path::PathBuf {
        self.folder.path().join("run/agent.sock")
    }

    fn mesh(&self, arguments: &[&str]) -> Output {
        mesh(&self.socket(), arguments)
    }

    fn stop(mut self) -> tempfile::TempDir {
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(self.process.wait().unwrap().success(), "a clean stop");
        std::mem::replace(&mut self.folder, tempfile::tempdir().unwrap())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn mesh(socket: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mesh"))
        .arg("--socket")
        .arg(socket)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn an_agent_that_is_no_node_says_so_and_what_to_do() {
    let agent = Agent::start();
    let status = agent.mesh(&["status", "--json"]);
    assert_eq!(code(&status), 0);
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status["state"], "stopped");

    let up = agent.mesh(&["up"]);
    assert_eq!(code(&up), 1);
    assert!(
        text(&up.stderr).contains("mesh up --join"),
        "{}",
        text(&up.stderr)
    );
    let pin = "ab".repeat(32);
    let join = format!("mesh://127.0.0.1:1?pin=sha256:{pin}");
    let up = agent.mesh(&["up", "--join", &join]);
    assert!(
        text(&up.stderr).contains("pre-auth key"),
        "{}",
        text(&up.stderr)
    );
    let up = agent.mesh(&["up", "--join", "https://wrong", "--auth-key", "k"]);
    assert_eq!(code(&up), 2);
    assert!(text(&up.stderr).contains("mesh://"), "{}", text(&up.stderr));

    let ping = agent.mesh(&["ping", "nobody"]);
    assert_eq!(code(&ping), 1);
    assert!(
        text(&ping.stderr).contains("no netmap"),
        "{}",
        text(&ping.stderr)
    );
    assert_eq!(code(&agent.mesh(&["down"])), 0);
    let bundle = agent.mesh(&["debug", "bundle"]);
    assert_eq!(code(&bundle), 0);
    serde_json::from_slice::<serde_json::Value>(&bundle.stdout).unwrap();
}

#[test]
fn without_an_agent_the_command_says_how_to_start_one() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("none.sock");
    let status = mesh(&socket, &["status"]);
    assert_eq!(code(&status), 3);
    assert!(text(&status.stderr).contains("systemctl start mesh-agent"));
    let version = mesh(&socket, &["version", "--json"]);
    assert_eq!(code(&version), 0);
    assert_eq!(code(&mesh(&socket, &["no-such-verb"])), 2);
}

#[test]
fn a_bundle_holds_no_secret() {
    let agent = Agent::start();
    let bundle = text(&agent.mesh(&["debug", "bundle"]).stdout);
    let keys = std::fs::read(agent.folder.path().join("state/keys")).unwrap();
    let start = keys.iter().position(|byte| *byte == b'{').unwrap();
    let keys: serde_json::Value = serde_json::from_slice(&keys[start..]).unwrap();
    for secret in ["machine", "node"] {
        let secret = keys[secret].as_str().unwrap();
        assert!(secret.len() > 40 && !bundle.contains(secret));
    }
}

#[test]
fn damaged_keys_leave_an_agent_that_is_up_unwell_and_itself() {
    let folder = Agent::start().stop();
    let keys = folder.path().join("state/keys");
    let mut bytes = std::fs::read(&keys).unwrap();
    let last = bytes.len() - 5;
    bytes[last] ^= 1;
    std::fs::write(&keys, &bytes).unwrap();

    let agent = Agent::start_in(folder);
    let status = agent.mesh(&["status", "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status["health"][0]["name"], "StateCorrupt");
    let up = agent.mesh(&["up", "--auth-key", "k"]);
    assert_eq!(code(&up), 1);
    assert!(
        text(&up.stderr).contains("restore the state folder"),
        "{}",
        text(&up.stderr)
    );
    assert_eq!(
        std::fs::read(&keys).unwrap(),
        bytes,
        "nobody touched the evidence"
    );
    agent.stop();
}

#[test]
fn two_agents_do_not_share_a_state() {
    let agent = Agent::start();
    let second = Command::new(env!("CARGO_BIN_EXE_mesh-agent"))
        .arg("--state-dir")
        .arg(agent.folder.path().join("state"))
        .arg("--run-dir")
        .arg(agent.folder.path().join("other"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(code(&second), 1);
    assert!(
        text(&second.stderr).contains("another agent"),
        "{}",
        text(&second.stderr)
    );
}

#[test]
fn garbage_on_the_socket_ends_that_connection_and_nothing_else() {
    let agent = Agent::start();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    let noise: Vec<u8> = (0..20_000_u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let framed = [preface.clone(), noise.clone()].concat();
    let empty_settings = [&preface[..], &[0, 0, 0, 4, 0, 0, 0, 0, 0], &noise[..]].concat();
    for bytes in [
        noise,
        framed,
        empty_settings,
        preface,
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
    ] {
        let mut stream = UnixStream::connect(agent.socket()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        // The agent may hang up before it has read everything.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    assert_eq!(code(&agent.mesh(&["status"])), 0);
}

#[test]
fn a_closed_pipe_is_no_crash() {
    let agent = Agent::start();
    let mut command = Command::new(env!("CARGO_BIN_EXE_mesh"))
        .arg("--socket")
        .arg(agent.socket())
        .args(["debug", "bundle"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(command.stdout.take());
    let output = command.wait_with_output().unwrap();
    assert_eq!(code(&output), 0, "{}", text(&output.stderr));
}
