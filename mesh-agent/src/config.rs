//! Settings of the daemon: a file, then the environment, then flags; the later wins.
//!
//! Everything has a default that fits a packaged install, so an empty file is a good file. A name
//! that is not known is an error, not a wish: a misspelt setting must not be silently ignored.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::ValueEnum;
use serde::Deserialize;

/// Which WireGuard does the work.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum BackendChoice {
    /// The kernel's where the kernel has it, else our own.
    #[default]
    Auto,
    Kernel,
    Userspace,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// The command line of `mesh-agent`; every flag has an environment variable and a name in the file.
#[derive(clap::Parser, Clone, Debug, Default)]
#[command(
    name = "mesh-agent",
    version,
    about = "The node daemon of the mesh. `mesh` is the command that talks to it.",
    after_help = "Exit codes: 0 stopped as asked, 1 could not start or had to stop, 2 wrong usage."
)]
pub struct Args {
    /// Settings in TOML, named like the flags with `_` for `-`.
    #[arg(long, env = "MESH_AGENT_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
}

/// One layer of settings: what is absent is left to the layer below.
#[derive(clap::Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Keys and the last netmap [default: /var/lib/mesh-agent]
    #[arg(long, env = "MESH_AGENT_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Folder of what lives while the agent runs [default: /run/mesh-agent]
    #[arg(long, env = "MESH_AGENT_RUN_DIR", value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Where `mesh` finds the agent [default: agent.sock in the run folder]
    #[arg(long, env = "MESH_AGENT_SOCKET", value_name = "FILE")]
    pub socket: Option<PathBuf>,
    /// Group whose members may use `mesh`, where this host has it [default: mesh]
    #[arg(long, env = "MESH_AGENT_SOCKET_GROUP", value_name = "GROUP")]
    pub socket_group: Option<String>,
    /// Name of the mesh's network interface [default: mesh0]
    #[arg(long, env = "MESH_AGENT_INTERFACE", value_name = "NAME")]
    pub interface: Option<String>,
    /// Which WireGuard to use [default: auto]
    #[arg(long, env = "MESH_AGENT_BACKEND", value_enum)]
    pub backend: Option<BackendChoice>,
    /// WireGuard's UDP port; 0 chooses one and remembers it [default: 0]
    #[arg(long, env = "MESH_AGENT_LISTEN_PORT", value_name = "PORT")]
    pub listen_port: Option<u16>,
    /// Folder on bpffs where programs and maps stay while the agent restarts
    /// [default: /sys/fs/bpf/mesh-agent]
    #[arg(long, env = "MESH_AGENT_PIN_DIR", value_name = "DIR")]
    pub pin_dir: Option<PathBuf>,
    /// Loads this eBPF object instead of the one that was built in
    #[arg(long, env = "MESH_AGENT_EBPF_OBJECT", value_name = "FILE")]
    pub ebpf_object: Option<PathBuf>,
    /// Answer names of the mesh and point this machine's resolver here [default: true]
    #[arg(long, env = "MESH_AGENT_DNS", value_name = "BOOL")]
    pub dns: Option<bool>,
    /// Socket of the root helper that sets the machine's resolver
    /// [default: /run/mesh-dns-helper.sock]
    #[arg(long, env = "MESH_AGENT_DNS_HELPER", value_name = "FILE")]
    pub dns_helper: Option<PathBuf>,
    /// Serves /metrics and /readyz on this loopback address; absent: not at all
    #[arg(long, env = "MESH_AGENT_METRICS", value_name = "ADDR:PORT")]
    pub metrics: Option<SocketAddr>,
    /// Writes the flow log to this file as JSON lines; absent: only `mesh flows` shows it
    #[arg(long, env = "MESH_AGENT_FLOW_LOG", value_name = "FILE")]
    pub flow_log: Option<PathBuf>,
    /// text or json [default: text]
    #[arg(long, env = "MESH_AGENT_LOG_FORMAT", value_enum)]
    pub log_format: Option<LogFormat>,
    /// Level or filter, as `info` or `mesh_agent=debug` [default: info]
    #[arg(long, env = "MESH_AGENT_LOG", value_name = "FILTER")]
    pub log: Option<String>,
    /// The name this node asks for when it enrolls [default: the host name]
    #[arg(long, env = "MESH_AGENT_NAME", value_name = "NAME")]
    pub name: Option<String>,
}

/// The settings in force.
#[derive(Clone, Debug)]
pub struct Config {
    pub state_dir: PathBuf,
    pub run_dir: PathBuf,
    pub socket: PathBuf,
    pub socket_group: String,
    pub interface: String,
    pub backend: BackendChoice,
    pub listen_port: u16,
    pub pin_dir: PathBuf,
    pub ebpf_object: Option<PathBuf>,
    pub dns: bool,
    pub dns_helper: PathBuf,
    pub metrics: Option<SocketAddr>,
    pub flow_log: Option<PathBuf>,
    pub log_format: LogFormat,
    pub log: String,
    pub name: Option<String>,
}

impl Config {
    pub fn load(args: Args) -> anyhow::Result<Self> {
        let file = match &args.config {
            Some(path) => read(path)?,
            None => Settings::default(),
        };
        Self::resolve(args.settings, file)
    }

    fn resolve(flags: Settings, file: Settings) -> anyhow::Result<Self> {
        let run_dir = flags
            .run_dir
            .or(file.run_dir)
            .unwrap_or_else(|| "/run/mesh-agent".into());
        let config = Self {
            state_dir: flags
                .state_dir
                .or(file.state_dir)
                .unwrap_or_else(|| "/var/lib/mesh-agent".into()),
            socket: flags
                .socket
                .or(file.socket)
                .unwrap_or_else(|| run_dir.join("agent.sock")),
            run_dir,
            socket_group: flags
                .socket_group
                .or(file.socket_group)
                .unwrap_or_else(|| "mesh".to_owned()),
            interface: flags
                .interface
                .or(file.interface)
                .unwrap_or_else(|| "mesh0".to_owned()),
            backend: flags.backend.or(file.backend).unwrap_or_default(),
            listen_port: flags.listen_port.or(file.listen_port).unwrap_or(0),
            pin_dir: flags
                .pin_dir
                .or(file.pin_dir)
                .unwrap_or_else(|| "/sys/fs/bpf/mesh-agent".into()),
            ebpf_object: flags.ebpf_object.or(file.ebpf_object),
            dns: flags.dns.or(file.dns).unwrap_or(true),
            dns_helper: flags
                .dns_helper
                .or(file.dns_helper)
                .unwrap_or_else(|| "/run/mesh-dns-helper.sock".into()),
            metrics: flags.metrics.or(file.metrics),
            flow_log: flags.flow_log.or(file.flow_log),
            log_format: flags.log_format.or(file.log_format).unwrap_or_default(),
            log: flags.log.or(file.log).unwrap_or_else(|| "info".to_owned()),
            name: flags.name.or(file.name),
        };
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> anyhow::Result<()> {
        // IFNAMSIZ of linux/if.h leaves 15 bytes; the name also becomes part of paths in /proc.
        let name = &self.interface;
        let fits = (1..=15).contains(&name.len())
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
            && !name.starts_with('.');
        anyhow::ensure!(
            fits,
            "interface {name:?}: 1 to 15 letters, digits, '-', '_' and '.'"
        );
        if let Some(address) = self.metrics {
            anyhow::ensure!(
                address.ip().is_loopback(),
                "metrics {address}: only a loopback address, anybody may read them there"
            );
        }
        Ok(())
    }
}

fn read(path: &Path) -> anyhow::Result<Settings> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("read the settings of {}", path.display()))?;
    toml::from_str(&text).with_context(|| format!("parse the settings of {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> anyhow::Result<Config> {
        Config::resolve(Settings::default(), toml::from_str(text)?)
    }

    #[test]
    fn an_empty_file_is_a_good_file() {
        let config = parse("").unwrap();
        assert_eq!(config.interface, "mesh0");
        assert_eq!(config.socket, Path::new("/run/mesh-agent/agent.sock"));
        assert!(config.dns);
    }

    #[test]
    fn flags_win_over_the_file() {
        let flags = Settings {
            listen_port: Some(7),
            ..Settings::default()
        };
        let file: Settings = toml::from_str("listen_port = 8\nbackend = \"userspace\"").unwrap();
        let config = Config::resolve(flags, file).unwrap();
        assert_eq!(config.listen_port, 7);
        assert_eq!(config.backend, BackendChoice::Userspace);
    }

    #[test]
    fn mistakes_are_told_and_never_taken() {
        for bad in [
            "lisen_port = 8",
            "listen_port = 70000",
            "backend = \"magic\"",
            "interface = \"../../etc\"",
            "interface = \"a-name-of-sixteen\"",
            "interface = \"\"",
            "metrics = \"0.0.0.0:9100\"",
            "state_dir = 7",
            "\u{0}",
            "= =",
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
