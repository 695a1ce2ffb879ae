//! The parts of a case that packets do not show: SSH, node attributes, application capabilities.

use std::collections::{BTreeMap, BTreeSet};

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
            attributes(
                name,
                recorded,
                &policy.attributes(id),
                &case.policy_text,
                differences,
            );
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

/// The service gives nodes attributes of its own accord, more of them with time. Only those that
/// the policy could have given are held against ours.
fn could_be_given(policy_text: &str, name: &str) -> bool {
    policy_text.contains(name) || name == "randomize-client-port"
}

fn attributes(
    node: &str,
    recorded: &BTreeMap<String, Value>,
    ours: &BTreeSet<String>,
    policy_text: &str,
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
        if !ours.contains(name) && could_be_given(policy_text, name) {
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
