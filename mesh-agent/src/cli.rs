//! `mesh`, the user's command: a pure client of the agent's local API.
//!
//! It decides nothing. What it must get right is what a person sees: an error says what to do next,
//! text that came from other machines cannot drive the terminal, and a closed pipe is no crash.
//!
//! Exit codes: 0 done; 1 the agent refused or failed; 2 wrong usage; 3 the agent cannot be reached;
//! 4 not allowed; 5 not in time (no answer to a ping, not yet up).
#![expect(
    clippy::print_stderr,
    reason = "a command's errors go to its standard error"
)]

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::PossibleValuesParser;
use clap::{Parser, Subcommand};
use ipnet::IpNet;
use mesh_core::flow::{Place, Verdict};

mod client;
mod flows;
mod ping;
mod policy;
pub mod render;
mod top;
mod verbs;
mod why;

/// Where a packaged agent listens.
const SOCKET: &str = "/run/mesh-agent/agent.sock";

#[derive(Parser, Debug)]
#[command(
    name = "mesh",
    version,
    about = "Talks to this machine's mesh agent.",
    after_help = "Exit codes: 0 done; 1 the agent refused or failed; 2 wrong usage; 3 the agent cannot be reached; 4 not allowed; 5 not in time."
)]
struct Args {
    /// The agent's socket
    #[arg(long, global = true, env = "MESH_SOCKET", default_value = SOCKET, value_name = "FILE")]
    socket: PathBuf,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand, Debug)]
enum Verb {
    /// Connect this machine to its mesh; the first time with --join and --auth-key
    Up(Up),
    /// Leave the mesh's network; `mesh up` brings it back
    Down {
        /// Also stop being a node: the coordinator forgets this machine
        #[arg(long)]
        logout: bool,
    },
    /// This node, its peers, and what is wrong
    Status,
    /// Send an echo through the mesh and say which path it took
    Ping(Ping),
    /// Who has this address or name
    Whois {
        /// A mesh address, or a node's name
        address: String,
    },
    /// What the packet filter passed and dropped, and why; and what each rule decided: flows that it
    /// admitted, packets that it refused
    Counters,
    /// Who may open what, and which rule says so
    Policy {
        #[command(subcommand)]
        verb: policy::Verb,
    },
    /// What became of flows and of denied packets, as the packet filter saw it
    Flows(Flows),
    /// What the packet filter would do with a new flow now, beside what the policy says; ends with 1
    /// if the two differ
    Why(Why),
    /// Which peers, rules and drop reasons are busiest
    Top(Top),
    /// The versions of this command and of the agent
    Version,
    /// For those who look for a fault
    Debug {
        #[command(subcommand)]
        verb: DebugVerb,
    },
}

#[derive(clap::Args, Debug)]
struct Up {
    /// The coordinator's join string, as `mesh-coordinator status` prints it
    #[arg(long, value_name = "mesh://HOST:PORT?pin=…", default_value = "")]
    join: String,
    /// A pre-auth key; `-` reads it from standard input
    #[arg(
        long,
        env = "MESH_AUTH_KEY",
        hide_env_values = true,
        value_name = "KEY",
        default_value = ""
    )]
    auth_key: String,
    /// The name to ask for [default: the agent's setting, else the host name]
    #[arg(long, value_name = "NAME", default_value = "")]
    name: String,
    /// Prefixes that this node offers to route for others, once an admin approves
    #[arg(long, value_name = "PREFIX,…", value_delimiter = ',')]
    advertise_routes: Vec<IpNet>,
}

#[derive(clap::Args, Debug)]
struct Ping {
    /// A node's name or one of its mesh addresses
    target: String,
    /// How many echoes to send
    #[arg(short, long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    count: u32,
    /// Over IPv6, when a name is given
    #[arg(short = '6', long)]
    v6: bool,
    /// Milliseconds to wait for each answer
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..=30_000))]
    timeout: u32,
}

#[derive(clap::Args, Debug)]
struct Flows {
    /// Go on with what comes
    #[arg(short, long)]
    follow: bool,
    /// Only flows with this node, tag, user or address at either end
    #[arg(long, value_name = "WHO")]
    peer: Option<String>,
    /// Only flows that the rule on this line of the policy decided: 12, or policy.hujson:12
    #[arg(long, value_name = "LINE", value_parser = flows::rule)]
    rule: Option<Place>,
    /// Only `allowed` or `denied` flows, or those dropped for one reason
    #[arg(long, value_parser = PossibleValuesParser::new(Verdict::words()), ignore_case = true, hide_possible_values = true)]
    verdict: Option<String>,
    /// Only flows to this port
    #[arg(long)]
    port: Option<u16>,
    /// Only flows of this protocol, by name or number; icmp stands for that of IPv6 too
    #[arg(long)]
    proto: Option<String>,
}

#[derive(clap::Args, Debug)]
struct Why {
    /// Who opens the flow: a node's name or an address
    source: String,
    /// To what, as node:22/tcp
    #[arg(value_name = "DST:PORT/PROTO")]
    destination: String,
}

#[derive(clap::Args, Debug)]
struct Top {
    /// Seconds between two looks
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    /// Stop after so many looks; 0: on Ctrl-C [default: 0, and 1 with --json]
    #[arg(long)]
    count: Option<u32>,
}

#[derive(Subcommand, Debug)]
enum DebugVerb {
    /// How full the packet filter's maps are
    Maps,
    /// Print what the agent thinks, as JSON without secrets, to send along with a report
    Bundle,
}

/// What went wrong, and with which exit code to say so.
#[derive(Debug)]
struct Failed {
    code: u8,
    text: String,
}

impl Failed {
    const REFUSED: u8 = 1;
    const USAGE: u8 = 2;
    const UNREACHABLE: u8 = 3;
    const NOT_ALLOWED: u8 = 4;
    const NOT_IN_TIME: u8 = 5;

    fn new(code: u8, text: impl Into<String>) -> Self {
        Self {
            code,
            text: text.into(),
        }
    }
}

impl From<tonic::Status> for Failed {
    fn from(status: tonic::Status) -> Self {
        // What no agent has said comes from the connection to it.
        let is_lost = std::error::Error::source(&status).is_some();
        let code = match status.code() {
            _ if is_lost => Self::UNREACHABLE,
            tonic::Code::InvalidArgument => Self::USAGE,
            tonic::Code::PermissionDenied => Self::NOT_ALLOWED,
            tonic::Code::DeadlineExceeded | tonic::Code::Cancelled => Self::NOT_IN_TIME,
            _ => Self::REFUSED,
        };
        let text = match status.message() {
            "" => format!("the agent answered {:?}", status.code()),
            message => safe(message),
        };
        Self { code, text }
    }
}

/// The whole of `mesh`.
pub fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return fail(&Failed::new(Failed::REFUSED, error.to_string())),
    };
    match runtime.block_on(verbs::run(args)) {
        Ok(code) => code,
        Err(failed) => fail(&failed),
    }
}

fn fail(failed: &Failed) -> ExitCode {
    eprintln!("mesh: {}", failed.text);
    ExitCode::from(failed.code)
}

/// Prints a line; a reader that has gone away (`| head -1`) ends the command quietly.
fn say(line: &str) -> Result<(), Failed> {
    let mut out = io::stdout().lock();
    match writeln!(out, "{line}").and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => Err(Failed::new(
            Failed::REFUSED,
            format!("write to standard output: {error}"),
        )),
    }
}

/// Text from elsewhere, made harmless for a terminal: control characters are escaped.
pub fn safe(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let escaped = c.is_control().then(|| c.escape_default());
            let plain = (!c.is_control()).then_some(c);
            escaped.into_iter().flatten().chain(plain)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Args::command().debug_assert();
    }

    #[test]
    fn text_from_elsewhere_cannot_drive_the_terminal() {
        assert_eq!(safe("a\u{1b}[31mb\r\n"), "a\\u{1b}[31mb\\r\\n");
        assert_eq!(safe("grün"), "grün");
    }
}
