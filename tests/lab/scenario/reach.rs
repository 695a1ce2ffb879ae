//! Who reaches whom under the example policy.
//!
//! ```text
//!   operator ──22──► node ◄──443── developer        developer ──443──► operator
//!      └──22──► sandbox ──443──► node               everything else is dropped
//! ```
//! The table is written down here, not computed: it is what the example policy says to a reader.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::mesh::{Family, Mesh, ROLES};
use crate::probe::{Echo, Kind, Probe, ask_all};
use crate::scaled;

use super::Check;

/// Everything that is asked of each pair.
pub const KINDS: [Kind; 4] = [Kind::Icmp, Kind::Tcp(22), Kind::Tcp(443), Kind::Udp(9000)];

/// What the example policy opens, by TCP.
const OPEN: [(&str, &str, u16); 5] = [
    ("operator", "node", 22),
    ("operator", "sandbox", 22),
    ("developer", "node", 443),
    ("developer", "operator", 443),
    ("sandbox", "node", 443),
];

/// A rule joins these two, in this direction: then echo requests pass too.
pub fn is_joined(from: &str, to: &str) -> bool {
    OPEN.iter().any(|(a, b, _)| (*a, *b) == (from, to))
}

pub fn is_open(from: &str, to: &str, kind: Kind) -> bool {
    match kind {
        Kind::Icmp => is_joined(from, to),
        Kind::Tcp(port) => OPEN.contains(&(from, to, port)),
        Kind::Udp(_) => false,
    }
}

/// A question about two nodes, and its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cell<'a> {
    pub from: &'a str,
    pub to: &'a str,
    pub family: Family,
    pub kind: Kind,
    pub reached: bool,
}

/// Asks everything of every pair, all at once.
pub fn measure<'a>(mesh: &'a Mesh, kinds: &[Kind], limit: Duration) -> Result<Vec<Cell<'a>>> {
    let _echoes = mesh
        .nodes
        .iter()
        .map(|node| Echo::start(&node.host, kinds))
        .collect::<Result<Vec<_>>>()?;
    let mut cells = Vec::new();
    let mut probes = Vec::new();
    for to in &mesh.nodes {
        let addresses: [(Family, IpAddr); 2] = [
            (Family::V4, to.address(Family::V4)?),
            (Family::V6, to.address(Family::V6)?),
        ];
        for from in mesh.nodes.iter().filter(|from| from.name() != to.name()) {
            for (family, address) in addresses {
                for kind in kinds {
                    cells.push(Cell {
                        from: from.name(),
                        to: to.name(),
                        family,
                        kind: *kind,
                        reached: false,
                    });
                    probes.push(Probe {
                        from: &from.host,
                        to: address,
                        kind: *kind,
                    });
                }
            }
        }
    }
    for (cell, answer) in cells.iter_mut().zip(ask_all(&probes, limit)?) {
        cell.reached = answer.is_some();
    }
    Ok(cells)
}

/// Fails with every cell that is not as expected.
pub fn compare(cells: &[Cell<'_>], open: impl Fn(&Cell<'_>) -> bool) -> Result<()> {
    let wrong: Vec<_> = cells
        .iter()
        .filter(|cell| cell.reached != open(cell))
        .map(|cell| {
            format!(
                "{} {} {} over {} {:?}",
                cell.from,
                if cell.reached {
                    "reaches"
                } else {
                    "does not reach"
                },
                cell.to,
                cell.kind,
                cell.family,
            )
        })
        .collect();
    if !wrong.is_empty() {
        bail!("{}", wrong.join("; "));
    }
    Ok(())
}

/// For a first handshake and a lost packet or two.
pub const LIMIT: Duration = Duration::from_secs(2);

/// No answer within this is no answer, once a session stands.
pub const SILENCE: Duration = Duration::from_secs(1);

pub fn run(mesh: &Mesh, check: &mut Check) -> Result<()> {
    check.that(
        "allowed pairs reach each other and denied pairs do not: TCP, UDP and ICMP, IPv4 and IPv6",
        || {
            let cells = measure(mesh, &KINDS, scaled(LIMIT))?;
            compare(&cells, |cell| is_open(cell.from, cell.to, cell.kind))
        },
    )?;
    check.that("nodes that no rule joins do not know each other", || {
        for own in ROLES {
            let status = mesh.node(own).status()?;
            let mut known: Vec<_> = status["peers"]
                .as_array()
                .context("status lists no peers")?
                .iter()
                .filter_map(|peer| peer["name"].as_str())
                .collect();
            known.sort_unstable();
            let mut joined: Vec<_> = ROLES
                .into_iter()
                .filter(|other| is_joined(own, other) || is_joined(other, own))
                .collect();
            joined.sort_unstable();
            ensure!(
                known == joined,
                "{own} knows {known:?}, rules join it with {joined:?}"
            );
        }
        Ok(())
    })?;
    check.that(
        "nodes reach each other by name, short and full, over IPv4 and IPv6",
        || {
            for (from, to, _) in OPEN {
                by_name(mesh, from, to)?;
            }
            Ok(())
        },
    )
}

fn by_name(mesh: &Mesh, from: &str, to: &str) -> Result<()> {
    let (from, to) = (mesh.node(from), mesh.node(to));
    let domain = from.status()?;
    let domain = domain
        .pointer("/mesh/domain")
        .and_then(|domain| domain.as_str())
        .context("status has no domain")?
        .to_owned();
    for name in [to.name().to_owned(), format!("{}.{domain}", to.name())] {
        for (database, family) in [("ahostsv4", Family::V4), ("ahostsv6", Family::V6)] {
            let answer = from.host.run("getent", &[database, &name])?;
            let address = to.address(family)?.to_string();
            ensure!(
                answer.split_whitespace().any(|word| word == address),
                "{name} on {} is {answer:?}, not {address}",
                from.name()
            );
        }
    }
    from.mesh(&["ping", to.name()])
        .with_context(|| format!("mesh ping {} on {}", to.name(), from.name()))?;
    Ok(())
}
