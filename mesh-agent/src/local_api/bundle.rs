//! What `mesh debug bundle` writes: enough to see what an agent thinks, nothing that lets anybody in.
//!
//! It is built from what may be shown, not by striking out what may not: no key, token or file is
//! read for it.

use mesh_api::v1;
use mesh_core::netmap::Netmap;
use serde_json::{Value, json};

use crate::cli::render;
use crate::snapshot::Snapshot;

pub(super) fn json(look: &Snapshot, status: &v1::LocalStatus, settings: &str) -> String {
    let bundle = json!({
        "status": render::status_json(status),
        "settings": settings,
        "netmap": look.netmap.as_deref().map(netmap),
        "applied": look.applied.map(|(epoch, generation)| json!({
            "epoch": epoch.0,
            "generation": generation.0,
        })),
        "refused_updates": look.refused,
        "revision": look.desired.as_ref().map(|desired| desired.revision),
    });
    serde_json::to_string_pretty(&bundle).expect("a JSON value can always be written")
}

fn netmap(netmap: &Netmap) -> Value {
    let policy = &netmap.policy;
    json!({
        "epoch": netmap.epoch.0,
        "generation": netmap.generation.0,
        "identities": policy.identities.iter().map(|(net, identity)| {
            json!({"prefix": net.to_string(), "identity": identity.0})
        }).collect::<Vec<_>>(),
        "entries": policy.entries.iter().map(|(key, entry)| json!({
            "remote": key.remote.0,
            "local": key.local.0,
            "direction": format!("{:?}", key.direction),
            "proto": key.proto,
            "ports": [key.ports.first, key.ports.last],
            "action": format!("{:?}", entry.action),
            "rule": entry.rule.0,
        })).collect::<Vec<_>>(),
        "rules": policy.rules.iter().map(|(id, rule)| json!({
            "rule": id.0,
            "policy": rule.place(),
            "summary": rule.summary,
        })).collect::<Vec<_>>(),
    })
}
