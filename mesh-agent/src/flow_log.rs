//! The flow log's way out: to a file of JSON lines, and to whoever asks `mesh flows`.
//!
//! Nobody who reads slowly holds anybody up: what a reader was too slow for is a number in what it
//! reads next. The file is bounded: when it is full it becomes `FILE.1`, in the place of the one before.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_core::flow::{Described, Query};
use mesh_core::health::{Condition, Severity};
use tokio::sync::{broadcast, mpsc};
use tokio_util::sync::CancellationToken;

use crate::eventloop::Told;

/// What a latecomer gets to see.
const REMEMBERED: usize = 4_096;
/// Entries that a reader may be behind.
const BEHIND: usize = 8_192;
/// Size of the file at which the next begins.
const FILE_BYTES: u64 = 64 << 20;
/// Between two attempts to open a file that could not be written.
const RETRY: Duration = Duration::from_secs(10);

/// One line.
#[derive(Clone, PartialEq, Debug)]
pub enum Entry {
    Flow(Box<Described>),
    /// So many events of a kind that nobody was told of.
    Lost {
        /// Since 1970.
        time: Duration,
        what: &'static str,
        count: u64,
    },
}

impl Entry {
    /// What was lost is for everybody.
    pub fn is_wanted(&self, query: &Query) -> bool {
        match self {
            Self::Flow(described) => query.matches(described),
            Self::Lost { .. } => true,
        }
    }
}

/// Where entries go, and come from. Cloned freely.
#[derive(Clone, Debug)]
pub struct FlowLog {
    recent: Arc<Mutex<VecDeque<Arc<Entry>>>>,
    news: broadcast::Sender<Arc<Entry>>,
}

impl Default for FlowLog {
    fn default() -> Self {
        Self {
            recent: Arc::default(),
            news: broadcast::channel(BEHIND).0,
        }
    }
}

impl FlowLog {
    pub(crate) fn tell(&self, entry: Entry) {
        let entry = Arc::new(entry);
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if recent.len() == REMEMBERED {
            recent.pop_front();
        }
        recent.push_back(entry.clone());
        // Under the lock, so that a follower misses none and gets none twice. Nobody may listen.
        let _ = self.news.send(entry);
    }

    /// What is remembered, oldest first, and what comes from now on.
    pub fn follow(&self) -> (Vec<Arc<Entry>>, broadcast::Receiver<Arc<Entry>>) {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        (recent.iter().cloned().collect(), self.news.subscribe())
    }
}

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
        let written = match news.recv().await {
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
    bytes: u64,
}

fn open(path: &Path) -> io::Result<Lines<'_>> {
    // Who talked to whom is nobody else's business.
    let file = File::options()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)?;
    Ok(Lines {
        path,
        bytes: file.metadata()?.len(),
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
}

fn not_written(path: &Path, error: &io::Error) -> Condition {
    Condition {
        severity: Severity::Warning,
        text: format!("the flow log {} cannot be written: {error}", path.display()),
        next_step: "make room, or let the agent's user write there; the agent tries again by itself",
    }
}

/// The time of this machine's clock since 1970.
pub(crate) fn since_1970() -> Duration {
    let now = std::time::SystemTime::now();
    now.duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default()
}

mod wire;

pub use wire::json;

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

    #[test]
    fn a_full_file_makes_room_for_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flows");
        let mut lines = open(&path).unwrap();
        lines.write(&lost(1)).unwrap();
        lines.bytes = FILE_BYTES;
        lines.write(&lost(2)).unwrap();
        lines.writer.flush().unwrap();
        let read = |name| std::fs::read_to_string(folder.path().join(name)).unwrap();
        assert!(read("flows.1").contains("\"packets\":1"));
        assert!(read("flows").contains("\"packets\":2"));
    }

    #[tokio::test]
    async fn followers_get_what_is_remembered_and_then_what_comes() {
        let log = FlowLog::default();
        for count in 0..REMEMBERED as u64 + 1 {
            log.tell(lost(count));
        }
        let (recent, mut news) = log.follow();
        assert_eq!(recent.len(), REMEMBERED);
        assert_eq!(**recent.first().unwrap(), lost(1));
        log.tell(lost(9_999));
        assert_eq!(*news.recv().await.unwrap(), lost(9_999));
    }
}
