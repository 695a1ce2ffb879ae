//! The guard program on a changing set of interfaces.
//!
//! Interfaces come and go and change names, so a guard is known by the number of its interface. What
//! guards an earlier agent hung is known by its program's pin, which stays until each was found; and where
//! the pin is lost, by the number of the program, which was noted.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::Context as _;
use aya::programs::SchedClassifier;
use mesh_core::dataplane::vigil::{Lapse, Standing};

use super::AttachError;
use super::attach::{Chain, Hook, Left, Way, index_if_there};
use super::error::failed;
use super::numbers::Numbers;
use super::options::Options;
use super::pins::{Folder, Role};
use super::takeover::left_in;

/// The program's name in the object.
pub(super) const GUARD: &str = "guard";

/// Guards that are hung in one go: each takes the kernel some 20 ms, and others wait.
pub(super) const AT_ONCE: usize = 4;
/// LOOPBACK_IFINDEX of the kernel, the same in every network namespace.
const LOOPBACK: u32 = 1;

/// Guards that hang, by interface number.
#[derive(Debug)]
pub(super) struct Guards {
    hooks: BTreeMap<u32, Hook>,
    /// Numbers of the interfaces that are to have a guard, and names of those that have none yet.
    wanted: BTreeSet<u32>,
    missing: BTreeSet<String>,
    /// Those on which none could be hung, and why, of the first.
    refused: BTreeSet<String>,
    refusal: Option<AttachError>,
    /// Earlier agents' programs, until their guards are ours or gone.
    left: Vec<Left>,
    /// Numbers of those that no pin leads to any more.
    unpinned: BTreeSet<u32>,
    numbers: Option<Numbers>,
    chain: Chain,
    program_id: u32,
}

impl Guards {
    /// None hangs yet, but perhaps an earlier agent's.
    pub(super) fn new(
        program: &mut SchedClassifier,
        folder: &Folder,
        earlier: &[Folder],
        options: &Options,
    ) -> anyhow::Result<Self> {
        let mut left = folder.programs(Role::Guard)?;
        left.extend(left_in(earlier, Role::Guard)?);
        folder.keep(Role::Guard, program)?;
        let program_id = program.info()?.id();
        let numbers = options.numbers.clone().map(Numbers::in_file);
        let mut unpinned = BTreeSet::new();
        if let Some(numbers) = &numbers {
            let mut noted = numbers.read();
            noted.extend([program_id]);
            numbers.note(&noted);
            let pinned = |id: &u32| *id == program_id || left.iter().any(|left| left.id == *id);
            unpinned = noted.into_iter().filter(|id| !pinned(id)).collect();
        }
        Ok(Self {
            hooks: BTreeMap::new(),
            wanted: BTreeSet::new(),
            missing: BTreeSet::new(),
            refused: BTreeSet::new(),
            refusal: None,
            left,
            unpinned,
            numbers,
            chain: options.chain(),
            program_id,
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
        self.refused.clear();
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

    /// Hangs guards that are missing, at most so many; true: there are more. At last takes away those that nobody
    /// wants, or says what was refused.
    pub(super) fn hang(
        &mut self,
        program: &mut SchedClassifier,
        at_most: usize,
    ) -> Result<bool, AttachError> {
        for _ in 0..at_most {
            let Some(interface) = self.missing.pop_first() else {
                break;
            };
            // The others are not to be open for this one's sake.
            if let Err(error) = self.hang_on(program, &interface) {
                self.refused.insert(interface);
                self.refusal = self.refusal.take().or(Some(error));
            }
        }
        if !self.missing.is_empty() {
            return Ok(true);
        }
        if let Some(refusal) = self.refusal.take() {
            return Err(refusal);
        }
        let wanted = std::mem::take(&mut self.wanted);
        let taken = self.take_away(|number| !wanted.contains(number));
        self.wanted = wanted;
        taken.map_err(failed(GUARD, "interfaces no longer there"))?;
        // They hung where a guard hangs now.
        let unpinned = std::mem::take(&mut self.unpinned);
        if let Some(numbers) = self.numbers.as_ref().filter(|_| !unpinned.is_empty()) {
            numbers.note(&BTreeSet::from([self.program_id]));
        }
        Ok(false)
    }

    fn hang_on(
        &mut self,
        program: &mut SchedClassifier,
        interface: &str,
    ) -> Result<(), AttachError> {
        let Some(number) = number_of(interface)? else {
            return Ok(());
        };
        // Another may have taken the name meanwhile.
        self.wanted.insert(number);
        let way = Way::Ingress;
        let hook = Hook::hang(
            program,
            interface,
            way,
            self.chain,
            &self.left,
            &self.unpinned,
        );
        self.hooks
            .insert(number, hook.map_err(failed(GUARD, interface))?);
        Ok(())
    }

    /// Hangs again what was taken off, a few at a time; returns what was wrong and where, and what could not be
    /// asked or done.
    pub(super) fn mend(
        &mut self,
        program: &mut SchedClassifier,
    ) -> (Vec<(String, Lapse)>, anyhow::Result<()>) {
        let missing = self.missing.iter().chain(&self.refused).cloned();
        let mut lapses: Vec<_> = missing.map(|name| (name, Lapse::Missing)).collect();
        let mut result = Ok(());
        let mut left = AT_ONCE;
        for (number, hook) in &mut self.hooks {
            match mend(*number, hook, program, self.chain, &mut left) {
                Ok(None) => {}
                Ok(Some(lapse)) => lapses.push((hook.interface().to_owned(), lapse)),
                Err(error) => result = result.and(Err(error)),
            }
        }
        (lapses, result)
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

/// What is wrong with one guard; `left` says how many may still be hung again.
fn mend(
    number: u32,
    hook: &mut Hook,
    program: &mut SchedClassifier,
    chain: Chain,
    left: &mut usize,
) -> anyhow::Result<Option<Lapse>> {
    let interface = hook.interface().to_owned();
    // One that is gone, or has a new name, is for those who are told of interfaces.
    let is_there = || anyhow::Ok(index_if_there(&interface)? == Some(number));
    if !is_there()? {
        return Ok(None);
    }
    let lapse = match hook.standing()? {
        Standing::First => return Ok(None),
        Standing::FirstAgain => Lapse::Visited,
        Standing::Behind => Lapse::Behind,
        Standing::Gone if !is_there()? => return Ok(None),
        Standing::Gone if *left == 0 => Lapse::Missing,
        Standing::Gone => {
            *left -= 1;
            let none = BTreeSet::new();
            *hook = Hook::hang(program, &interface, Way::Ingress, chain, &[], &none)
                .with_context(|| format!("guard {interface} again"))?;
            Lapse::TakenOff
        }
    };
    hook.told();
    Ok(Some(lapse))
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
