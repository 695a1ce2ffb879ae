//! Pre-auth keys: good once, and every bad one told what is wrong with it.

use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::mesh::{Backend, Key, Mesh, Node};
use crate::scaled;

use super::Check;

/// A fresh host tries each bad key in turn.
pub fn bad(mesh: &mut Mesh, check: &mut Check) -> Result<()> {
    let stranger = Node::start(mesh.lab.host("stranger")?, Backend::Auto)?;
    let before = mesh.coordinator.nodes()?.len();
    check.that(
        "expired, revoked, used, unknown and malformed keys get one clear error each",
        || {
            let expired = mesh
                .coordinator
                .key(&Key::one_off().tag("node").expires_in(1))?;
            let (revoked, id) = mesh.coordinator.key_with_id(&Key::one_off().tag("node"))?;
            mesh.coordinator
                .admin(&["key", "revoke", &id.to_string()])?;
            let used = mesh.used_key.clone();
            let unknown = swapped(&mesh.coordinator.key(&Key::one_off().tag("node"))?);
            std::thread::sleep(scaled(Duration::from_millis(1500)));
            for (key, word) in [
                (&*expired, "expired"),
                (&*revoked, "revoked"),
                (&*used, "used"),
                (&*unknown, "unknown"),
                ("no key at all", "malformed"),
            ] {
                let Err(error) = stranger.up(mesh.coordinator.join(), key) else {
                    bail!("{word}: the key was taken");
                };
                let words = format!("{error:#}");
                ensure!(words.contains(word), "{word}: the error says {words:?}");
                ensure!(!words.contains(key), "{word}: the error shows the key");
            }
            Ok(())
        },
    )?;
    ensure!(
        mesh.coordinator.nodes()?.len() == before,
        "a bad key has made a node"
    );
    Ok(())
}

/// As long as a key of ours, and none.
fn swapped(key: &str) -> String {
    let (head, tail) = key.split_at(key.len() - 8);
    let tail: String = tail
        .chars()
        .map(|c| if c == '0' || c == 'A' { 'b' } else { '0' })
        .collect();
    format!("{head}{tail}")
}
