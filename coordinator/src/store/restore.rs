//! Putting a backup back, offline.
//!
//! Agents refuse a generation older than the one they hold, and a backup is old by nature. So a
//! restored world begins a new epoch, which outranks every generation of the one before. What stood
//! in the backup's place is moved aside, never deleted.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use mesh_core::node::{Epoch, Generation, UnixTime};

use super::Sqlite;
use super::sqlite::side_file;
use crate::state_dir::{StateDir, sync_directory};

/// What a restore did.
#[derive(Debug)]
pub struct Restored {
    pub epoch: Epoch,
    pub generation: Generation,
    pub nodes: usize,
    /// Where the database that stood there before is now.
    pub moved_aside: Option<PathBuf>,
}

/// Replaces the directory's database by a verified copy of `backup` in a new epoch. A failure
/// leaves what was there.
pub async fn restore(
    state: &mut StateDir,
    backup: &Path,
    now: UnixTime,
) -> anyhow::Result<Restored> {
    let key = state
        .key(false)
        .context("a mesh is its coordinator's key and its database; a backup holds the second")?;
    let (new, place) = (state.database_new(), state.database());
    if fs::canonicalize(backup).ok() == fs::canonicalize(&place).ok() && place.exists() {
        bail!("{} is the database itself, not a backup", backup.display());
    }
    for path in [&new, &side_file(&new, "-wal"), &side_file(&new, "-shm")] {
        drop(fs::remove_file(path));
    }
    let copy = copy_private(backup, &new).with_context(|| format!("copy {}", backup.display()));
    copy?;

    let (mut store, loaded) = Sqlite::open_file(&new).await?;
    if loaded.coordinator != key.public() {
        bail!(
            "the backup belongs to another coordinator: its nodes pin a key other than {}",
            state.key_path().display()
        );
    }
    let seen = state.head().map_or(0, |head| head.epoch.0);
    // The database in place may be too damaged to open, or fine and ahead of what the head says.
    let in_place = match Sqlite::open_file(&place).await {
        Ok((store, loaded)) => {
            store.close().await?;
            loaded.epoch.0
        }
        Err(_) => 0,
    };
    let epoch = Epoch(loaded.epoch.0.max(seen).max(in_place) + 1);
    store.begin_epoch(epoch).await?;
    store.close().await?;
    fs::File::open(&new)?.sync_all()?;

    state.write_marker(loaded.mesh.id)?;
    let moved_aside = move_aside(&place, now)?;
    fs::rename(&new, &place)?;
    sync_directory(&place)?;
    state.break_seal(epoch, loaded.generation)?;
    Ok(Restored {
        epoch,
        generation: loaded.generation,
        nodes: loaded.nodes.len(),
        moved_aside,
    })
}

fn copy_private(from: &Path, to: &Path) -> anyhow::Result<()> {
    let mut source = fs::File::open(from)?;
    let mut target = crate::state_dir::private().create_new(true).open(to)?;
    std::io::copy(&mut source, &mut target)?;
    target.sync_all()?;
    Ok(())
}

/// Renames the database and its side files; a log without its database would be worthless, and
/// beside the new one dangerous.
fn move_aside(place: &Path, now: UnixTime) -> anyhow::Result<Option<PathBuf>> {
    let aside = side_file(place, &format!(".before-restore-{now}"));
    let mut moved = None;
    for suffix in ["-wal", "-shm", ""] {
        let from = side_file(place, suffix);
        if fs::symlink_metadata(&from).is_ok() {
            let to = side_file(&aside, suffix);
            fs::rename(&from, &to).with_context(|| format!("move {} aside", from.display()))?;
            moved = Some(to);
        }
    }
    Ok(moved)
}
