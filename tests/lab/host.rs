//! A host of the laboratory: network and mount namespaces of its own, and programs in them.
//!
//! A keeper process holds the mount namespace; it reads from a pipe of ours, so it ends when we
//! do, and the mounts (`/run`, the BPF file system, `/etc/resolv.conf`) end with it. Programs join
//! both namespaces by `nsenter` and take the rights of their own user by `setpriv`, which replace
//! themselves: a program's process id is the one that was started.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::process::Process;

/// Whose rights a program gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum User {
    Root,
    /// A user of its own with the five capabilities of the agent's systemd unit.
    Agent,
    /// Likewise, on a host that keeps eBPF to itself.
    AgentWithoutBpf,
    /// A user of its own without any capability.
    Coordinator,
}

/// Users of the laboratory: numbers that no distribution gives out.
pub(crate) const AGENT_ID: u32 = 64_321;
pub(crate) const COORDINATOR_ID: u32 = 64_322;

const NET_CAPABILITIES: &str = "+net_admin,+net_raw,+net_bind_service";
const BPF_CAPABILITIES: &str = "+bpf,+perfmon";

#[derive(Debug)]
pub struct Host {
    name: String,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    folder: PathBuf,
    netns_path: String,
    netns: File,
    keeper: Child,
}

impl Host {
    pub(crate) fn new(
        name: &str,
        netns: &str,
        v4: Ipv4Addr,
        v6: Ipv6Addr,
        folder: &Path,
        binaries: &Path,
    ) -> Result<Self> {
        std::fs::create_dir(folder).with_context(|| format!("make {}", folder.display()))?;
        let netns_path = format!("/run/netns/{netns}");
        let file = File::open(&netns_path).with_context(|| format!("open {netns_path}"))?;
        let mut keeper = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "nsenter"])
            .arg(format!("--net={netns_path}"))
            .args(["unshare", "--mount", "--uts", "--propagation", "private"])
            .args(["sh", "-c", PREPARE, "sh"])
            .args([folder, binaries])
            .args([name, &AGENT_ID.to_string(), &COORDINATOR_ID.to_string()])
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start the keeper of a host")?;
        let mut ready = String::new();
        let stdout = keeper.stdout.take().context("read from the keeper")?;
        BufReader::new(stdout)
            .read_line(&mut ready)
            .context("read from the keeper")?;
        if ready != "ready\n" {
            let _ = keeper.kill();
            let _ = keeper.wait();
            bail!("the mounts of host {name} could not be made");
        }
        Ok(Self {
            name: name.to_owned(),
            v4,
            v6,
            folder: folder.to_owned(),
            netns_path,
            netns: file,
            keeper,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address on the underlay.
    pub fn v4(&self) -> Ipv4Addr {
        self.v4
    }

    pub fn v6(&self) -> Ipv6Addr {
        self.v6
    }

    /// The folder that this host alone writes to; `/host` inside.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A path of the host's own mount namespace, as seen from here.
    pub fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inside}", self.keeper.id()))
    }

    /// What a person types before a command to run it in this host.
    pub fn entrance(&self) -> String {
        format!(
            "nsenter -t {} -n -m -u env PATH=/run/bin:$PATH",
            self.keeper.id()
        )
    }

    /// A command that will run in this host, found by name among the programs under test first.
    pub fn command(&self, user: User, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "nsenter"])
            .arg(format!("--net={}", self.netns_path))
            .arg(format!("--mount=/proc/{}/ns/mnt", self.keeper.id()))
            .arg(format!("--uts=/proc/{}/ns/uts", self.keeper.id()))
            .args(["env", PATH]);
        match user {
            User::Root => {}
            User::Agent | User::AgentWithoutBpf => {
                command.args(privileges(AGENT_ID));
                let mut capabilities = format!("-all,{NET_CAPABILITIES}");
                if user == User::Agent {
                    capabilities = format!("{capabilities},{BPF_CAPABILITIES}");
                }
                for set in ["--inh-caps", "--ambient-caps", "--bounding-set"] {
                    command.args([set, &capabilities]);
                }
            }
            User::Coordinator => {
                command.args(privileges(COORDINATOR_ID));
                command.args([
                    "--inh-caps=-all",
                    "--ambient-caps=-all",
                    "--bounding-set=-all",
                ]);
            }
        }
        command.arg(program);
        command
    }

    /// Starts a program that stays; its log is `NAME.log` in the host's folder.
    pub fn spawn(&self, name: &str, command: Command) -> Result<Process> {
        let log = self.folder.join(format!("{name}.log"));
        Process::spawn(&format!("{name} on {}", self.name), command, &log)
    }

    /// Runs a program of this host to its end as root, for what it prints.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = self.command(User::Root, program);
        command.args(arguments);
        output(command)
            .with_context(|| format!("{program} {} on {}", arguments.join(" "), self.name))
    }

    /// Runs work in this host's network: sockets that it makes are the host's.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    self.enter()?;
                    Ok(work())
                })
                .join()
                .map_err(|_| anyhow!("work in host {} panicked", self.name))?
        })
    }

    /// Moves this thread into the host's network, for good.
    pub(crate) fn enter(&self) -> Result<()> {
        move_into_link_name_space(
            std::os::fd::AsFd::as_fd(&self.netns),
            Some(LinkNameSpaceType::Network),
        )
        .with_context(|| format!("enter the network of {}", self.name))
    }

    pub fn underlay_addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

/// Standard output of a command that must succeed; what it says otherwise is the error.
pub(crate) fn output(mut command: Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().context("start it")?;
    if !output.status.success() {
        bail!(
            "{}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn privileges(id: u32) -> Vec<String> {
    vec![
        "setpriv".into(),
        format!("--reuid={id}"),
        format!("--regid={id}"),
        "--clear-groups".into(),
        "--pdeathsig=KILL".into(),
        "--no-new-privs".into(),
    ]
}

const PATH: &str = "PATH=/run/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What systemd's units, tmpfiles and udev prepare on a real machine (a TUN device that everybody may
/// open among it). Arguments: the host's folder, the programs' folder, the host's name, the agent's
/// and the coordinator's user.
const PREPARE: &str = r#"
set -e
folder=$1 programs=$2 name=$3 agent=$4 coordinator=$5
hostname "$name" 2>/dev/null || echo "$name" > /proc/sys/kernel/hostname
echo '0 0' > /proc/sys/net/ipv4/ping_group_range
mkdir -m 0700 "$folder/agent"
chown "$agent:$agent" "$folder/agent"
touch "$folder/resolv.conf"
mount --bind "$folder/resolv.conf" /etc/resolv.conf
mount -t bpf -o mode=0711 bpf /sys/fs/bpf
mkdir /sys/fs/bpf/mesh-agent
chown "$agent:$agent" /sys/fs/bpf/mesh-agent
mount -t tmpfs -o mode=0755 tmpfs /run
mknod -m 0666 /run/tun c 10 200
mount --bind /run/tun /dev/net/tun
mkdir /run/bin /run/mesh-agent /run/wireguard /run/mesh-coordinator /run/netns
mount --bind "$programs" /run/bin
chown "$agent:$agent" /run/mesh-agent /run/wireguard
chown "$coordinator:$coordinator" /run/mesh-coordinator
echo ready
exec cat
"#;
