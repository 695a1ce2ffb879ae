//! The flow log as a file of JSON lines.
//!
//! The file is bounded: when it is full it becomes `FILE.1`, in the place of the one before. Others may
//! want to keep it, and move it away or cut it while it is written: then the next lines go to a new one.

use std::fs::{File, Metadata};
use std::io::{self, BufWriter, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mesh_core::health::{Condition, Severity};
use tokio::sync::{broadcast, mpsc};
use tokio_util::sync::CancellationToken;

use super::{Entry, FlowLog, json, since_1970};
use crate::eventloop::Told;

/// Size of the file at which the next begins.
const FILE_BYTES: u64 = 64 << 20;
/// Between two attempts to open a file that could not be written.
const RETRY: Duration = Duration::from_secs(10);

/// Writes what comes to `path`, until `stop`.
pub(crate) async fn write(
    path: PathBuf,
    log: FlowLog,
    told: mpsc::Sender<Told>,
    stop: CancellationToken,
) {
    let (_, mut news) = log.follow();
    let name = "FlowLogNotWritten";
    let write = async {
        loop {
            let failed = follow(&path, &mut news, &told, name).await;
            tracing::warn!(error = %failed, "write the flow log");
            let condition = Some(not_written(&path, &failed));
            let _ = told.send(Told::Condition(name, condition)).await;
            tokio::time::sleep(RETRY).await;
        }
    };
    stop.run_until_cancelled(write).await;
}

/// Returns the error that ends it.
async fn follow(
    path: &Path,
    news: &mut broadcast::Receiver<Arc<Entry>>,
    told: &mpsc::Sender<Told>,
    name: &'static str,
) -> io::Error {
    let mut file = match open(path) {
        Ok(file) => file,
        Err(error) => return error,
    };
    let _ = told.send(Told::Condition(name, None)).await;
    loop {
        let next = news.recv().await;
        if let Err(error) = file.stay() {
            return error;
        }
        let written = match next {
            Ok(entry) => file.write(&entry),
            Err(broadcast::error::RecvError::Lagged(count)) => file.write(&Entry::Lost {
                time: since_1970(),
                what: "this file",
                count,
            }),
            Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
        };
        // What else has come meanwhile goes to the disk together.
        let flushed = written.and_then(|()| match news.is_empty() {
            true => file.writer.flush(),
            false => Ok(()),
        });
        if let Err(error) = flushed {
            return error;
        }
    }
}

#[derive(Debug)]
struct Lines<'a> {
    path: &'a Path,
    writer: BufWriter<File>,
    /// Device and number of the file.
    id: (u64, u64),
    bytes: u64,
}

fn open(path: &Path) -> io::Result<Lines<'_>> {
    // Who talked to whom is nobody else's business.
    let file = File::options()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)?;
    let metadata = file.metadata()?;
    Ok(Lines {
        path,
        id: id(&metadata),
        bytes: metadata.len(),
        writer: BufWriter::new(file),
    })
}

impl Lines<'_> {
    fn write(&mut self, entry: &Entry) -> io::Result<()> {
        if self.bytes >= FILE_BYTES {
            self.writer.flush()?;
            let mut full = self.path.as_os_str().to_owned();
            full.push(".1");
            std::fs::rename(self.path, full)?;
            *self = open(self.path)?;
        }
        let line = json(&entry.into()).to_string();
        self.bytes += line.len() as u64 + 1;
        writeln!(self.writer, "{line}")
    }

    /// Opens the file anew if somebody has moved it away. Asked where nothing waits to be written.
    fn stay(&mut self) -> io::Result<()> {
        if !self.writer.buffer().is_empty() {
            return Ok(());
        }
        match std::fs::metadata(self.path) {
            // It may have been cut, too.
            Ok(metadata) if id(&metadata) == self.id => self.bytes = metadata.len(),
            _ => *self = open(self.path)?,
        }
        Ok(())
    }
}

fn id(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
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
    fn write(lines: &mut Lines<'_>, count: u64) {
        lines.stay().unwrap();
        lines.write(&lost(count)).unwrap();
        lines.writer.flush().unwrap();
    }

    fn holds(path: &Path, counts: &[u64]) {
        let text = std::fs::read_to_string(path).unwrap();
        let lines: Vec<serde_json::Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let found: Vec<_> = lines.iter().map(|line| line["packets"].as_u64()).collect();
        let counts: Vec<_> = counts.iter().copied().map(Some).collect();
        assert_eq!(found, counts, "{}", path.display());
    }

    #[test]
    fn a_full_file_makes_room_for_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flows");
        let mut lines = open(&path).unwrap();
        write(&mut lines, 1);
        lines.bytes = FILE_BYTES;
        lines.write(&lost(2)).unwrap();
        lines.writer.flush().unwrap();
        holds(&folder.path().join("flows.1"), &[1]);
        holds(&path, &[2]);
    }

    #[test]
    fn a_file_that_was_moved_away_is_begun_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flows");
        let moved = folder.path().join("flows.kept");
        let mut lines = open(&path).unwrap();
        write(&mut lines, 1);
        std::fs::rename(&path, &moved).unwrap();
        write(&mut lines, 2);
        write(&mut lines, 3);
        holds(&moved, &[1]);
        holds(&path, &[2, 3]);
        std::fs::remove_file(&path).unwrap();
        write(&mut lines, 4);
        holds(&path, &[4]);
        // Another's in its place.
        std::fs::rename(&moved, &path).unwrap();
        write(&mut lines, 5);
        holds(&path, &[1, 5]);
        // Cut: what is full begins where the cut was.
        File::options()
            .write(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        lines.bytes = FILE_BYTES;
        write(&mut lines, 6);
        holds(&path, &[6]);
    }
}
