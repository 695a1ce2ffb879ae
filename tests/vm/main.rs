//! Ring 4: other rings on Debian's kernels, in virtual machines without KVM or network.
//!
//! The host's kernel need not have WireGuard, and is one of the many that agents meet. Everything
//! is slower inside by about [`TIME_SCALE`], which the rings are told, so that their limits stay
//! tight elsewhere.

#![expect(clippy::print_stdout, reason = "passes on what runs inside")]

mod initramfs;
mod kernel;
mod plan;
mod qemu;
mod run;
mod suites;

use std::{
    env,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use clap::Parser;
use initramfs::Tree;
use kernel::Kernel;
use plan::Plan;
use qemu::Machine;
use suites::Suite;

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
];

/// Runs test rings on other kernels, in emulated machines.
#[derive(Debug, Parser)]
struct Options {
    /// Series of kernels to run on.
    #[arg(
        long = "kernel",
        env = "MESH_VM_KERNELS",
        value_delimiter = ',',
        default_value = "6.1,6.12"
    )]
    kernels: Vec<String>,
    /// What to run, as often as wanted; otherwise what was seen whole on every kernel.
    #[arg(long = "suite", value_enum)]
    suites: Vec<Suite>,
    /// Understood because every test program is told it; inside, tests run one by one anyway.
    #[arg(long, hide = true)]
    test_threads: Option<usize>,
    /// Only tests whose name contains this.
    filter: Option<String>,
}

fn main() -> Result<ExitCode> {
    let mut options = Options::parse();
    if options.suites.is_empty() {
        options.suites = Suite::usual();
    }
    let target = target()?;
    let cache = target.join("vm");
    let steps = suites::build(&options.suites, options.filter.as_deref(), &target)?;

    let mut closing = Vec::new();
    let mut passed = true;
    for series in &options.kernels {
        let start = Instant::now();
        let kernel = Kernel::newest(series, &cache)?;
        println!("boot {}", kernel.release);
        let success = boot(&kernel, &steps, &cache)?;
        passed &= success;
        closing.push(format!(
            "vm {} ... {} in {} s",
            kernel.release,
            if success { "ok" } else { "FAILED" },
            start.elapsed().as_secs()
        ));
    }
    for line in closing {
        println!("{line}");
    }
    Ok(if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn boot(kernel: &Kernel, suites: &suites::Built, cache: &Path) -> Result<bool> {
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
    suites.place(&mut tree)?;
    let environment = [
        ("PATH", "/usr/sbin:/usr/bin".to_owned()),
        ("HOME", "/root".to_owned()),
        ("LC_ALL", "C".to_owned()),
        ("RUST_BACKTRACE", "1".to_owned()),
        ("MESH_TIME_SCALE", TIME_SCALE.to_string()),
        ("MESH_BIN_DIR", suites::RELEASE_FOLDER.to_owned()),
        ("MESH_EBPF_OBJECT", suites::OBJECT.to_owned()),
    ];
    let plan = Plan {
        modules,
        sysctls: owned(SYSCTLS),
        environment: environment
            .map(|(name, value)| (name.to_owned(), value))
            .into(),
        steps: suites.steps.clone(),
    };
    tree.text(
        plan::PLAN_PATH,
        serde_json::to_vec(&plan).context("write the plan")?,
    );

    let initramfs = cache.join(format!("{}.cpio", kernel.release));
    let size = tree.write(&initramfs)?;
    println!("initramfs of {} MiB", size >> 20);
    let limit = plan
        .steps
        .iter()
        .map(|step| step.limit_seconds)
        .sum::<u64>();
    Machine {
        image: &kernel.image,
        initramfs: &initramfs,
        log: &cache.join(format!("{}.log", kernel.release)),
        // A little for init itself; it ends each step in time unless the kernel hangs.
        limit: Duration::from_secs(limit + 30),
    }
    .run()
}

/// For the plan, which owns what it says.
fn owned<T: FromIterator<(String, String)>>(pairs: &[(&str, &str)]) -> T {
    pairs
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

/// Cargo's target folder; this program lies in its `debug/deps`.
fn target() -> Result<PathBuf> {
    let program = env::current_exe().context("find this program")?;
    let target = program.ancestors().nth(3);
    Ok(target.context("find the target folder")?.to_owned())
}
