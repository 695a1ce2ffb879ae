//! What an operator may set: a TOML file, `MESH_COORDINATOR_*`, flags; each overrides the one before.
//!
//! The mesh's domain and address pool are decided by the first start and kept with the mesh, since
//! every node's name and address depends on them. Asking for others later is refused, not ignored.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use ipnet::Ipv4Net;
use mesh_api::Join;
use mesh_api::join::DEFAULT_PORT;
use serde::Deserialize;

pub const DEFAULT_STATE_DIR: &str = "/var/lib/mesh-coordinator";
pub const DEFAULT_SOCKET: &str = "/run/mesh-coordinator/admin.sock";
const DEFAULT_METRICS: &str = "127.0.0.1:41780";
const DEFAULT_DOMAIN: &str = "mesh.internal";
/// How long an ephemeral node may be gone: long enough for a reboot, short for a crashed job.
const EPHEMERAL_GRACE: u64 = 300;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

/// The file, and likewise what stands on the command line; everything may be left out.
#[derive(Debug, Clone, Default, Deserialize, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Where database, key and marker live [default: /var/lib/mesh-coordinator]
    #[arg(long, value_name = "DIR", env = "MESH_COORDINATOR_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
    /// Address that nodes connect to [default: [::]:41700]
    #[arg(long, value_name = "ADDR", env = "MESH_COORDINATOR_LISTEN")]
    pub listen: Option<SocketAddr>,
    /// HOST or HOST:PORT under which nodes reach this coordinator; the first goes into the join
    /// string [default: the address of --listen, unless it is every one]
    #[arg(
        long,
        value_name = "HOST:PORT",
        env = "MESH_COORDINATOR_ADVERTISE",
        value_delimiter = ','
    )]
    #[serde(default)]
    pub advertise: Vec<String>,
    /// Unix socket of the admin API [default: /run/mesh-coordinator/admin.sock]
    #[arg(long, value_name = "PATH", env = "MESH_COORDINATOR_SOCKET")]
    pub socket: Option<PathBuf>,
    /// Group whose members may use the admin API, besides root and the coordinator's own user
    #[arg(long, value_name = "GROUP", env = "MESH_COORDINATOR_ADMIN_GROUP")]
    pub admin_group: Option<String>,
    /// Loopback address of /metrics and /readyz [default: 127.0.0.1:41780]
    #[arg(long, value_name = "ADDR", env = "MESH_COORDINATOR_METRICS")]
    pub metrics: Option<SocketAddr>,
    /// MagicDNS domain of the mesh; fixed by the first start [default: mesh.internal]
    #[arg(long, value_name = "DOMAIN", env = "MESH_COORDINATOR_DOMAIN")]
    pub domain: Option<String>,
    /// IPv4 pool of the mesh; fixed by the first start [default: 100.64.0.0/10]
    #[arg(long, value_name = "CIDR", env = "MESH_COORDINATOR_POOL_V4")]
    pub pool_v4: Option<Ipv4Net>,
    /// Seconds after which an ephemeral node that is gone is deleted [default: 300]
    #[arg(long, value_name = "SECONDS", env = "MESH_COORDINATOR_EPHEMERAL_GRACE")]
    pub ephemeral_grace: Option<u64>,
    /// How log lines are written to standard error [default: text]
    #[arg(long, value_enum, env = "MESH_COORDINATOR_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Which log lines are written: a level, or a filter as of tracing-subscriber [default: info]
    #[arg(long, value_name = "FILTER", env = "MESH_COORDINATOR_LOG")]
    pub log: Option<String>,
}

impl Settings {
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("read the configuration {}", path.display()))?;
        toml::from_str(&text).with_context(|| format!("in {}", path.display()))
    }

    /// `self` where it says something, else `file`.
    #[must_use]
    pub fn over(self, file: Self) -> Self {
        Self {
            state_dir: self.state_dir.or(file.state_dir),
            listen: self.listen.or(file.listen),
            advertise: if self.advertise.is_empty() {
                file.advertise
            } else {
                self.advertise
            },
            socket: self.socket.or(file.socket),
            admin_group: self.admin_group.or(file.admin_group),
            metrics: self.metrics.or(file.metrics),
            domain: self.domain.or(file.domain),
            pool_v4: self.pool_v4.or(file.pool_v4),
            ephemeral_grace: self.ephemeral_grace.or(file.ephemeral_grace),
            log_format: self.log_format.or(file.log_format),
            log: self.log.or(file.log),
        }
    }

    pub fn state_dir(&self) -> PathBuf {
        let dir = self.state_dir.clone();
        dir.unwrap_or_else(|| PathBuf::from(DEFAULT_STATE_DIR))
    }
}

/// What `serve` runs with: nothing left to guess.
#[derive(Debug, Clone)]
pub struct Config {
    pub state_dir: PathBuf,
    pub listen: SocketAddr,
    /// Without pins, which only the key knows. Empty: `listen`, with the port that it got.
    pub advertise: Vec<Join>,
    pub socket: PathBuf,
    pub admin_group: Option<String>,
    pub metrics: SocketAddr,
    pub domain: Option<String>,
    pub pool_v4: Option<Ipv4Net>,
    pub ephemeral_grace: Duration,
}

impl Config {
    pub fn new(settings: Settings) -> anyhow::Result<Self> {
        let state_dir = settings.state_dir();
        let listen = settings.listen.unwrap_or_else(|| {
            SocketAddr::new(std::net::Ipv6Addr::UNSPECIFIED.into(), DEFAULT_PORT)
        });
        let advertise: Vec<Join> = settings
            .advertise
            .iter()
            .map(|text| advertised(text))
            .collect::<anyhow::Result<_>>()?;
        if advertise.is_empty() && listen.ip().is_unspecified() {
            bail!(
                "say under which address nodes reach this coordinator: --advertise HOST:{}",
                listen.port()
            );
        }
        let metrics = match settings.metrics {
            Some(metrics) => metrics,
            None => DEFAULT_METRICS.parse().context("the default address")?,
        };
        if !metrics.ip().is_loopback() {
            bail!(
                "/metrics and /readyz are for this host only: {metrics} is not a loopback address"
            );
        }
        if let Some(domain) = &settings.domain {
            mesh_api::convert::domain(domain)
                .map_err(|_| anyhow::anyhow!("not a DNS domain in lower case: {domain:?}"))?;
        }
        if let Some(pool) = settings.pool_v4 {
            check_pool(pool)?;
        }
        Ok(Self {
            state_dir,
            listen,
            advertise,
            socket: settings
                .socket
                .unwrap_or_else(|| PathBuf::from(DEFAULT_SOCKET)),
            admin_group: settings.admin_group,
            metrics,
            domain: settings.domain,
            pool_v4: settings.pool_v4,
            ephemeral_grace: Duration::from_secs(
                settings.ephemeral_grace.unwrap_or(EPHEMERAL_GRACE),
            ),
        })
    }

    /// The domain of a mesh that is founded now.
    pub fn founding_domain(&self) -> String {
        let domain = self.domain.clone();
        domain.unwrap_or_else(|| DEFAULT_DOMAIN.to_owned())
    }
}

fn advertised(text: &str) -> anyhow::Result<Join> {
    let join: Join = format!("mesh://{text}?pin=sha256:{}", "0".repeat(64))
        .parse()
        .with_context(|| format!("--advertise takes HOST or HOST:PORT, not {text:?}"))?;
    Ok(Join {
        pins: Vec::new(),
        ..join
    })
}

fn check_pool(pool: Ipv4Net) -> anyhow::Result<()> {
    if pool != pool.trunc() {
        bail!(
            "the pool {pool} has host bits set; did you mean {}?",
            pool.trunc()
        );
    }
    if !(8..=29).contains(&pool.prefix_len()) {
        bail!("the pool {pool} is not between a /8 and a /29");
    }
    let first = pool.network();
    if first.is_loopback()
        || first.is_multicast()
        || first.is_link_local()
        || first.octets()[0] == 0
    {
        bail!("the pool {pool} is not made of addresses that hosts may have");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(settings: Settings) -> String {
        format!("{:#}", Config::new(settings).unwrap_err())
    }

    fn listening() -> Settings {
        Settings {
            listen: Some("192.0.2.1:41700".parse().unwrap()),
            ..Settings::default()
        }
    }

    #[test]
    fn flags_win_over_the_file() {
        let file: Settings = toml::from_str(
            "state_dir = '/a'\nlisten = '127.0.0.1:1'\nadvertise = ['a.example:1', 'b']\npool_v4 = '10.9.0.0/16'",
        )
        .unwrap();
        let flags = Settings {
            state_dir: Some("/b".into()),
            ..Settings::default()
        };
        let config = Config::new(flags.over(file)).unwrap();
        assert_eq!(config.state_dir, Path::new("/b"));
        assert_eq!(config.listen.to_string(), "127.0.0.1:1");
        let ports: Vec<_> = config.advertise.iter().map(|join| join.port).collect();
        assert_eq!(ports, [1, DEFAULT_PORT]);
    }

    #[test]
    fn each_mistake_is_named() {
        let check = |settings: Settings, words: &str| {
            let error = refused(settings);
            assert!(error.contains(words), "{error}");
        };
        check(Settings::default(), "--advertise HOST:41700");
        let advertise = vec!["a b".to_owned()];
        check(
            Settings {
                advertise,
                ..listening()
            },
            "HOST:PORT",
        );
        let metrics = Some("0.0.0.0:1".parse().unwrap());
        check(
            Settings {
                metrics,
                ..listening()
            },
            "loopback",
        );
        let domain = Some("Mesh..internal".to_owned());
        check(
            Settings {
                domain,
                ..listening()
            },
            "DNS domain",
        );
        for (pool, words) in [
            ("100.64.0.1/10", "did you mean 100.64.0.0/10"),
            ("10.0.0.0/30", "/29"),
            ("127.0.0.0/8", "hosts may have"),
        ] {
            let pool_v4 = Some(pool.parse().unwrap());
            check(
                Settings {
                    pool_v4,
                    ..listening()
                },
                words,
            );
        }
        assert!(toml::from_str::<Settings>("colour = 1").is_err());
    }
}
