//! The guard program on a changing set of interfaces.
//!
//! Interfaces come and go and change names, so a guard is known by the number of its interface. What
//! guards an earlier agent hung is known by its program's pin alone, which stays until each was found.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::Context as _;
use aya::programs::SchedClassifier;
use mesh_core::dataplane::vigil::{Lapse, Standing};

use super::AttachError;
use super::attach::{Chain, Hook, Left, Way, index_if_there};
use super::error::failed;
use super::pins::{Folder, Role};
use super::takeover::left_in;

/// The program's name in the object.
pub(super) const GUARD: &str = "guard";

/// LOOPBACK_IFINDEX of the kernel, the same in every network namespace.
const LOOPBACK: u32 = 1;

/// Guards that hang, by interface number.
#[derive(Debug)]
pub(super) struct Guards {
    hooks: BTreeMap<u32, Hook>,
    /// Numbers of the interfaces that are to have a guard, and names of those that have none yet.
    wanted: BTreeSet<u32>,
    missing: BTreeSet<String>,
    /// Earlier agents' programs, until their guards are ours or gone.
    left: Vec<Left>,
    chain: Chain,
    program_id: u32,
}

impl Guards {
    /// None hangs yet, but perhaps an earlier agent's.
    pub(super) fn new(
        program: &mut SchedClassifier,
        folder: &Folder,
        earlier: &[Folder],
        chain: Chain,
    ) -> anyhow::Result<Self> {
        let mut left = folder.programs(Role::Guard)?;
        left.extend(left_in(earlier, Role::Guard)?);
        folder.keep(Role::Guard, program)?;
        Ok(Self {
            hooks: BTreeMap::new(),
            wanted: BTreeSet::new(),
            missing: BTreeSet::new(),
            left,
            chain,
            program_id: program.info()?.id(),
        })
    }

    pub(super) fn program_id(&self) -> u32 {
        self.program_id
    }

    /// Notes that these and no others are to have a guard, and which of them have none.
    pub(super) fn want<'a>(
        &mut self,
        interfaces: impl IntoIterator<Item = &'a str>,
    ) -> Result<(), AttachError> {
        self.missing.clear();
        self.wanted.clear();
        for interface in interfaces {
            // `None`: gone since the caller looked. Loopback is known by its number, as names can be changed.
            let Some(number) = number_of(interface)?.filter(|number| *number != LOOPBACK) else {
                continue;
            };
            self.wanted.insert(number);
            match self.hooks.get_mut(&number) {
                Some(hook) => hook.rename(interface),
                None => drop(self.missing.insert(interface.to_owned())),
            }
        }
        Ok(())
    }

    /// Hangs guards that are missing, at most so many, and at last takes away those that nobody wants. False:
    /// there is more to do.
    pub(super) fn hang(
        &mut self,
        program: &mut SchedClassifier,
        at_most: usize,
    ) -> Result<bool, AttachError> {
        let mut refused = None;
        for _ in 0..at_most {
            let Some(interface) = self.missing.pop_first() else {
                break;
            };
            let Some(number) = number_of(&interface)? else {
                continue;
            };
            // Another may have taken the name meanwhile.
            self.wanted.insert(number);
            match Hook::hang(program, &interface, Way::Ingress, self.chain, &self.left) {
                Ok(hook) => drop(self.hooks.insert(number, hook)),
                // The others are not to be open for this one's sake.
                Err(error) => refused = refused.or(Some(failed(GUARD, &interface)(error))),
            }
        }
        if let Some(refused) = refused {
            return Err(refused);
        }
        if !self.missing.is_empty() {
            return Ok(false);
        }
        let wanted = std::mem::take(&mut self.wanted);
        let taken = self.take_away(|number| !wanted.contains(number));
        self.wanted = wanted;
        taken.map_err(failed(GUARD, "interfaces no longer there"))?;
        Ok(true)
    }

    /// Hangs again what was taken off; returns what was wrong, and where.
    pub(super) fn mend(
        &mut self,
        program: &mut SchedClassifier,
    ) -> anyhow::Result<Vec<(String, Lapse)>> {
        let missing = self.missing.iter().cloned();
        let mut lapses: Vec<_> = missing.map(|name| (name, Lapse::Missing)).collect();
        for (number, hook) in &mut self.hooks {
            let interface = hook.interface().to_owned();
            // An interface that is gone, or has a new name, is for the next set.
            if index_if_there(&interface)? != Some(*number) {
                continue;
            }
            let lapse = match hook.standing()? {
                Standing::First => continue,
                Standing::FirstAgain => Lapse::Visited,
                Standing::Behind => Lapse::Behind,
                Standing::Gone => {
                    *hook = Hook::hang(program, &interface, Way::Ingress, self.chain, &[])
                        .with_context(|| format!("guard {interface} again"))?;
                    Lapse::TakenOff
                }
            };
            lapses.push((interface, lapse));
        }
        Ok(lapses)
    }

    pub(super) fn clear(&mut self) -> anyhow::Result<()> {
        self.take_away(|_| true)
    }

    /// Takes away every guard that is unwanted, those of earlier agents too, and their pins.
    fn take_away(&mut self, unwanted: impl Fn(&u32) -> bool) -> anyhow::Result<()> {
        for (number, hook) in &self.hooks {
            if unwanted(number) {
                hook.unhang()?;
            }
        }
        self.hooks.retain(|number, _| !unwanted(number));
        if self.left.is_empty() {
            return Ok(());
        }
        for interface in interfaces()? {
            // `None`: the kernel lost it between the two questions.
            if let Some(number) = index_if_there(&interface)?
                && unwanted(&number)
                && let Some(hook) = Hook::find(&interface, Way::Ingress, self.chain, &self.left)?
            {
                hook.unhang()?;
            }
        }
        for left in self.left.drain(..) {
            match fs::remove_file(&left.pin) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).context("remove the pin of an earlier guard");
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Its number now, or `None` if it is gone.
fn number_of(interface: &str) -> Result<Option<u32>, AttachError> {
    let number = index_if_there(interface).context("ask for its number");
    number.map_err(failed(GUARD, interface))
}

/// Every interface of the process's own network namespace, whatever is mounted on /sys.
fn interfaces() -> anyhow::Result<Vec<String>> {
    let table = fs::read_to_string("/proc/thread-self/net/dev").context("list the interfaces")?;
    let names = table.lines().filter_map(|line| line.split_once(':'));
    Ok(names.map(|(name, _)| name.trim().to_owned()).collect())
}
