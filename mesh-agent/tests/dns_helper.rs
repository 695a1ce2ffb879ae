//! The real `mesh-dns-helper` on a folder of ours, spoken to by the agent's own client.
//!
//! A lease is what is under test: the host asks us for as long as the agent's connection stands,
//! and whichever side is killed, the file comes back.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by a panic")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mesh_agent::dns::protocol::{Mode, Request, Setting};
use mesh_agent::dns::system::System;

const BEFORE: &str = "nameserver 192.0.2.53\n";

struct Helper {
    folder: tempfile::TempDir,
    process: Child,
}

impl Helper {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("resolv.conf"), BEFORE).unwrap();
        let process = Self::command(&folder).spawn().unwrap();
        let helper = Self { folder, process };
        eventually("the helper listens", || helper.socket().exists());
        helper
    }

    fn command(folder: &tempfile::TempDir) -> Command {
        let mut command = Self::activated(folder);
        command.arg("--socket").arg(folder.path().join("socket"));
        command
    }

    fn activated(folder: &tempfile::TempDir) -> Command {
        let own_user = rustix::process::geteuid().as_raw().to_string();
        let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-dns-helper"));
        command
            .arg("--resolv-conf")
            .arg(folder.path().join("resolv.conf"))
            .arg("--state")
            .arg(folder.path().join("state"))
            .args(["--user", &own_user])
            .stderr(Stdio::null());
        command
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        fs::remove_file(self.socket()).unwrap();
    }

    fn restart(&mut self) {
        self.process = Self::command(&self.folder).spawn().unwrap();
        eventually("the helper listens", || self.socket().exists());
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    fn text(&self) -> String {
        fs::read_to_string(self.folder.path().join("resolv.conf")).unwrap()
    }

    fn say(&self, bytes: &[u8]) -> String {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.write_all(bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn setting() -> Setting {
    match Request::parse(b"set mesh0 mesh.internal 100.64.0.1 mesh.internal") {
        Ok(Request::Set(setting)) => setting,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_file_is_ours_until_we_give_it_back() {
    let helper = Helper::start();
    let mut system = System::new(helper.socket());
    assert_eq!(system.status().await.unwrap().mode, Mode::None);

    let report = system.set(&setting()).await.unwrap();
    assert_eq!(report.mode, Mode::Replaced);
    assert_eq!(report.upstreams, ["192.0.2.53"]);
    assert!(
        helper
            .text()
            .contains("nameserver 100.64.0.1\nsearch mesh.internal\n")
    );

    system.restore().await.unwrap();
    assert_eq!(helper.text(), BEFORE);
}

#[tokio::test]
async fn an_agent_that_dies_leaves_the_host_as_it_was() {
    let helper = Helper::start();
    let mut system = System::new(helper.socket());
    system.set(&setting()).await.unwrap();
    assert_ne!(helper.text(), BEFORE);
    drop(system);
    eventually("the file is back", || helper.text() == BEFORE);

    // And the next one is served as the first was.
    let mut next = System::new(helper.socket());
    assert_eq!(next.set(&setting()).await.unwrap().mode, Mode::Replaced);
}

#[tokio::test]
async fn a_helper_that_dies_is_noticed_and_what_it_left_is_undone_by_the_next() {
    let mut helper = Helper::start();
    let mut system = System::new(helper.socket());
    system.set(&setting()).await.unwrap();
    helper.kill();
    tokio::time::timeout(Duration::from_secs(10), system.lost())
        .await
        .expect("the agent notices");
    assert_ne!(helper.text(), BEFORE);
    assert!(system.set(&setting()).await.is_err());

    helper.restart();
    eventually("the file is back", || helper.text() == BEFORE);
    assert_eq!(system.set(&setting()).await.unwrap().mode, Mode::Replaced);
}

#[tokio::test]
async fn a_stale_file_is_put_back_by_a_restore_from_outside() {
    let mut helper = Helper::start();
    let mut system = System::new(helper.socket());
    system.set(&setting()).await.unwrap();
    helper.kill();

    let status = Helper::command(&helper.folder).arg("--restore").status();
    assert!(status.unwrap().success());
    assert_eq!(helper.text(), BEFORE);
}

#[test]
fn what_is_no_request_is_refused_in_words_and_changes_nothing() {
    let helper = Helper::start();
    let check = |bytes: &[u8], words: &str| {
        let answer = helper.say(bytes);
        assert!(
            answer.starts_with("error ") && answer.contains(words),
            "{answer}"
        );
        assert_eq!(helper.text(), BEFORE);
    };
    check(b"rm -rf /\n", "set, restore and status");
    check(b"set ../x mesh.internal 10.0.0.1 m\n", "interface name");
    check(b"set mesh0 mesh.internal ; m\n", "IP address");
    check(b"status", "one line");
    check(&[b'a'; 4096], "one line");
    check(b"\xff\xfe\n", "one line");
    check(b"\0\n", "one line");
    assert_eq!(helper.say(b"status\n"), "ok none 192.0.2.53\n");
    assert_eq!(helper.say(b""), "");
}

/// As systemd starts it: the listening socket is standard input, and one connection is one life.
#[tokio::test]
async fn an_activated_helper_serves_one_agent_and_ends() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("resolv.conf"), BEFORE).unwrap();
    let listener = UnixListener::bind(folder.path().join("listening")).unwrap();
    for _ in 0..2 {
        let mut system = System::new(folder.path().join("listening"));
        let mut helper = Helper::activated(&folder)
            .stdin(OwnedFd::from(listener.try_clone().unwrap()))
            .spawn()
            .unwrap();
        assert_eq!(system.set(&setting()).await.unwrap().mode, Mode::Replaced);
        drop(system);
        assert!(helper.wait().unwrap().success());
        let text = fs::read_to_string(folder.path().join("resolv.conf")).unwrap();
        assert_eq!(text, BEFORE);
    }
}

#[test]
fn a_helper_without_a_socket_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let output = Helper::activated(&folder)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let words = String::from_utf8(output.stderr).unwrap();
    assert!(words.contains("give --socket PATH"), "{words}");
}
