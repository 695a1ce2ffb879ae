//! The root helper: it may write resolv.conf, so that the agent need not.
//!
//! Whoever it serves is somebody else's process, so the user is checked by the kernel's word
//! (SO_PEERCRED), a request is one short line ([`protocol`]), and the answer to anything else is a
//! sentence and a closed connection. One agent at a time; when its connection ends, however it
//! ends, the host gets its resolver back.
#![expect(
    clippy::print_stderr,
    reason = "a program this small logs one line at a time to the journal"
)]

use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::Parser;
use mesh_agent::dns::host::Host;
use mesh_agent::dns::protocol::{self, MAX_LINE, Mode, Request};
use rustix::net::sockopt;

/// Points the host's resolver at the mesh's, and puts it back.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// Listen here. Without it, standard input is the listening socket, as systemd passes it with
    /// `StandardInput=socket`.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,

    /// The user, by name or number, that may ask. Root always may.
    #[arg(long, value_name = "USER", default_value = "mesh-agent")]
    user: String,

    /// Put back what an earlier run left behind, and exit.
    #[arg(long)]
    restore: bool,

    #[arg(long, value_name = "PATH", default_value = "/etc/resolv.conf")]
    resolv_conf: PathBuf,

    /// Where to remember what to put back. It must outlive a reboot, as resolv.conf does.
    #[arg(
        long,
        value_name = "FOLDER",
        default_value = "/var/lib/mesh-dns-helper"
    )]
    state: PathBuf,
}

fn main() -> ExitCode {
    match serve(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-dns-helper: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(options: &Options) -> anyhow::Result<()> {
    let host = Host::new(&options.resolv_conf, &options.state);
    // Nobody is connected yet, so whatever stands is a dead helper's.
    host.restore().context("restore the resolver")?;
    if options.restore {
        return Ok(());
    }
    let allowed = user_id(&options.user)?;
    let (listener, activated) = listen(options.socket.as_deref(), allowed)?;
    loop {
        let (stream, _) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("accept a connection"),
        };
        if let Err(error) = converse(&stream, allowed, &host) {
            eprintln!("mesh-dns-helper: {error:#}");
            // May fail, since the other side may be gone.
            let _ = writeln!(&stream, "error {}", one_line(&format!("{error:#}")));
        }
        drop(stream);
        if host.status()?.mode != Mode::None {
            host.restore().context("restore the resolver")?;
        }
        if activated {
            // systemd starts us again for the next agent.
            return Ok(());
        }
    }
}

fn listen(path: Option<&Path>, user: u32) -> anyhow::Result<(UnixListener, bool)> {
    let Some(path) = path else {
        let socket = io::stdin().lock();
        let socket = rustix::io::fcntl_dupfd_cloexec(&socket, 3).context("take the socket")?;
        let listening = sockopt::socket_acceptconn(&socket).unwrap_or(false);
        if !listening {
            bail!(
                "standard input is no listening socket: give --socket PATH, or start the unit mesh-dns-helper.socket"
            );
        }
        return Ok((UnixListener::from(socket), true));
    };
    // A socket that an earlier run left; anything else at this path is not ours to remove.
    if fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket()) {
        fs::remove_file(path).with_context(|| format!("remove {}", path.display()))?;
    }
    let context = || format!("listen on {}", path.display());
    let listener = UnixListener::bind(path).with_context(context)?;
    // As the socket unit has it: nobody else can even connect.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).with_context(context)?;
    chown(path, Some(user), None).with_context(context)?;
    Ok((listener, false))
}

/// Answers one agent until it goes away.
fn converse(stream: &UnixStream, allowed: u32, host: &Host) -> anyhow::Result<()> {
    let peer = sockopt::socket_peercred(stream).context("ask who is there")?;
    let user = peer.uid.as_raw();
    if user != allowed && user != 0 {
        bail!("user {user} may not change the resolver");
    }
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        let mut limited = reader.by_ref().take(MAX_LINE as u64);
        limited
            .read_until(b'\n', &mut line)
            .context("read a request")?;
        if line.is_empty() {
            return Ok(());
        }
        // Without its end, a line is too long or was cut off.
        let line = line.strip_suffix(b"\n").ok_or(protocol::Refused::Line)?;
        let report = match Request::parse(line)? {
            Request::Set(setting) => host.set(&setting),
            Request::Restore => host.restore(),
            Request::Status => host.status(),
        };
        let answer = match report {
            Ok(report) => report.to_string(),
            Err(error) => {
                eprintln!("mesh-dns-helper: {error:#}");
                format!("error {}", one_line(&format!("{error:#}")))
            }
        };
        // In one piece, for readers that take what comes for a line.
        let answer = format!("{answer}\n");
        (&*stream).write_all(answer.as_bytes()).context("answer")?;
    }
}

fn one_line(words: &str) -> String {
    let plain = words.chars().map(|c| if c.is_control() { ' ' } else { c });
    plain.take(MAX_LINE / 4).collect()
}

/// Numbers are themselves; names are looked up where system users stand. No other user database
/// is asked, since root is to load no code for it.
fn user_id(user: &str) -> anyhow::Result<u32> {
    if let Ok(number) = user.parse() {
        return Ok(number);
    }
    let table = fs::read_to_string("/etc/passwd").context("read /etc/passwd")?;
    let mut rows = table
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>());
    let row = rows.find(|row| row.first() == Some(&user));
    row.and_then(|row| row.get(2)?.parse().ok())
        .with_context(|| format!("there is no user {user:?} on this host"))
}
