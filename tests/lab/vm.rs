//! Emulated machines with Debian's kernels: other rings, and measurements that need one.
//!
//! No KVM, no network, no disk: a machine is a kernel, an initramfs with programs of the host, and
//! a serial line on which they report. Everything is slower inside by about [`TIME_SCALE`], which
//! the programs are told, so that their limits stay tight elsewhere.

#![expect(clippy::print_stdout, reason = "says what a long boot is about")]

mod initramfs;
mod kernel;
pub mod plan;
mod qemu;
mod run;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

pub use initramfs::stripped;
pub use kernel::Kernel;
pub use qemu::Clock;
pub use run::tool;

use initramfs::Tree;
use plan::{Plan, Step};
use qemu::Machine;

/// How much slower than the host emulation is, roughly; `MESH_TIME_SCALE` inside.
const TIME_SCALE: u32 = 10;

/// Modules of every step. Loaded beforehand, because nothing inside loads them on demand: the
/// agent may not, and the kernel would ask a program that is not there.
const MODULES: &[&str] = &[
    "wireguard",
    "tun",
    "veth",
    "bridge",
    "dummy",
    "cls_bpf",
    "act_bpf",
    "sch_ingress",
    "sch_netem",
    "sch_htb",
    "sch_fq",
    "nf_tables",
    "nft_ct",
    "nft_nat",
    "nft_masq",
    "nft_chain_nat",
    "nft_reject_inet",
    "nft_limit",
    "nft_redir",
    "nft_fib_inet",
    "nf_conntrack",
    "inet_diag",
    "udp_diag",
    "tcp_diag",
];

const SYSCTLS: &[(&str, &str)] = &[
    // As on a Debian server; a ring that forwards turns it on in its own namespace.
    ("kernel/unprivileged_bpf_disabled", "2"),
    ("net/core/bpf_jit_enable", "1"),
];

/// What the rings run besides their own binaries.
const TOOLS: &[&str] = &[
    "bash",
    "sh",
    "cat",
    "cp",
    "mv",
    "rm",
    "ls",
    "ln",
    "mkdir",
    "mknod",
    "chmod",
    "chown",
    "stat",
    "touch",
    "head",
    "tail",
    "tee",
    "wc",
    "sort",
    "cut",
    "tr",
    "grep",
    "sed",
    "awk",
    "env",
    "id",
    "true",
    "false",
    "sleep",
    "timeout",
    "kill",
    "pgrep",
    "ps",
    "find",
    "dd",
    "df",
    "uname",
    "mount",
    "umount",
    "findmnt",
    "nsenter",
    "unshare",
    "setpriv",
    "sysctl",
    "dmesg",
    "ip",
    "tc",
    "bridge",
    "ss",
    "nft",
    "wg",
    "wireguard-go",
    "ping",
    "iperf3",
    "dig",
    "getent",
    "hostname",
];

/// Where the eBPF object lies inside.
const OBJECT: &str = "/mesh/mesh-ebpf.o";

/// Where programs of the release build lie inside.
pub const RELEASE_FOLDER: &str = "/mesh/bin";

/// What a machine is given to run.
#[derive(Debug)]
pub struct Guest {
    pub clock: Clock,
    pub steps: Vec<Step>,
    /// Where each goes inside, and where it lies; one of them is `/init`.
    pub programs: Vec<(String, PathBuf)>,
    /// What programs read, likewise.
    pub files: Vec<(String, PathBuf)>,
    /// The eBPF object.
    pub object: PathBuf,
}

impl Guest {
    /// Everything is there.
    pub fn check(&self) -> Result<()> {
        let programs = self.programs.iter().map(|(_, program)| program);
        for file in programs.chain([&self.object]) {
            ensure!(
                file.exists(),
                "no {}: `cargo xtask test vm` makes it",
                file.display()
            );
        }
        Ok(())
    }

    /// Boots a kernel and runs the steps; true when all went well. `hear` is told every line that
    /// they print; `cache` keeps the initramfs and the kernel's log.
    pub fn boot(&self, kernel: &Kernel, cache: &Path, hear: &mut dyn FnMut(&str)) -> Result<bool> {
        let mut tree = Tree::new();
        for name in TOOLS {
            tree.tool(name)?;
        }
        for (at, contents) in [
            (
                "/etc/passwd",
                "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:::/bin/false\n",
            ),
            ("/etc/group", "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"),
            ("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
            (
                "/etc/nsswitch.conf",
                "passwd: files\ngroup: files\nhosts: files dns\n",
            ),
            ("/etc/resolv.conf", ""),
        ] {
            tree.text(at, contents);
        }
        let mut modules = Vec::new();
        for (name, contents) in kernel.closure(MODULES)? {
            let at = format!("/modules/{name}.ko");
            tree.text(&at, contents);
            modules.push(at);
        }
        for (at, source) in &self.programs {
            tree.program(at, source)?;
        }
        for (at, source) in &self.files {
            tree.file(at, source);
        }
        tree.file(OBJECT, &self.object);
        let environment = [
            ("PATH", "/usr/sbin:/usr/bin".to_owned()),
            ("HOME", "/root".to_owned()),
            ("LC_ALL", "C".to_owned()),
            ("RUST_BACKTRACE", "1".to_owned()),
            ("MESH_TIME_SCALE", TIME_SCALE.to_string()),
            ("MESH_BIN_DIR", RELEASE_FOLDER.to_owned()),
            // Agents and the rings' own programs take the same object.
            ("MESH_EBPF_OBJECT", OBJECT.to_owned()),
            ("MESH_AGENT_EBPF_OBJECT", OBJECT.to_owned()),
        ];
        let plan = Plan {
            modules,
            sysctls: owned(SYSCTLS),
            environment: environment
                .map(|(name, value)| (name.to_owned(), value))
                .into(),
            steps: self.steps.clone(),
        };
        tree.text(
            plan::PLAN_PATH,
            serde_json::to_vec(&plan).context("write the plan")?,
        );

        let initramfs = cache.join(format!("{}.cpio", kernel.release));
        let size = tree.write(&initramfs)?;
        println!("boot {}, initramfs of {} MiB", kernel.release, size >> 20);
        let limit = plan
            .steps
            .iter()
            .map(|step| step.limit_seconds)
            .sum::<u64>();
        Machine {
            clock: self.clock,
            image: &kernel.image,
            initramfs: &initramfs,
            log: &cache.join(format!("{}.log", kernel.release)),
            // A little for init itself; it ends each step in time unless the kernel hangs, or its clock goes slower
            // than ours.
            limit: Duration::from_secs(limit + 30),
        }
        .run(hear)
    }
}

/// For the plan, which owns what it says.
pub fn owned<T: FromIterator<(String, String)>>(pairs: &[(&str, &str)]) -> T {
    pairs
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}
