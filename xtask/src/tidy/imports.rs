//! Who may import whom: the table of ARCHITECTURE.md, every forbidden edge with its reason.
//!
//! Judged per crate on the tree that cargo resolves for it alone: in the whole workspace's tree
//! the features of all crates flow together, and mesh-core would seem to use aya.

use std::collections::BTreeSet;

use anyhow::Result;

use crate::shell;

struct Rule {
    /// Package names.
    who: &'static str,
    never: &'static [&'static str],
    because: &'static str,
}

const RULES: &[Rule] = &[
    Rule {
        who: "mesh-common",
        never: &["*"],
        because: "it is compiled for the kernel: no std, no dependency but the optional aya (ARCHITECTURE.md, who may import whom)",
    },
    Rule {
        who: "mesh-core",
        never: &[
            "tokio",
            "tonic",
            "prost",
            "aya",
            "rtnetlink",
            "sqlx",
            "hyper",
            "rustix",
        ],
        because: "it is sans-IO (ARCHITECTURE.md, invariant 1)",
    },
    Rule {
        who: "mesh-core",
        never: &["mesh-api", "mesh-agent", "coordinator", "mesh-tests"],
        because: "the thinking knows neither wire nor shell",
    },
    Rule {
        who: "mesh-api",
        never: &[
            "mesh-agent",
            "coordinator",
            "mesh-tests",
            "aya",
            "rtnetlink",
            "sqlx",
        ],
        because: "it holds messages and conversions only; its users own sockets and stores",
    },
    Rule {
        who: "mesh-agent",
        never: &["coordinator", "relay", "sqlx", "mesh-tests"],
        because: "the privileged daemon has the smallest tree, and meets the coordinator over the wire only",
    },
    Rule {
        who: "coordinator",
        never: &[
            "mesh-agent",
            "relay",
            "aya",
            "rtnetlink",
            "boringtun",
            "mesh-tests",
        ],
        because: "the control plane touches no kernel resource of a node",
    },
    Rule {
        who: "xtask",
        never: &[
            "mesh-common",
            "mesh-core",
            "mesh-api",
            "mesh-agent",
            "coordinator",
            "aya",
            "tokio",
        ],
        because: "the workshop must build in seconds; what needs our crates is a binary of mesh-tests",
    },
];

pub(super) fn findings() -> Result<Vec<String>> {
    let mut findings = Vec::new();
    let mut judged: Option<(&str, BTreeSet<String>)> = None;
    for rule in RULES {
        if judged.as_ref().is_none_or(|(who, _)| *who != rule.who) {
            judged = Some((rule.who, imports_of(rule.who)?));
        }
        let Some((_, imports)) = &judged else {
            continue;
        };
        for import in imports.iter().filter(|name| rule.forbids(name)) {
            findings.push(format!(
                "{who} must not depend on {import}: {because}. `cargo tree -p {who} -e normal -i {import}` shows the way",
                who = rule.who,
                because = rule.because,
            ));
        }
    }
    Ok(findings)
}

impl Rule {
    fn forbids(&self, import: &str) -> bool {
        self.never.contains(&"*") || self.never.contains(&import)
    }
}

/// Every package that this one is built with, near and far, tests aside.
fn imports_of(package: &str) -> Result<BTreeSet<String>> {
    let tree = shell::output(shell::cargo().args([
        "tree",
        "--locked",
        "--package",
        package,
        "--edges",
        "normal",
        "--prefix",
        "none",
        "--format",
        "{p}",
    ]))?;
    Ok(tree
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != package)
        .map(str::to_owned)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crate_for_the_kernel_may_import_nothing() {
        assert!(RULES[0].forbids("anything"));
        assert!(!RULES[1].forbids("ipnet"));
    }

    #[test]
    fn rules_about_one_crate_stand_together() {
        let mut seen = Vec::new();
        for rule in RULES {
            if seen.last() != Some(&rule.who) {
                assert!(!seen.contains(&rule.who), "{}", rule.who);
                seen.push(rule.who);
            }
        }
    }
}
