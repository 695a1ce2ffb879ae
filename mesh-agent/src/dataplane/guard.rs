//! The guard program on a changing set of interfaces.
//!
//! Interfaces come and go and change names, so a link is known by the number of its interface, and
//! the set is compared with the pins that are there, not with what we remember.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use aya::programs::SchedClassifier;

use super::AttachError;
use super::attach::{Hook, Way, index};

const PREFIX: &str = "guard_";

/// Guards that hang, by interface number.
#[derive(Debug, Default)]
pub(super) struct Guards(BTreeMap<u32, Hook>);

impl Guards {
    pub(super) fn set<'a>(
        &mut self,
        program: &mut SchedClassifier,
        dir: &Path,
        interfaces: impl IntoIterator<Item = &'a str>,
    ) -> Result<(), AttachError> {
        let mut wanted = BTreeMap::new();
        for interface in interfaces {
            // Gone since the caller looked.
            if let Ok(number) = index(interface) {
                wanted.insert(number, interface);
            }
        }
        let failed = |interface: &str, source| AttachError::Attach {
            program: "guard",
            interface: interface.to_owned(),
            source,
        };
        for (number, interface) in &wanted {
            if self.0.contains_key(number) {
                continue;
            }
            let hook = Hook::hang(program, interface, Way::Ingress, &pin(dir, *number))
                .map_err(|source| failed(interface, source))?;
            self.0.insert(*number, hook);
        }
        self.keep(dir, |number| wanted.contains_key(&number))
            .map_err(|source| failed("those no longer there", source))
    }

    pub(super) fn clear(&mut self, dir: &Path) -> anyhow::Result<()> {
        self.keep(dir, |_| false)
    }

    /// Takes away every guard that is not kept, those of an earlier agent too.
    fn keep(&mut self, dir: &Path, is_kept: impl Fn(u32) -> bool) -> anyhow::Result<()> {
        for (number, hook) in &self.0 {
            if !is_kept(*number) {
                hook.unhang()?;
            }
        }
        self.0.retain(|number, _| is_kept(*number));
        for entry in fs::read_dir(dir).context("list the pins")? {
            let name = entry?.file_name();
            let number = name
                .to_str()
                .and_then(|n| n.strip_prefix(PREFIX)?.parse().ok());
            if number.is_some_and(|number| !is_kept(number)) {
                fs::remove_file(dir.join(name)).context("remove the pin of a guard")?;
            }
        }
        Ok(())
    }
}

fn pin(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("{PREFIX}{number}"))
}
