//! Pre-auth keys: good once, and every bad one told what is wrong with it.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use mesh_api::Join;

use crate::mesh::{Key, Mesh, Node, Stranger};

use super::Check;

/// A fresh host tries each bad key in turn.
pub fn bad(mesh: &mut Mesh, check: &mut Check) -> Result<()> {
    let stranger = Node::start(mesh.lab.host("stranger")?, mesh.backend)?;
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
            std::thread::sleep(Duration::from_millis(1500));
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

/// So many use one key at once.
const CROWD: u8 = 50;

/// Fifty machines, one key that is good for one of them.
pub fn crowd(mesh: &mut Mesh, check: &mut Check) -> Result<()> {
    let before = mesh.coordinator.nodes()?.len();
    check.that(
        "a one-off key used by 50 enrolments at once enrolls exactly one node",
        || {
            let key = mesh.coordinator.key(&Key::one_off().tag("sandbox"))?;
            let join: Join = mesh
                .coordinator
                .join()
                .parse()
                .context("read the join string")?;
            let answers = mesh.coordinator.host.inside(|| enroll_all(&join, &key))??;
            let enrolled = answers.iter().filter(|answer| answer.is_ok()).count();
            ensure!(enrolled == 1, "{enrolled} were enrolled");
            for refused in answers.iter().filter_map(|answer| answer.as_ref().err()) {
                ensure!(
                    refused.code() == tonic::Code::PermissionDenied,
                    "refused with {refused}"
                );
            }
            Ok(())
        },
    )?;
    let after = mesh.coordinator.nodes()?;
    ensure!(
        after.len() == before + 1,
        "{} nodes were made",
        after.len() - before
    );
    for node in after.iter().filter(|node| {
        node["name"]
            .as_str()
            .is_some_and(|n| n.starts_with("crowd"))
    }) {
        let id = node["id"].to_string();
        mesh.coordinator.admin(&["node", "delete", &id])?;
    }
    mesh.settle()
}

type Answer = Result<mesh_api::v1::EnrollResponse, tonic::Status>;

fn enroll_all(join: &Join, key: &str) -> Result<Vec<Answer>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start a runtime")?;
    runtime.block_on(async {
        let mut tasks = tokio::task::JoinSet::new();
        for number in 1..=CROWD {
            let (join, key) = (join.clone(), key.to_owned());
            tasks.spawn(async move {
                let name = format!("crowd-{number}");
                Stranger::new(number).enroll(&join, &key, &name).await
            });
        }
        tasks.join_all().await.into_iter().collect()
    })
}
