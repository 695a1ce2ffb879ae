//! What a machine must have, and what we put there ourselves.
//!
//! Two kinds of thing are missing on a fresh machine. What only its owner can give (root, a kernel
//! with BPF, a TUN device, room) is checked first and named at once, with the remedy. The rest is
//! installed: Debian packages without their recommendations (wireguard-tools recommends a kernel),
//! and programs of the Rust world at pinned versions.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, bail};
use clap::Parser;

use crate::bpf_toolchain::Toolchain;
use crate::shell;

#[derive(Debug, Parser)]
pub(crate) struct Options {
    /// Also install what only `ci` needs.
    #[arg(long)]
    ci: bool,
}

impl Options {
    pub(crate) fn run(self) -> Result<()> {
        prepare(if self.ci { Purpose::Ci } else { Purpose::Test })
    }
}

/// Each purpose needs what the ones before it need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Purpose {
    BuildEbpf,
    Demo,
    Test,
    Ci,
}

/// Makes the machine fit for a purpose. Quick, and without a word, where nothing is missing.
pub(crate) fn prepare(purpose: Purpose) -> Result<()> {
    let blockers = if purpose >= Purpose::Demo {
        blockers()
    } else {
        Vec::new()
    };
    if !blockers.is_empty() {
        bail!(
            "this machine cannot do it yet:\n  - {}",
            blockers.join("\n  - ")
        );
    }
    let packages = missing_packages(purpose);
    if !packages.is_empty() {
        install_packages(&packages)?;
    }
    for program in PROGRAMS.iter().filter(|p| p.needed_for <= purpose) {
        if !program.present() {
            program.install()?;
        }
    }
    Ok(())
}

/// What only the machine's owner can mend, each with how.
fn blockers() -> Vec<String> {
    let mut found = Vec::new();
    if !is_root() {
        found.push(
            "not root: namespaces, network devices and BPF need it. Run `sudo -E env \"PATH=$PATH\" cargo xtask …`"
                .to_owned(),
        );
    } else if let Some(missing) = missing_capabilities() {
        found.push(format!(
            "root without {missing}: probably a container. Run it with `--privileged`, or on a machine of its own"
        ));
    }
    if !Path::new("/proc/sys/kernel/unprivileged_bpf_disabled").exists() {
        found.push(
            "the kernel has no bpf() system call (CONFIG_BPF_SYSCALL). Boot a distribution kernel, 6.1 or newer"
                .to_owned(),
        );
    } else if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        found.push(
            "the kernel does not describe its types (CONFIG_DEBUG_INFO_BTF; /sys/kernel/btf/vmlinux is missing). Boot a distribution kernel, 6.1 or newer"
                .to_owned(),
        );
    }
    let tun = Path::new("/dev/net/tun");
    if is_root()
        && std::fs::File::options()
            .read(true)
            .write(true)
            .open(tun)
            .is_err()
    {
        found.push(
            "no /dev/net/tun. Run `modprobe tun`; in a container start it with `--device /dev/net/tun`"
                .to_owned(),
        );
    }
    if let Some(free) = free_gib(shell::root())
        && free < NEEDED_GIB
    {
        found.push(format!(
            "{free} GiB free where the checkout lies, {NEEDED_GIB} needed for building. Make room, or set CARGO_TARGET_DIR to where there is some"
        ));
    }
    found
}

pub(crate) fn is_root() -> bool {
    status_field("Uid:").is_some_and(|uids| uids.split_whitespace().nth(1) == Some("0"))
}

/// A line of /proc/self/status.
fn status_field(name: &str) -> Option<String> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().to_owned())
}

fn missing_capabilities() -> Option<String> {
    let effective = u64::from_str_radix(&status_field("CapEff:")?, 16).ok()?;
    // Numbers from capability.h.
    let wanted = [
        (12, "CAP_NET_ADMIN"),
        (21, "CAP_SYS_ADMIN"),
        (39, "CAP_BPF"),
    ];
    let missing: Vec<_> = wanted
        .into_iter()
        .filter(|(bit, _)| effective & (1 << bit) == 0)
        .map(|(_, name)| name)
        .collect();
    (!missing.is_empty()).then(|| missing.join(", "))
}

fn free_gib(path: &Path) -> Option<u64> {
    let output = Command::new("df")
        .args(["--output=avail", "-BG"])
        .arg(path)
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.lines()
        .nth(1)?
        .trim()
        .trim_end_matches('G')
        .parse()
        .ok()
}

/// Debug and release builds of the workspace, the tools' builds, and the kernels of the vm ring.
const NEEDED_GIB: u64 = 10;

struct Package {
    name: &'static str,
    /// A file that the package brings: looking is quicker than asking dpkg.
    file: &'static str,
    needed_for: Purpose,
}

const fn package(name: &'static str, file: &'static str, needed_for: Purpose) -> Package {
    Package {
        name,
        file,
        needed_for,
    }
}

const PACKAGES: &[Package] = &[
    package("iproute2", "/sbin/ip", Purpose::Demo),
    package("util-linux", "/usr/bin/setpriv", Purpose::Demo),
    package("iputils-ping", "/bin/ping", Purpose::Demo),
    package("nftables", "/usr/sbin/nft", Purpose::Test),
    package("wireguard-tools", "/usr/bin/wg", Purpose::Test),
    package("wireguard-go", "/usr/bin/wireguard-go", Purpose::Test),
    package("iperf3", "/usr/bin/iperf3", Purpose::Test),
    package("dnsutils", "/usr/bin/dig", Purpose::Test),
    package(
        "qemu-system-x86",
        "/usr/bin/qemu-system-x86_64",
        Purpose::Test,
    ),
    package("procps", "/usr/bin/pgrep", Purpose::Test),
    package("systemd", "/usr/bin/systemd-analyze", Purpose::Test),
    package("kmod", "/sbin/modprobe", Purpose::Test),
    package("xz-utils", "/usr/bin/xz", Purpose::Test),
    package("zstd", "/usr/bin/zstd", Purpose::Test),
];

/// Debian's own rustc with a ready-made `core` for the BPF target.
const BPF_TOOLCHAIN: [&str; 2] = ["rustc-web", "libstd-rust-web-dev-bpf"];

fn missing_packages(purpose: Purpose) -> Vec<&'static str> {
    let mut missing: Vec<_> = PACKAGES
        .iter()
        .filter(|p| p.needed_for <= purpose && !Path::new(p.file).exists())
        .map(|p| p.name)
        .collect();
    if Toolchain::find().is_none() {
        missing.extend(BPF_TOOLCHAIN);
    }
    missing
}

fn install_packages(names: &[&str]) -> Result<()> {
    let remedy = format!(
        "apt-get install --no-install-recommends {}",
        names.join(" ")
    );
    if !is_root() {
        bail!("missing: {}. As root: `{remedy}`", names.join(", "));
    }
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!(
            "missing: {}. This is not Debian: install them by your distribution's means",
            names.join(", ")
        );
    }
    shell::step(&format!("install {}", names.join(" ")), || {
        shell::run(Command::new("apt-get").args(["update", "-q"]))?;
        shell::run(
            Command::new("apt-get")
                .env("DEBIAN_FRONTEND", "noninteractive")
                // A fresh machine is often busy with its own upgrades.
                .args(["-o", "DPkg::Lock::Timeout=600"])
                .args(["install", "-y", "-q", "--no-install-recommends"])
                .args(names),
        )
    })
}

/// A program of the Rust world, built from source at one version.
struct Program {
    name: &'static str,
    version: &'static str,
    arguments: &'static [&'static str],
    needed_for: Purpose,
}

const PROGRAMS: &[Program] = &[
    // Borrows rustc's own LLVM, so it needs no LLVM packages.
    Program {
        name: "bpf-linker",
        version: "0.10.3",
        arguments: &[],
        needed_for: Purpose::BuildEbpf,
    },
    Program {
        name: "cargo-deny",
        version: "0.20.2",
        arguments: &[],
        needed_for: Purpose::Ci,
    },
];

impl Program {
    fn present(&self) -> bool {
        Command::new(self.name)
            .arg("--version")
            .stderr(Stdio::null())
            .output()
            .is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(self.version))
    }

    fn install(&self) -> Result<()> {
        let name = format!("install {} {} (some minutes)", self.name, self.version);
        shell::step(&name, || {
            shell::run(
                shell::cargo()
                    .args(["install", "--locked", "--force", self.name])
                    .args(["--version", self.version])
                    .args(self.arguments),
            )
        })
    }
}
