//! The coordinator of a laboratory: its program, and its administrator's commands.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use serde_json::Value;

use crate::host::COORDINATOR_ID;
use crate::{Host, Process, User, eventually};

use super::{json, number, text};

#[derive(Debug)]
pub struct Coordinator {
    pub process: Process,
    pub host: Host,
    join: String,
}

/// A disk of its own, of 16 MiB, so that a test can fill it.
const DISK: &str = "/run/coordinator-disk";

/// The default of `serve`.
const METRICS_PORT: u16 = 41_780;

/// From the start of the program to its first answer.
const START: Duration = Duration::from_secs(10);

impl Coordinator {
    /// Runs on this host until dropped; answers when this returns.
    pub fn start(host: Host) -> Result<Self> {
        let options = format!("size=16m,mode=0700,uid={COORDINATOR_ID},gid={COORDINATOR_ID}");
        host.run("mkdir", &[DISK])?;
        host.run("mount", &["-t", "tmpfs", "-o", &options, "tmpfs", DISK])?;
        let process = Self::launch(&host)?;
        let mut coordinator = Self {
            process,
            host,
            join: String::new(),
        };
        let status = coordinator.wait_until_ready()?;
        text(&status, "/join")?.clone_into(&mut coordinator.join);
        Ok(coordinator)
    }

    fn launch(host: &Host) -> Result<Process> {
        let mut command = host.command(User::Coordinator, "mesh-coordinator");
        command
            .args(["serve", "--state-dir", DISK])
            .args(["--advertise", &host.v4().to_string()]);
        host.spawn("mesh-coordinator", command)
    }

    fn wait_until_ready(&mut self) -> Result<Value> {
        // A program that has ended will not answer, however long one waits.
        let answer = eventually(START, || {
            if self.process.check_running().is_err() {
                return Ok(None);
            }
            self.admin(&["status"]).map(Some)
        });
        self.process.check_running()?;
        answer?.context("wait for the coordinator")
    }

    /// One of its administrator's commands, with `--json`.
    pub fn admin(&self, arguments: &[&str]) -> Result<Value> {
        json(&self.host, "mesh-coordinator", arguments)
    }

    /// What a node is given to find it, and to know it for what it is.
    pub fn join(&self) -> &str {
        &self.join
    }

    pub fn generation(&self) -> Result<u64> {
        number(&self.admin(&["status"])?, "/generation")
    }

    /// A new pre-auth key's secret.
    pub fn key(&self, key: &Key) -> Result<String> {
        Ok(self.key_with_id(key)?.0)
    }

    pub fn key_with_id(&self, key: &Key) -> Result<(String, u64)> {
        let arguments: Vec<_> = key.arguments.iter().map(String::as_str).collect();
        let answer = self.admin(&arguments)?;
        Ok((
            text(&answer, "/secret")?.to_owned(),
            number(&answer, "/id")?,
        ))
    }

    /// Sets the policy; a refusal is the error, with its words.
    pub fn set_policy(&self, policy: &str) -> Result<()> {
        let file = self.host.folder().join("policy.hujson");
        std::fs::write(&file, policy).with_context(|| format!("write {}", file.display()))?;
        let file = file.to_str().context("a path in UTF-8")?;
        self.admin(&["policy", "set", file])?;
        Ok(())
    }

    pub fn policy(&self) -> Result<String> {
        Ok(text(&self.admin(&["policy", "get"])?, "/text")?.to_owned())
    }

    pub fn nodes(&self) -> Result<Vec<Value>> {
        let answer = self.admin(&["node", "list"])?;
        match answer.pointer("/nodes").and_then(Value::as_array) {
            Some(nodes) => Ok(nodes.clone()),
            None => bail!("no list of nodes in {answer}"),
        }
    }

    /// A file of its state, as seen from here.
    pub fn state(&self, file: &str) -> PathBuf {
        self.host.path(&format!("{DISK}/{file}"))
    }

    /// What /readyz says.
    pub fn ready(&self) -> Result<bool> {
        Ok(self.get("/readyz")?.starts_with("HTTP/1.1 200"))
    }

    /// A counter of /metrics, by the end of its name.
    pub fn metric(&self, name: &str) -> Result<u64> {
        let text = self.get("/metrics")?;
        let line = text.lines().find(|line| {
            line.split(' ')
                .next()
                .is_some_and(|metric| metric.ends_with(name))
        });
        line.and_then(|line| line.split(' ').next_back()?.parse().ok())
            .with_context(|| format!("no {name} in {text}"))
    }

    /// An answer of the HTTP listener, which is on the host's loopback.
    fn get(&self, path: &str) -> Result<String> {
        self.host.inside(|| {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, METRICS_PORT))
                .context("connect to the coordinator's metrics")?;
            let request =
                format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).context("ask")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).context("listen")?;
            Ok(answer)
        })?
    }

    /// `kill -9`, at once.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Ends it as systemd would.
    pub fn stop(&mut self) -> Result<()> {
        let status = self.process.terminate(Duration::from_secs(5))?;
        if !status.success() {
            bail!(
                "the coordinator ended with {status}:\n{}",
                self.process.log_tail()
            );
        }
        Ok(())
    }

    /// Starts it again after it has ended, whatever the reason.
    pub fn restart(&mut self) -> Result<()> {
        self.process = Self::launch(&self.host)?;
        self.wait_until_ready().map(drop)
    }

    pub fn pause(&self) -> Result<()> {
        self.process.signal(Signal::STOP)
    }

    pub fn resume(&self) -> Result<()> {
        self.process.signal(Signal::CONT)
    }
}

/// A pre-auth key to be made.
#[derive(Debug, Clone)]
pub struct Key {
    arguments: Vec<String>,
}

impl Key {
    pub fn one_off() -> Self {
        Self {
            arguments: vec!["key".into(), "create".into()],
        }
    }

    pub fn reusable() -> Self {
        let mut key = Self::one_off();
        key.arguments.push("--reusable".into());
        key
    }

    /// By the tag's name alone.
    #[must_use]
    pub fn tag(mut self, name: &str) -> Self {
        self.arguments
            .extend(["--tag".into(), format!("tag:{name}")]);
        self
    }

    #[must_use]
    pub fn expires_in(mut self, seconds: u32) -> Self {
        self.arguments
            .extend(["--expires".into(), format!("{seconds}s")]);
        self
    }
}
