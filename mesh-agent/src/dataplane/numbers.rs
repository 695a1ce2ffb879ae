//! Numbers of the guards that may hang, written down for an agent that finds no pin of them.
//!
//! A guard outlives its agent; its pin does not, if the BPF file system is mounted anew while no agent runs.
//! What program a number stands for only CAP_SYS_ADMIN may ask. But as long as a kernel runs it gives none
//! twice (`idr_alloc_cyclic`), so it is enough to have noted ours, and of which boot they are.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

const BOOT: &str = "/proc/sys/kernel/random/boot_id";

#[derive(Debug)]
pub(super) struct Numbers(PathBuf);

impl Numbers {
    pub(super) fn in_file(path: PathBuf) -> Self {
        Self(path)
    }

    /// Those of this boot; none where there is no file that can be read.
    pub(super) fn read(&self) -> BTreeSet<u32> {
        let noted = || {
            let text = fs::read_to_string(&self.0).ok()?;
            let numbers = text.strip_prefix(&fs::read_to_string(BOOT).ok()?)?;
            let numbers = numbers.lines().map(|number| number.parse().ok());
            numbers.collect::<Option<_>>()
        };
        noted().unwrap_or_default()
    }

    /// What cannot be written down is no reason not to filter.
    pub(super) fn note(&self, numbers: &BTreeSet<u32>) {
        if let Err(error) = self.write(numbers) {
            tracing::warn!(%error, "note the guard's number");
        }
    }

    fn write(&self, numbers: &BTreeSet<u32>) -> io::Result<()> {
        let mut text = fs::read_to_string(BOOT)?;
        for number in numbers {
            text += &format!("{number}\n");
        }
        // A torn one would be no worse than none, but there is no need for either.
        let new = self.0.with_extension("new");
        let mut options = OpenOptions::new();
        let mut file = options
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(text.as_bytes())?;
        fs::rename(&new, &self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_again_in_the_same_boot_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("guards");
        let numbers = Numbers::in_file(path.clone());
        assert_eq!(numbers.read(), BTreeSet::new());
        let ours = BTreeSet::from([7, 300]);
        numbers.note(&ours);
        assert_eq!(numbers.read(), ours);

        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("0{text}")).unwrap();
        assert_eq!(numbers.read(), BTreeSet::new(), "of another boot");
        fs::write(&path, format!("{text}x\n")).unwrap();
        assert_eq!(numbers.read(), BTreeSet::new(), "not ours");
    }
}
