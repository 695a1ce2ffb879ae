//! The parts of a case that packets do not show: SSH, node attributes, application capabilities.

use std::collections::BTreeMap;

use mesh_core::policy::{CompiledPolicy, SshAction};
use serde_json::Value;

use crate::case::{Case, Scene, Ssh};

pub(crate) fn compare(
    case: &Case,
    scene: &Scene,
    policy: &CompiledPolicy,
    differences: &mut Vec<String>,
) {
    if let Some(recorded) = &case.ssh {
        ssh(recorded, scene, policy, differences);
    }
    for (name, seen) in case.netmap.iter().flatten() {
        let id = scene.ids[name];
        if let Some(recorded) = &seen.capmap {
            attributes(name, recorded, &policy.attributes(id), differences);
        }
        if let Some(recorded) = &seen.whois_caps {
            let peers = policy.peers(id).into_iter();
            let sources = peers.flat_map(|peer| scene.mesh.nodes[&peer].addresses.each());
            let ours: BTreeMap<_, _> = sources
                .map(|source| (source, capabilities(policy, id, source)))
                .filter(|(_, held)| !held.is_empty())
                .collect();
            if ours != *recorded {
                differences.push(format!(
                    "whois at {name}: recorded {recorded:?}, ours {ours:?}"
                ));
            }
        }
    }
}

fn capabilities(
    policy: &CompiledPolicy,
    node: mesh_core::node::NodeId,
    source: std::net::IpAddr,
) -> BTreeMap<String, Value> {
    let held = policy.capabilities(node, source).into_iter();
    held.map(|(name, values)| {
        let values = values.map(|values| {
            let values = values
                .iter()
                .map(|value| serde_json::from_str(value).unwrap());
            Value::Array(values.collect())
        });
        (name, values.unwrap_or(Value::Null))
    })
    .collect()
}

/// What the hosted service gives nodes by itself, whatever the policy says.
const SERVICES_OWN: [&str; 13] = [
    "default-auto-update",
    "https://tailscale.com/cap/file-sharing",
    "https://tailscale.com/cap/funnel-ports?ports=443,8443,10000",
    "https://tailscale.com/cap/is-admin",
    "https://tailscale.com/cap/is-owner",
    "https://tailscale.com/cap/ssh",
    "https://tailscale.com/cap/tailnet-lock",
    "https://tailscale.com/cap/warn-funnel-no-https",
    "probe-udp-lifetime",
    "ssh-behavior-v1",
    "ssh-env-vars",
    "store-appc-routes",
    "tailnet-display-name",
];

fn attributes(
    node: &str,
    recorded: &BTreeMap<String, Value>,
    ours: &std::collections::BTreeSet<String>,
    differences: &mut Vec<String>,
) {
    for name in ours {
        if recorded.get(name) != Some(&Value::Null) {
            differences.push(format!(
                "{node} was not given the attribute {name}, ours is"
            ));
        }
    }
    for name in recorded.keys() {
        if !ours.contains(name) && !SERVICES_OWN.contains(&name.as_str()) {
            differences.push(format!(
                "{node} was given the attribute {name}, ours is not"
            ));
        }
    }
}

fn ssh(recorded: &Ssh, scene: &Scene, policy: &CompiledPolicy, differences: &mut Vec<String>) {
    for (dst, to) in &scene.ids {
        for (src, from) in &scene.ids {
            for login in &recorded.logins {
                let ours = policy
                    .ssh_login(*from, *to, login)
                    .map_or_else(String::new, |rule| {
                        let action = match rule.action {
                            SshAction::Accept => "accept",
                            SshAction::Check { .. } => "check",
                        };
                        let env = match rule.accept_env.is_empty() {
                            true => String::new(),
                            false => format!(" env={}", rule.accept_env.join(",")),
                        };
                        format!("{action} -> {login}{env}")
                    });
                let allow = recorded.allow.get(dst).and_then(|allow| allow.get(src));
                let recorded = allow.and_then(|allow| allow.get(login));
                let recorded = recorded.map_or("", String::as_str);
                if recorded != ours {
                    differences.push(format!(
                        "ssh {src} -> {login}@{dst}: recorded {recorded:?}, ours {ours:?}"
                    ));
                }
            }
        }
    }
}
