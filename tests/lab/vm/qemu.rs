//! One boot of the virtual machine: two serial lines out, no network, a hard end.
//!
//! Pure emulation, so that it runs wherever the tests run. Under it an early boot panics or hangs
//! once in a while (a timer of one virtual processor fires before the other is ready), so until
//! init reports, a failure is the emulator's and the boot is tried again; afterwards it is ours.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::{plan, run::tool};

const BOOTS: usize = 3;

/// A boot takes three seconds on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(60);

/// So many lines of the kernel's log are shown when a run failed.
const LOG_TAIL: usize = 40;

#[derive(Debug)]
pub(super) struct Machine<'a> {
    pub(super) clock: Clock,
    pub(super) image: &'a Path,
    pub(super) initramfs: &'a Path,
    /// Where the kernel's own messages go.
    pub(super) log: &'a Path,
    /// For everything after the boot.
    pub(super) limit: Duration,
}

/// What time it is in the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Clock {
    /// The host's; each of two processors is a thread of its.
    Host,
    /// One processor's, two nanoseconds for each instruction: as fast on a busy host as on a quiet one.
    Instructions,
}

impl Clock {
    fn arguments(self) -> &'static str {
        match self {
            // Without the features that make the kernel copy byte by byte with one instruction: processors are quick
            // at that, and an emulation is not.
            Self::Host => "-accel tcg,thread=multi -smp 2 -cpu max,erms=off,fsrm=off",
            // Where nothing is left to do, the clock jumps to the next timer.
            Self::Instructions => {
                "-accel tcg,thread=single -smp 1 -icount shift=1,sleep=off -cpu max"
            }
        }
    }
}

impl Machine<'_> {
    /// Boots and passes on every line that the steps print; true when all is well.
    pub(super) fn run(&self, hear: &mut dyn FnMut(&str)) -> Result<bool> {
        for boot in 1..=BOOTS {
            match self.boot(hear)? {
                Ending::Success => return Ok(true),
                Ending::Failure => {
                    self.show_log();
                    return Ok(false);
                }
                Ending::NoBoot => {
                    self.show_log();
                    println!("boot {boot} of {BOOTS} did not reach init");
                }
            }
        }
        bail!("the virtual machine does not boot");
    }

    fn boot(&self, hear: &mut dyn FnMut(&str)) -> Result<Ending> {
        // setpriv lets the machine die with us, however we die.
        let mut child = tool("setpriv")
            .args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
            .args(self.clock.arguments().split(' '))
            .args(["-m", "2G", "-nic", "none", "-no-reboot"])
            .args(["-nodefaults", "-display", "none", "-monitor", "none"])
            .arg("-serial")
            .arg(format!("file:{}", self.log.display()))
            .args(["-serial", "stdio"])
            .arg("-kernel")
            .arg(self.image)
            .arg("-initrd")
            .arg(self.initramfs)
            // Mitigations only slow an emulation down. The timer is not checked because the check
            // fails on a busy host. A panic ends the machine at once.
            .args([
                "-append",
                "console=ttyS0 panic=-1 mitigations=off no_timer_check rdinit=/init",
            ])
            .stdout(Stdio::piped())
            .spawn()
            .context("run qemu-system-x86_64: `cargo xtask setup` installs it")?;
        let lines = lines(&mut child)?;
        let ending = self.follow(&lines, hear);
        // It powers off by itself after the closing line; there is nothing more to hear.
        child.kill().ok();
        child.wait().context("wait for qemu")?;
        Ok(ending)
    }

    fn follow(&self, lines: &Receiver<String>, hear: &mut dyn FnMut(&str)) -> Ending {
        let mut booted = false;
        let mut deadline = Instant::now() + BOOT_LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = match lines.recv_timeout(left) {
                Ok(line) => line,
                Err(_) if !booted => return Ending::NoBoot,
                Err(RecvTimeoutError::Timeout) => {
                    println!("the virtual machine was not done in {:?}", self.limit);
                    return Ending::Failure;
                }
                Err(RecvTimeoutError::Disconnected) => {
                    println!("the virtual machine ended without a result");
                    return Ending::Failure;
                }
            };
            hear(&line);
            match line.as_str() {
                plan::SUCCESS => return Ending::Success,
                plan::FAILURE => return Ending::Failure,
                _ => {}
            }
            let word = line.strip_prefix(plan::PREFIX);
            if !booted && word.is_some_and(|word| word.starts_with(plan::BOOTED)) {
                booted = true;
                deadline = Instant::now() + self.limit;
            }
        }
    }

    fn show_log(&self) {
        let log = fs::read(self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let mut lines: Vec<&str> = log.lines().collect();
        // What came before is of interest only when init was not reached.
        if let Some(start) = lines.iter().rposition(|line| line.contains("Run /init")) {
            lines.drain(..=start);
        }
        println!("the end of the kernel's log, {}:", self.log.display());
        for line in &lines[lines.len().saturating_sub(LOG_TAIL)..] {
            println!("    {line}");
        }
    }
}

enum Ending {
    Success,
    Failure,
    NoBoot,
}

/// Lines of the report, without the carriage returns that a serial line adds.
fn lines(child: &mut Child) -> Result<Receiver<String>> {
    let stdout = child.stdout.take().context("qemu's output is piped")?;
    // Bounded: the reader waits when the printer does.
    let (sender, receiver) = mpsc::sync_channel(1024);
    thread::spawn(move || {
        let mut reader = BufReader::new(stdout);
        let mut line = Vec::new();
        while let Ok(1..) = reader.read_until(b'\n', &mut line) {
            let text = String::from_utf8_lossy(&line);
            let text = text.trim_end_matches(['\r', '\n']).to_owned();
            if sender.send(text).is_err() {
                break;
            }
            line.clear();
        }
    });
    Ok(receiver)
}
