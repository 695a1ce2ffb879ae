//! `mesh-vm-init`: PID 1 of the virtual machine; prepares the kernel, runs the plan, powers off.
//!
//! Nothing may outlive its step: what a test forgets would change the next one, so everything but
//! init is killed in between. An init that exits panics the kernel, so every error is reported and
//! ends in a power-off.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Read as _, Write},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use mesh_tests::vm::plan::{self, Plan, Step};
use rustix::{
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    process::{Pid, Signal, WaitOptions, WaitStatus},
    system::RebootCommand,
};

/// The second serial port: the first carries the kernel's own messages.
const REPORT: &str = "/dev/ttyS1";

/// How often a running step is looked at; adds at most this much to each step.
const WAIT_SLICE: Duration = Duration::from_millis(20);

fn main() {
    let outcome = prepare().and_then(|()| {
        let mut report = OpenOptions::new()
            .write(true)
            .open(REPORT)
            .context("open the report line")?;
        let closing = match run(&mut report) {
            Ok(true) => plan::SUCCESS,
            Ok(false) => plan::FAILURE,
            Err(error) => {
                say(&mut report, &format!("{error:#}"))?;
                plan::FAILURE
            }
        };
        writeln!(report, "{closing}").context("write the closing line")?;
        rustix::termios::tcdrain(&report).context("drain the report line")
    });
    if let Err(error) = outcome {
        // The kernel's log is all that is left to write to.
        let _ = fs::write("/dev/kmsg", format!("mesh-vm-init: {error:#}\n"));
    }
    let _ = rustix::system::reboot(RebootCommand::PowerOff);
}

/// Mounts what a booted system has. Shared propagation, as under systemd: `ip netns` counts on it.
fn prepare() -> Result<()> {
    const NOTHING: MountFlags = MountFlags::empty();
    for (kind, at, flags, data) in [
        ("proc", "/proc", NOTHING, c""),
        ("sysfs", "/sys", NOTHING, c""),
        ("devtmpfs", "/dev", NOTHING, c""),
        ("devpts", "/dev/pts", NOTHING, c"gid=5,mode=620"),
        ("tmpfs", "/dev/shm", NOTHING, c"mode=1777"),
        ("tmpfs", "/run", NOTHING, c"mode=755"),
        ("tmpfs", "/tmp", NOTHING, c"mode=1777"),
        ("bpf", "/sys/fs/bpf", NOTHING, c"mode=700"),
        ("cgroup2", "/sys/fs/cgroup", NOTHING, c""),
        ("tracefs", "/sys/kernel/tracing", NOTHING, c""),
    ] {
        if !Path::new(at).exists() {
            fs::create_dir_all(at).with_context(|| format!("make {at}"))?;
        }
        mount(kind, at, kind, flags, data).with_context(|| format!("mount {kind} at {at}"))?;
    }
    mount_change(
        "/",
        MountPropagationFlags::SHARED | MountPropagationFlags::REC,
    )
    .context("share mounts")?;
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
        ("/var/run", "/run"),
    ] {
        if fs::symlink_metadata(link).is_err() {
            std::os::unix::fs::symlink(target, link).with_context(|| format!("link {link}"))?;
        }
    }
    Ok(())
}

/// True when every step passed.
fn run(report: &mut File) -> Result<bool> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("read the release")?;
    say(report, &format!("{}{}", plan::BOOTED, release.trim()))?;
    let text = fs::read(plan::PLAN_PATH).context("read the plan")?;
    let plan: Plan = serde_json::from_slice(&text).context("parse the plan")?;

    rustix::system::sethostname(b"mesh-vm").context("set the host name")?;
    for module in &plan.modules {
        load(module).with_context(|| format!("load {module}"))?;
    }
    for (name, value) in &plan.sysctls {
        fs::write(Path::new("/proc/sys").join(name), value)
            .with_context(|| format!("set {name}"))?;
    }
    // Open to everyone, as udev's rules make it: the rights are needed to make a device.
    fs::set_permissions("/dev/net/tun", Permissions::from_mode(0o666)).context("open up TUN")?;
    let up = Command::new("ip")
        .envs(&plan.environment)
        .args(["link", "set", "lo", "up"])
        .status()
        .context("run ip")?;
    anyhow::ensure!(up.success(), "set lo up: {up}");

    let mut passed = true;
    for step in &plan.steps {
        say(report, &format!("{}{}", plan::BEGIN, step.name))?;
        let start = Instant::now();
        let verdict = match execute(step, &plan, report) {
            Ok(End::Exited(0)) => "ok".to_owned(),
            Ok(End::Exited(code)) => format!("FAIL (exit code {code})"),
            Ok(End::Signaled(signal)) => format!("FAIL (signal {signal})"),
            Ok(End::TimedOut) => format!("FAIL (not done in {} s)", step.limit_seconds),
            Err(error) => format!("FAIL ({error:#})"),
        };
        passed &= verdict == "ok";
        let elapsed = start.elapsed().as_secs_f32();
        say(
            report,
            &format!("{}{} ... {verdict} in {elapsed:.1} s", plan::END, step.name),
        )?;
    }
    Ok(passed)
}

fn say(report: &mut File, line: &str) -> Result<()> {
    writeln!(report, "{}{line}", plan::PREFIX).context("write to the report line")
}

fn load(module: &str) -> Result<()> {
    let file = File::open(module).context("open")?;
    match rustix::system::finit_module(&file, c"", 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error).context("finit_module"),
    }
}

enum End {
    Exited(i32),
    Signaled(i32),
    TimedOut,
}

fn execute(step: &Step, plan: &Plan, report: &File) -> Result<End> {
    let (program, arguments) = step.command.split_first().context("empty command")?;
    let (mut output, sink) = io::pipe().context("make a pipe")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .envs(&plan.environment)
        .envs(&step.environment)
        .current_dir("/tmp")
        .stdin(Stdio::null())
        .stdout(sink.try_clone().context("share the pipe")?)
        .stderr(sink)
        .process_group(0);
    let child = command.spawn().with_context(|| format!("run {program}"))?;
    let child = Pid::from_child(&child);
    // The parent's copies of the pipe's writing end live in `command`.
    drop(command);

    let mut line = report.try_clone().context("share the report line")?;
    let copier = thread::spawn(move || {
        let mut block = [0; 4096];
        while let Ok(length @ 1..) = output.read(&mut block) {
            if line.write_all(&block[..length]).is_err() {
                break;
            }
        }
    });
    let end = wait(child, Duration::from_secs(step.limit_seconds))?;
    // Signals everything but this process: what the step left behind goes with it.
    kill_the_rest()?;
    copier.join().ok();
    Ok(end)
}

/// Waits for `child` and reaps every orphan on the way, as PID 1 must.
fn wait(child: Pid, limit: Duration) -> Result<End> {
    let deadline = Instant::now() + limit;
    loop {
        match reap()? {
            Some((pid, status)) if pid == child => {
                return Ok(match status.exit_status() {
                    Some(code) => End::Exited(code),
                    None => End::Signaled(status.terminating_signal().unwrap_or_default()),
                });
            }
            Some(_) => {}
            None if Instant::now() >= deadline => return Ok(End::TimedOut),
            None => thread::sleep(WAIT_SLICE),
        }
    }
}

fn reap() -> Result<Option<(Pid, WaitStatus)>> {
    match rustix::process::wait(WaitOptions::NOHANG) {
        Ok(found) => Ok(found),
        Err(rustix::io::Errno::CHILD) => Ok(None),
        Err(error) => Err(error).context("wait"),
    }
}

fn kill_the_rest() -> Result<()> {
    loop {
        match rustix::process::kill_process_group(Pid::INIT, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => return Err(error).context("kill what the step left"),
        }
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(_) => thread::sleep(WAIT_SLICE),
            Err(rustix::io::Errno::CHILD) => return Ok(()),
            Err(error) => return Err(error).context("reap what the step left"),
        }
    }
}
