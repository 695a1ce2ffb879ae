//! The guard program on a changing set of interfaces.
//!
//! Interfaces come and go and change names, so a guard is known by the number of its interface. What
//! guards an earlier agent hung is known by its program's pin alone, which stays until each was found.

use std::collections::BTreeMap;
use std::fs;

use anyhow::Context as _;
use aya::programs::SchedClassifier;
use mesh_core::dataplane::vigil::Standing;

use super::AttachError;
use super::attach::{Chain, Hook, Left, Way, index_if_there};
use super::error::failed;
use super::pins::{Folder, Role};
use super::takeover::left_in;

/// The program's name in the object.
pub(super) const GUARD: &str = "guard";

/// Guards that hang, by interface number.
#[derive(Debug)]
pub(super) struct Guards {
    hooks: BTreeMap<u32, Hook>,
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
            left,
            chain,
            program_id: program.info()?.id(),
        })
    }

    pub(super) fn program_id(&self) -> u32 {
        self.program_id
    }

    pub(super) fn set<'a>(
        &mut self,
        program: &mut SchedClassifier,
        interfaces: impl IntoIterator<Item = &'a str>,
    ) -> Result<(), AttachError> {
        let mut wanted = BTreeMap::new();
        for interface in interfaces {
            let number = index_if_there(interface).context("ask for its number");
            // `None`: gone since the caller looked.
            if let Some(number) = number.map_err(failed(GUARD, interface))? {
                wanted.insert(number, interface);
            }
        }
        let mut refused = None;
        for (number, interface) in &wanted {
            if let Some(hook) = self.hooks.get_mut(number) {
                hook.rename(interface);
                continue;
            }
            match Hook::hang(program, interface, Way::Ingress, self.chain, &self.left) {
                Ok(hook) => drop(self.hooks.insert(*number, hook)),
                // The others are not to be open for this one's sake.
                Err(error) => refused = refused.or(Some(failed(GUARD, interface)(error))),
            }
        }
        if let Some(refused) = refused {
            return Err(refused);
        }
        let unwanted = |number: &u32| !wanted.contains_key(number);
        self.take_away(unwanted)
            .map_err(failed(GUARD, "interfaces no longer there"))
    }

    /// Hangs again what was taken off; returns the interfaces on which something stands before it.
    pub(super) fn mend(&mut self, program: &mut SchedClassifier) -> anyhow::Result<Vec<String>> {
        let mut behind = Vec::new();
        for (number, hook) in &mut self.hooks {
            let interface = hook.interface().to_owned();
            // An interface that is gone, or has a new name, is for the next set.
            if index_if_there(&interface)? != Some(*number) {
                continue;
            }
            match hook.standing()? {
                Standing::First => {}
                Standing::Behind => behind.push(interface),
                Standing::Gone => {
                    *hook = Hook::hang(program, &interface, Way::Ingress, self.chain, &[])
                        .with_context(|| format!("guard {interface} again"))?;
                }
            }
        }
        Ok(behind)
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

/// Every interface of the process's own network namespace, whatever is mounted on /sys.
fn interfaces() -> anyhow::Result<Vec<String>> {
    let table = fs::read_to_string("/proc/thread-self/net/dev").context("list the interfaces")?;
    let names = table.lines().filter_map(|line| line.split_once(':'));
    Ok(names.map(|(name, _)| name.trim().to_owned()).collect())
}
