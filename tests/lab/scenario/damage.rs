//! Files that are not what they were: refused with a way out, never taken for new ones.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::mesh::Mesh;
use crate::{eventually, scaled, until};

use super::{Check, reach};

/// How a file may be damaged.
type Damage = (&'static str, fn(&mut Vec<u8>));

const DAMAGES: [Damage; 4] = [
    ("emptied", Vec::clear),
    ("cut in half", |bytes| bytes.truncate(bytes.len() / 2)),
    ("with a bit flipped in the middle", |bytes| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
    }),
    ("overwritten at its beginning", |bytes| {
        let end = bytes.len().min(64);
        bytes[..end].fill(0xa5);
    }),
];

/// The coordinator's database, damaged in its sleep.
pub fn database(mesh: &mut Mesh, check: &mut Check) -> Result<()> {
    mesh.coordinator.stop()?;
    let file = mesh.coordinator.state("coordinator.db");
    let good = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
    let outcome = check.that(
        "a damaged database is refused, with a hint how to restore",
        || {
            for (what, damage) in DAMAGES {
                let mut bytes = good.clone();
                damage(&mut bytes);
                write_over(&file, &bytes)?;
                refused(mesh, what)?;
            }
            fs::remove_file(&file).context("remove the database")?;
            refused(mesh, "removed")
        },
    );
    restore(&file, &good)?;
    mesh.coordinator.restart()?;
    outcome
}

/// Every single byte counts: one flipped bit anywhere in a row that feeds the world.
pub fn every_row(mesh: &mut Mesh, check: &mut Check) -> Result<()> {
    mesh.coordinator.stop()?;
    let file = mesh.coordinator.state("coordinator.db");
    let good = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
    let outcome = check.that(
        "a flipped bit in a node's name or tag never becomes truth",
        || {
            for word in ["developer", "tag:sandbox"] {
                let mut at = 0;
                while let Some(found) = find(&good[at..], word.as_bytes()) {
                    at += found + 1;
                    let mut bytes = good.clone();
                    bytes[at] ^= 1;
                    write_over(&file, &bytes)?;
                    let started = mesh.coordinator.restart();
                    if started.is_ok() {
                        // Then the byte was in no living row, and everything is as it was.
                        ensure!(
                            names(mesh)? == crate::mesh::ROLES,
                            "byte {at} of {word} made other nodes"
                        );
                        mesh.coordinator.stop()?;
                    }
                }
            }
            Ok(())
        },
    );
    restore(&file, &good)?;
    mesh.coordinator.restart()?;
    outcome
}

fn names(mesh: &Mesh) -> Result<Vec<String>> {
    let nodes = mesh.coordinator.nodes()?;
    Ok(nodes
        .iter()
        .filter_map(|node| Some(node["name"].as_str()?.to_owned()))
        .collect())
}

fn find(bytes: &[u8], word: &[u8]) -> Option<usize> {
    bytes.windows(word.len()).position(|window| window == word)
}

fn refused(mesh: &mut Mesh, what: &str) -> Result<()> {
    if mesh.coordinator.restart().is_ok() {
        bail!("a database {what} is taken");
    }
    let log = mesh.coordinator.process.log_tail();
    ensure!(
        log.contains("restore"),
        "a database {what} is refused without a hint:\n{log}"
    );
    ensure!(
        !log.contains("panicked"),
        "a database {what} panics:\n{log}"
    );
    Ok(())
}

/// Same file, same owner; SQLite's own companions would repair what they know.
fn write_over(file: &Path, bytes: &[u8]) -> Result<()> {
    for companion in ["-wal", "-shm"] {
        let mut name = file.as_os_str().to_owned();
        name.push(companion);
        let _ = fs::remove_file(PathBuf::from(name));
    }
    fs::write(file, bytes).with_context(|| format!("write {}", file.display()))
}

fn restore(file: &Path, bytes: &[u8]) -> Result<()> {
    let existed = file.exists();
    write_over(file, bytes)?;
    if !existed {
        let folder = file.parent().context("a file lies in a folder")?;
        let owner = fs::metadata(folder).context("look at the folder")?;
        use std::os::unix::fs::MetadataExt;
        std::os::unix::fs::chown(file, Some(owner.uid()), Some(owner.gid()))
            .context("give it back")?;
    }
    Ok(())
}

/// An agent's files, each damaged in its sleep.
pub fn agent_state(mesh: &mut Mesh, check: &mut Check) -> Result<()> {
    let sentence = "damaged state of an agent is refused with a hint, and never makes a new node";
    let outcome = check.that(sentence, || {
        let folder = mesh.node("sandbox").host.folder().join("agent");
        let files: Vec<_> = fs::read_dir(&folder)
            .context("list the agent's state")?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.is_file())
            .collect();
        ensure!(!files.is_empty(), "the agent has no state");
        let nodes = mesh.coordinator.nodes()?.len();
        for file in files {
            let good = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
            for (what, damage) in DAMAGES.iter().filter(|_| !good.is_empty()) {
                let node = mesh.node_mut("sandbox");
                node.kill()?;
                let mut bytes = good.clone();
                damage(&mut bytes);
                fs::write(&file, &bytes).context("damage a file")?;
                // Whether it starts or not: it must say so, and be the same node or none.
                let started = node.restart();
                let log = node.agent.log_tail();
                ensure!(
                    !log.contains("panicked"),
                    "{} {what}:\n{log}",
                    file.display()
                );
                if started.is_err() {
                    ensure!(
                        log.contains(&*file.file_name().unwrap_or_default().to_string_lossy()),
                        "{} {what} is not named:\n{log}",
                        file.display()
                    );
                }
                node.kill()?;
                fs::write(&file, &good).context("mend a file")?;
                node.restart()?;
                let found = mesh.coordinator.nodes()?.len();
                ensure!(found == nodes, "{} {what} makes a new node", file.display());
            }
        }
        Ok(())
    });
    outcome?;
    check.that("and with its files mended the node is back", || {
        eventually(Duration::from_secs(30), || {
            let cells = reach::measure(mesh, &reach::KINDS, scaled(reach::LIMIT))?;
            reach::compare(&cells, |cell| reach::is_open(cell.from, cell.to, cell.kind))
        })
    })
}

/// The coordinator's disk fills up, and empties again.
pub fn full_disk(mesh: &mut Mesh, check: &mut Check) -> Result<()> {
    let ballast = mesh.coordinator.state("ballast");
    check.that(
        "a full disk refuses writes in words and degrades readiness",
        || {
            let written = fill(&ballast);
            ensure!(written.is_err(), "the disk cannot be filled");
            let refused = mesh.coordinator.admin(&["user", "create", "no-room"]);
            let Err(error) = refused else {
                bail!("a write on a full disk was acknowledged");
            };
            let words = format!("{error:#}");
            ensure!(
                words.contains("full") || words.contains("space"),
                "the refusal says {words:?}"
            );
            until("readiness is degraded", Duration::from_secs(5), || {
                mesh.coordinator.ready().is_ok_and(|ready| !ready)
            })?;
            ensure!(
                mesh.coordinator.nodes()?.len() == mesh.nodes.len(),
                "nodes are gone"
            );
            mesh.coordinator.process.check_running()
        },
    )?;
    check.that(
        "and heals by itself within five seconds when there is room again",
        || {
            fs::remove_file(&ballast).context("make room")?;
            eventually(Duration::from_secs(5), || {
                ensure!(mesh.coordinator.ready()?, "it is not ready");
                mesh.coordinator
                    .admin(&["user", "create", "room-again"])
                    .map(drop)
            })
        },
    )
}

/// Until nothing more goes in; then even the last byte is taken.
fn fill(file: &Path) -> Result<()> {
    use std::io::Write;
    let mut file = fs::File::create(file).context("make ballast")?;
    let block = [0; 4096];
    for _ in 0..1 << 16 {
        file.write_all(&block)?;
    }
    Ok(())
}
