//! The flow log as a file of JSON lines.
//!
//! The file is bounded: when it is full it becomes `FILE.1`, in the place of the one before. Others may
//! want to keep it, and move it away or cut it while it is written: then the next lines go to a new one.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_core::health::{Condition, Severity};
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{Entry, FlowLog, json, since_1970};
use crate::eventloop::Told;

/// Size of the file at which the next begins.
const FILE_BYTES: u64 = 64 << 20;
/// Bytes that are worth a write of their own.
const MOST_AT_ONCE: usize = 1 << 20;
/// Bytes that no line reaches.
const LONGEST_LINE: u64 = 64 << 10;
/// Between two attempts to write to a file that could not be written.
const RETRY: Duration = Duration::from_secs(10);
/// How long the others may take to end.
const LAST: Duration = Duration::from_secs(2);

/// Writes what comes to `path`, until nobody tells anything any more. What cannot be written is tried again
/// until `stop`.
pub(crate) async fn write(
    path: PathBuf,
    log: FlowLog,
    told: mpsc::Sender<Told>,
    stop: CancellationToken,
) {
    let (_, mut news) = log.follow();
    drop(log);
    if let Err(error) = mend(&path) {
        tracing::warn!(%error, "look for half a line in the flow log");
    }
    // The others end too, and tell last things.
    let stopped = async {
        stop.cancelled().await;
        tokio::time::sleep(LAST).await;
    };
    tokio::pin!(stopped);
    let tell = async |condition| {
        let condition = Told::Condition("FlowLogNotWritten", condition);
        // The event loop may have ended before.
        let _ = told.send(condition).await;
    };
    let mut lines = String::new();
    let (mut is_over, mut was_written) = (false, false);
    while !is_over {
        while let Err(error) = append(&path, &lines) {
            tracing::warn!(%error, "write the flow log");
            tell(Some(not_written(&path, &error))).await;
            was_written = false;
            if stop
                .run_until_cancelled(tokio::time::sleep(RETRY))
                .await
                .is_none()
            {
                return;
            }
        }
        lines.clear();
        if !std::mem::replace(&mut was_written, true) {
            tell(None).await;
        }
        let mut next = tokio::select! {
            next = news.recv() => next.map_err(|error| match error {
                RecvError::Lagged(count) => TryRecvError::Lagged(count),
                RecvError::Closed => TryRecvError::Closed,
            }),
            () = &mut stopped => Err(TryRecvError::Closed),
        };
        // What else has come meanwhile goes to the disk together.
        while lines.len() < MOST_AT_ONCE {
            match next {
                Ok(entry) => add(&mut lines, &entry),
                Err(TryRecvError::Lagged(count)) => add(&mut lines, &too_slow(count)),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Closed) => {
                    is_over = true;
                    break;
                }
            }
            next = news.try_recv();
        }
    }
    if let Err(error) = append(&path, &lines) {
        tracing::warn!(%error, "write the end of the flow log");
    }
}

fn too_slow(count: u64) -> Entry {
    Entry::Lost {
        time: since_1970(),
        what: "this file",
        count,
    }
}

fn add(lines: &mut String, entry: &Entry) {
    lines.push_str(&json(&entry.into()).to_string());
    lines.push('\n');
}

/// All of it, or nothing: half a line is none. The file is opened each time, so it is whatever stands at
/// `path` now.
fn append(path: &Path, lines: &str) -> io::Result<()> {
    let mut file = open(path)?;
    if file.metadata()?.len() >= FILE_BYTES {
        let mut full = path.as_os_str().to_owned();
        full.push(".1");
        std::fs::rename(path, full)?;
        file = open(path)?;
    }
    let before = file.metadata()?.len();
    let written = file.write_all(lines.as_bytes());
    if written.is_err() {
        file.set_len(before)?;
    }
    written
}

/// Cuts off half a line, which an agent leaves that was killed while it wrote.
fn mend(path: &Path) -> io::Result<()> {
    let file = File::options().read(true).write(true).open(path);
    let mut file = match file {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    let length = file.metadata()?.len();
    let start = length.saturating_sub(LONGEST_LINE);
    file.seek(SeekFrom::Start(start))?;
    let mut end = Vec::new();
    file.read_to_end(&mut end)?;
    let torn = match end.iter().rposition(|byte| *byte == b'\n') {
        Some(last) => last + 1,
        None if start == 0 => 0,
        // No line of ours is so long.
        None => return Ok(()),
    };
    if end[torn..].starts_with(b"{") {
        file.set_len(start + torn as u64)?;
    }
    Ok(())
}

fn open(path: &Path) -> io::Result<File> {
    // Who talked to whom is nobody else's business.
    File::options()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

fn not_written(path: &Path, error: &io::Error) -> Condition {
    Condition {
        severity: Severity::Warning,
        text: format!("the flow log {} cannot be written: {error}", path.display()),
        next_step: "make room, or let the agent's user write there; the agent tries again by itself",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(count: u64) -> Entry {
        Entry::Lost {
            time: Duration::from_secs(1),
            what: "denied",
            count,
        }
    }

    /// Writes one entry as the agent does.
    fn write(path: &Path, count: u64) -> io::Result<()> {
        let mut lines = String::new();
        add(&mut lines, &lost(count));
        append(path, &lines)
    }

    fn holds(path: &Path, counts: &[u64]) {
        let text = std::fs::read_to_string(path).unwrap();
        let counted = |line: &str| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            line["packets"].as_u64().unwrap()
        };
        let found: Vec<_> = text.lines().map(counted).collect();
        assert_eq!(found, counts, "{}", path.display());
    }

    #[test]
    fn a_full_file_makes_room_for_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flows");
        std::fs::write(&path, vec![b'\n'; 64 << 20]).unwrap();
        write(&path, 2).unwrap();
        let full = std::fs::metadata(folder.path().join("flows.1")).unwrap();
        assert_eq!(full.len(), 64 << 20);
        holds(&path, &[2]);
    }

    #[test]
    fn a_file_that_was_moved_away_is_begun_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flows");
        let moved = folder.path().join("flows.kept");
        write(&path, 1).unwrap();
        std::fs::rename(&path, &moved).unwrap();
        write(&path, 2).unwrap();
        write(&path, 3).unwrap();
        holds(&moved, &[1]);
        holds(&path, &[2, 3]);
        std::fs::remove_file(&path).unwrap();
        write(&path, 4).unwrap();
        holds(&path, &[4]);
    }

    #[test]
    fn half_a_line_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flows");
        mend(&path).unwrap();
        for torn in ["{\"bytes\":29,", "{", ""] {
            for before in [&[][..], &[1, 2]] {
                let _ = std::fs::remove_file(&path);
                for count in before {
                    write(&path, *count).unwrap();
                }
                let mut file = open(&path).unwrap();
                file.write_all(torn.as_bytes()).unwrap();
                mend(&path).unwrap();
                write(&path, 3).unwrap();
                holds(&path, &[before, &[3]].concat());
            }
        }
        // Nothing that is not ours is cut.
        for theirs in ["root:x:0:0", &"{".repeat(70_000)] {
            std::fs::write(&path, theirs).unwrap();
            mend(&path).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), theirs);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_could_not_be_written_is_written_later() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flows");
        let (told, mut tellings) = mpsc::channel(100);
        let (log, stop) = (FlowLog::default(), CancellationToken::new());
        let writing = super::write(path.clone(), log.clone(), told, stop.clone());
        let writing = tokio::spawn(writing);
        let mut condition = async || match tellings.recv().await {
            Some(Told::Condition("FlowLogNotWritten", condition)) => condition.is_some(),
            other => panic!("{other:?}"),
        };
        assert!(!condition().await);
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        log.tell(lost(2));
        assert!(condition().await);
        log.tell(lost(3));
        std::fs::remove_dir(&path).unwrap();
        assert!(!condition().await);
        // Nobody tells anything any more: what was told is there.
        drop(log);
        writing.await.unwrap();
        holds(&path, &[2, 3]);
    }
}
