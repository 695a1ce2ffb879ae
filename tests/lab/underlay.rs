//! The laboratory's internet: one bridge in a namespace of its own, a wire to each host.

use std::cell::Cell;
use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};

use crate::host::Host;
use crate::leftovers;

/// A set of hosts on one underlay. Dropped, it takes everything with it, hosts last: drop them
/// before, or let both go at once.
#[derive(Debug)]
pub struct Lab {
    prefix: String,
    bridge: String,
    folder: PathBuf,
    binaries: PathBuf,
    hosts: Cell<u8>,
}

impl Lab {
    /// An underlay without hosts. `binaries` is the folder of the programs under test.
    pub fn new(binaries: &Path) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        if !rustix::process::geteuid().is_root() {
            bail!("not root: a laboratory makes network namespaces. Run with `sudo -E`");
        }
        leftovers::prepare();
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("{}{number}-", leftovers::own_prefix());
        let folder = std::env::temp_dir().join(format!("{prefix}files"));
        std::fs::create_dir(&folder).with_context(|| format!("make {}", folder.display()))?;
        let lab = Self {
            bridge: format!("{prefix}underlay"),
            prefix,
            folder,
            binaries: binaries.to_owned(),
            hosts: Cell::new(0),
        };
        ip(&["netns", "add", &lab.bridge])?;
        let net = format!("/run/netns/{}", lab.bridge);
        ip_batch(
            &net,
            "link set lo up\n\
             link add underlay type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
             link set underlay up\n",
        )?;
        Ok(lab)
    }

    /// The programs of the last release build: `MESH_BIN_DIR`, or beside this very program.
    pub fn of_release_build() -> Result<Self> {
        Self::new(&release_binaries()?)
    }

    /// A host on the underlay, up and reachable.
    pub fn host(&self, name: &str) -> Result<Host> {
        let number = self.hosts.get() + 1;
        self.hosts.set(number);
        let netns = format!("{}{name}", self.prefix);
        ip(&["netns", "add", &netns])?;
        let v4 = Ipv4Addr::new(198, 51, 100, number);
        let v6 = Ipv6Addr::new(0x2001, 0xdb8, 0x51, 0, 0, 0, 0, number.into());
        ip_batch(
            &format!("/run/netns/{}", self.bridge),
            &format!(
                "link add wire{number} type veth peer name eth0 netns {netns}\n\
                 link set wire{number} master underlay\n\
                 link set wire{number} up\n"
            ),
        )?;
        ip_batch(
            &format!("/run/netns/{netns}"),
            &format!(
                "link set lo up\n\
                 addr add {v4}/24 dev eth0\n\
                 addr add {v6}/64 dev eth0 nodad\n\
                 link set eth0 up\n"
            ),
        )?;
        Host::new(
            name,
            &netns,
            v4,
            v6,
            &self.folder.join(name),
            &self.binaries,
        )
    }

    /// Cuts or mends the wire of a host.
    pub fn set_wire(&self, host: &Host, up: bool) -> Result<()> {
        let number = host.v4().octets()[3];
        let state = if up { "up" } else { "down" };
        ip_batch(
            &format!("/run/netns/{}", self.bridge),
            &format!("link set wire{number} {state}\n"),
        )
    }

    /// The folder of the programs under test.
    pub fn binaries(&self) -> &Path {
        &self.binaries
    }

    /// Where everything that hosts write outside their namespaces lies.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        leftovers::sweep(&self.prefix);
    }
}

/// Where the programs under test lie.
fn release_binaries() -> Result<PathBuf> {
    let folder = match std::env::var_os("MESH_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => {
            let own = std::env::current_exe().context("find this program")?;
            let target = own
                .ancestors()
                .find(|folder| folder.join("release").is_dir())
                .context("find the target folder")?;
            target.join("release")
        }
    };
    for program in ["mesh-coordinator", "mesh-agent", "mesh"] {
        if !folder.join(program).exists() {
            bail!(
                "no {program} in {}: `cargo xtask test netns` builds it",
                folder.display()
            );
        }
    }
    Ok(folder)
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .context("run ip")?;
    if !output.status.success() {
        bail!(
            "ip {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// Several commands of `ip`, in one namespace.
fn ip_batch(netns: &str, commands: &str) -> Result<()> {
    let mut child = Command::new("nsenter")
        .arg(format!("--net={netns}"))
        .args(["ip", "-batch", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("run ip")?;
    let mut stdin = child.stdin.take().context("write to ip")?;
    stdin
        .write_all(commands.as_bytes())
        .context("write to ip")?;
    drop(stdin);
    let output = child.wait_with_output().context("wait for ip")?;
    if !output.status.success() {
        bail!(
            "ip in {netns}: {}\n{commands}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
