//! What a laboratory puts into the machine, by name: removed at its end, or later by another one.
//!
//! Every name begins with `mesh-lab-PID-`, so what belongs to a process that no longer lives
//! belongs to nobody. Processes are ended by their ids, found by the namespace that they are in.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Once;

use rustix::process::{Pid, Signal, kill_process};

const PREFIX: &str = "mesh-lab-";
const NAMESPACES: &str = "/run/netns";

/// The beginning of all names of this process's laboratories.
pub(crate) fn own_prefix() -> String {
    format!("{PREFIX}{}-", std::process::id())
}

/// Removes what laboratories of dead processes left, and sees to it that an interrupt of this one
/// leaves nothing.
pub(crate) fn prepare() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for name in names() {
            if owner(&name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                remove(&name);
            }
        }
        clean_up_when_interrupted();
    });
}

/// Removes everything whose name begins so.
pub(crate) fn sweep(prefix: &str) {
    for name in names().into_iter().filter(|name| name.starts_with(prefix)) {
        remove(&name);
    }
}

/// Names of all laboratories' namespaces and folders.
fn names() -> Vec<String> {
    [PathBuf::from(NAMESPACES), std::env::temp_dir()]
        .iter()
        .filter_map(|folder| fs::read_dir(folder).ok())
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(PREFIX))
        .collect()
}

fn owner(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()
}

/// Errors are passed over: whoever sweeps wants the rest swept too.
fn remove(name: &str) {
    if Path::new(NAMESPACES).join(name).exists() {
        for pid in inhabitants(name) {
            let _ = kill_process(pid, Signal::KILL);
        }
        let _ = Command::new("ip")
            .args(["netns", "delete", name])
            .stderr(Stdio::null())
            .status();
    }
    let _ = fs::remove_dir_all(std::env::temp_dir().join(name));
}

fn inhabitants(namespace: &str) -> Vec<Pid> {
    let Ok(output) = Command::new("ip")
        .args(["netns", "pids", namespace])
        .stderr(Stdio::null())
        .output()
    else {
        return Vec::new();
    };
    let own = std::process::id();
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.trim().parse::<i32>().ok())
        .filter(|pid| u32::try_from(*pid) != Ok(own))
        .filter_map(Pid::from_raw)
        .collect()
}

fn clean_up_when_interrupted() {
    let watch = || -> std::io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()?;
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let mut interrupt = signal(SignalKind::interrupt())?;
            let mut terminate = signal(SignalKind::terminate())?;
            let mut hangup = signal(SignalKind::hangup())?;
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
            Ok(())
        })
    };
    // A thread of its own: whatever the laboratory's threads wait for, this one is free.
    std::thread::spawn(move || {
        if watch().is_ok() {
            sweep(&own_prefix());
            // 128 + SIGINT, as shells have it.
            std::process::exit(130);
        }
    });
}
