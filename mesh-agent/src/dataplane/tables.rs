//! Writes the tables into the kernel, step by step, as mesh-core orders them.
//!
//! Two sides lie in the kernel, and one is in use. A change is written into the other, which the next
//! generation then puts in use; and when no packet asks the first one any more, the same change into that: work
//! in proportion to the change. Only when a policy has become too small is another made, and filled with all of it.
//! Until the generation is raised nothing has happened: after an error the next attempt first gives the other
//! side what the one in use has.

use std::array;

use aya::maps::{
    Array, ArrayOfMaps, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuHashMap, PerCpuValues,
};
use aya::programs::SchedClassifier;
use aya::{Ebpf, util};
use mesh_common::addr::Prefix;
use mesh_common::budget::{PeerFreed, PeerLoad};
use mesh_common::event::{DenyEntry, DenyKey};
use mesh_common::flow::PICKUP;
use mesh_common::maps::{self, Config, Count};
use mesh_common::place::Secret;
use mesh_common::policy::PolicyPrefix;
use mesh_common::{RuleId, Sides, next_generation, side};
use mesh_core::dataplane::{RowWrite, Settings, TableOp, Tables, Turn, layout, reconcile};
use rand_core::{OsRng, RngCore as _};

use super::clock::{self, Clock};
use super::entries::{ONLY_NEW, ignore_missing, is_there, take};
use super::error::{ApplyError, AttachError};
use super::established::Established;
use super::identities::Identities;
use super::options::{Foreign, Options};
use super::policy::Policy;
use crate::sys;

/// The kernel's tables, and what we know of their content.
pub struct Kernel {
    pub(super) cfg: Array<MapData, Config>,
    identities: Identities,
    outer: ArrayOfMaps<MapData, MapData>,
    rule_ctr: PerCpuHashMap<MapData, u32, Count>,
    pub(super) reason_ctr: PerCpuArray<MapData, Count>,
    pub(super) events_lost: PerCpuArray<MapData, u64>,
    pub(super) established: Established,
    /// [`mesh_common::half_open::Set`]s.
    pub(super) half_open: MapData,
    pub(super) peer_load: HashMap<MapData, u32, PeerLoad>,
    pub(super) peer_freed: HashMap<MapData, u32, PeerFreed>,
    /// Established flows that the kernel's table holds: whoever made it has decided.
    pub(super) flow_capacity: u32,
    pub(super) denials: HashMap<MapData, DenyKey, DenyEntry>,
    pub(super) config: Config,
    observed: Tables,
    /// The policy in use, once it is one of ours.
    active: Option<Policy>,
    /// That of the other side, if it lacks nothing but `behind`.
    other: Option<Policy>,
    /// What the other side still lacks.
    behind: Option<Change>,
}

/// What one side has and the other has not.
#[derive(Default)]
struct Change {
    rows: Vec<RowWrite>,
    prefixes: Vec<Prefix>,
    /// Counted no more.
    rules: Vec<RuleId>,
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Kernel {
    pub(super) fn open(ebpf: &mut Ebpf) -> Result<Self, AttachError> {
        let flow_capacity = match ebpf.map(maps::CT_EST) {
            Some(Map::HashMap(flows)) => flows.info(),
            _ => return Err(AttachError::Incomplete(maps::CT_EST)),
        };
        let flow_capacity = flow_capacity.map_err(|source| AttachError::Map {
            map: maps::CT_EST,
            source: Box::new(source),
        })?;
        let cfg: Array<_, Config> = take(ebpf, maps::CFG)?;
        let unreadable = |source| AttachError::Map {
            map: "of an earlier agent",
            source: Box::new(source),
        };
        let mut config = cfg.get(&0, 0).map_err(unreadable)?;
        // Drawn once for the tables: by it lie the flows that are there already.
        let is_new = config.secret == Secret::default();
        while config.secret == Secret::default() {
            config.secret = Secret(array::from_fn(|_| OsRng.next_u32()));
        }
        let mut established = Established::new(take(ebpf, maps::CT_EST)?, config.secret);
        if is_new {
            established.clear().map_err(unreadable)?;
        }
        let mut kernel = Self {
            flow_capacity: flow_capacity.max_entries(),
            cfg,
            identities: Identities::open(ebpf)?,
            outer: take(ebpf, maps::POL)?,
            rule_ctr: take(ebpf, maps::RULE_CTR)?,
            reason_ctr: take(ebpf, maps::REASON_CTR)?,
            events_lost: take(ebpf, maps::EVENT_LOST)?,
            established,
            half_open: match ebpf.take_map(maps::CT_NEW) {
                Some(Map::Array(sets)) => sets,
                _ => return Err(AttachError::Incomplete(maps::CT_NEW)),
            },
            peer_load: take(ebpf, maps::PEER_LOAD)?,
            peer_freed: take(ebpf, maps::PEER_FREED)?,
            denials: take(ebpf, maps::DENY_AGG)?,
            config,
            observed: Tables::default(),
            active: None,
            other: None,
            behind: None,
        };
        kernel.adopt().map_err(unreadable)?;
        Ok(kernel)
    }

    /// Reads what an earlier agent left. Its policy cannot be read (that takes CAP_SYS_ADMIN), only
    /// replaced; until then it goes on deciding.
    fn adopt(&mut self) -> Result<(), MapError> {
        let identities = self.identities.read(self.config.generation)?;
        // It may have died in the midst of writing.
        self.behind = Some(Change {
            prefixes: identities.keys().copied().collect(),
            ..Change::default()
        });
        let rules = self.rule_ctr.keys().map(|rule| rule.map(RuleId));
        let settings = Settings::of(&self.config);
        self.observed = Tables::unreadable(identities, rules.collect::<Result<_, _>>()?, settings);
        Ok(())
    }

    /// `first`: no agent of another layout was here.
    pub(super) fn configure(
        &mut self,
        options: &Options,
        clock: Clock,
        first: bool,
    ) -> Result<(), AttachError> {
        self.config.peer_flows = self.share();
        self.config.clock_base = clock.base;
        self.config.clock_tick = clock.tick;
        // Nothing was ever judged here: connections may have begun before.
        if first && self.config.generation == 0 && self.established.is_empty() {
            self.config.pickup_until = clock::now() + PICKUP;
        }
        let sets = self.half_open.info().map_err(|source| AttachError::Map {
            map: maps::CT_NEW,
            source: Box::new(source),
        })?;
        self.config.half_open_mask = sets.max_entries().wrapping_sub(1);
        self.config.flags = 0;
        if options.log {
            self.config.flags |= Config::LOG;
        }
        if matches!(options.foreign, Some(Foreign { observe: true, .. })) {
            self.config.flags |= Config::OBSERVE;
        }
        self.cfg
            .set(0, self.config, 0)
            .map_err(|source| AttachError::Map {
                map: maps::CFG,
                source: Box::new(source),
            })
    }

    /// `identify` is the program of that name.
    pub(super) fn apply(
        &mut self,
        desired: &Tables,
        identify: &SchedClassifier,
    ) -> Result<(), ApplyError> {
        check_room(desired)?;
        self.catch_up(identify)?;
        let ops = reconcile(&self.observed, desired);
        let mut change = Change {
            rows: layout(changed(&ops), &desired.rows),
            ..Change::default()
        };
        let generation = next_generation(self.config.generation);
        let prefixes = ops.iter().filter_map(|op| match op {
            TableOp::Identify(prefix, _) => Some(*prefix),
            _ => None,
        });
        change.prefixes = prefixes.collect();
        // If we come no further, what was begun on the other side is undone: there, too, they are what is in use.
        self.behind = Some(Change {
            prefixes: change.prefixes.clone(),
            ..Change::default()
        });
        let next = self.prepare(&change.rows, desired, generation)?;
        let mut config = self.config;
        for op in &ops {
            match op {
                // Written already.
                TableOp::SetRow(..) | TableOp::RemoveRow(_) => {}
                TableOp::Identify(prefix, Turn { before, after }) => {
                    let sides = Sides::turn(generation, *before, *after);
                    self.identities.write(prefix, sides, identify)?;
                }
                TableOp::CountRule(rule) => self.count_rule(*rule)?,
                TableOp::ForgetRule(rule) => change.rules.push(*rule),
                TableOp::Set(settings) => config = settings.set_in(config),
            }
        }
        config.generation = generation;
        self.cfg
            .set(0, config, 0)
            .map_err(ApplyError::at("raise the generation"))?;
        self.config = config;
        self.other = self.active.replace(next);
        self.observe(&ops, desired);
        self.behind = Some(change);
        Ok(())
    }

    /// Notes what is in use now.
    fn observe(&mut self, ops: &[TableOp], desired: &Tables) {
        let observed = &mut self.observed;
        for op in ops {
            match op {
                TableOp::SetRow(prefix, entry) => {
                    observed.rows.insert(*prefix, *entry);
                }
                TableOp::RemoveRow(prefix) => {
                    observed.rows.remove(prefix);
                }
                TableOp::Identify(prefix, turn) => {
                    if desired.identities.contains_key(prefix) {
                        observed.identities.insert(*prefix, turn.after);
                    } else {
                        observed.identities.remove(prefix);
                    }
                }
                TableOp::Set(settings) => observed.settings = *settings,
                TableOp::ForgetRule(rule) => {
                    observed.rules.remove(rule);
                }
                // Noted when done.
                TableOp::CountRule(_) => {}
            }
        }
    }

    /// Rows of the policy in use, and the policies that are in memory.
    pub(super) fn policies(&self) -> (usize, impl Iterator<Item = &MapData>) {
        let all = [self.active.as_ref(), self.other.as_ref()];
        let maps = all.into_iter().flatten().map(Policy::map);
        (self.observed.rows.len(), maps)
    }

    /// Makes the last change in the side that has gone out of use.
    pub(super) fn catch_up(&mut self, identify: &SchedClassifier) -> Result<(), ApplyError> {
        let Some(change) = self.behind.take() else {
            return Ok(());
        };
        let made = self.repeat(&change, identify);
        if made.is_err() {
            self.behind = Some(change);
        }
        made
    }

    fn repeat(&mut self, change: &Change, identify: &SchedClassifier) -> Result<(), ApplyError> {
        let wait =
            || sys::maps::wait_for_programs().map_err(ApplyError::at("wait for packets under way"));
        wait()?;
        let (used, gone): (Vec<&Prefix>, Vec<_>) = change
            .prefixes
            .iter()
            .partition(|prefix| self.observed.identities.contains_key(*prefix));
        // First, as it makes room: which no other entry may take as long as a program reads this one.
        for prefix in &gone {
            self.identities.forget(prefix)?;
        }
        if !gone.is_empty() {
            wait()?;
        }
        for prefix in used {
            let sides = Sides::both(self.observed.identities[prefix]);
            self.identities.write(prefix, sides, identify)?;
        }
        for rule in &change.rules {
            let removed = self.rule_ctr.remove(&rule.0);
            ignore_missing(removed).map_err(ApplyError::at("forget a rule's counter"))?;
        }
        // Without room the next change makes another.
        self.other = self
            .other
            .take()
            .and_then(|mut other| other.write(&change.rows).ok().map(|()| other));
        Ok(())
    }

    /// The policy of the generation to come, where its packets will look for it.
    fn prepare(
        &mut self,
        rows: &[RowWrite],
        desired: &Tables,
        generation: u32,
    ) -> Result<Policy, ApplyError> {
        if let Some(mut other) = self.other.take()
            && other.write(rows).is_ok()
        {
            return Ok(other);
        }
        let all = layout(desired.rows.keys(), &desired.rows);
        let made = Policy::of(&all).map_err(ApplyError::at("make a map for the policy"))?;
        let slot = side(generation);
        self.outer
            .set(slot, made.map(), 0)
            .map_err(ApplyError::at("put the policy beside the one in use"))?;
        Ok(made)
    }

    /// The rule counts from now on; if it did before, it goes on from there.
    fn count_rule(&mut self, rule: RuleId) -> Result<(), ApplyError> {
        let cpus = util::nr_cpus().map_err(|(_, error)| ApplyError::Cpus(error))?;
        let zero =
            PerCpuValues::try_from(vec![Count::default(); cpus]).map_err(ApplyError::Cpus)?;
        match self.rule_ctr.insert(rule.0, zero, ONLY_NEW) {
            Err(error) if is_there(&error) => {}
            other => other.map_err(ApplyError::at("make a rule's counter"))?,
        }
        self.observed.rules.insert(rule);
        Ok(())
    }

    /// Counts of every rule that is counted.
    pub(super) fn rules(&self) -> Result<Vec<(RuleId, PerCpuValues<Count>)>, MapError> {
        let counted = self.observed.rules.iter();
        counted
            .map(|rule| Ok((*rule, self.rule_ctr.get(&rule.0, 0)?)))
            .collect()
    }

    /// Confirmed flows.
    pub fn established(&mut self) -> &mut Established {
        &mut self.established
    }

    /// What the packet path compares a flow's own generation with.
    pub fn generation(&self) -> u32 {
        self.config.generation
    }
}

fn check_room(tables: &Tables) -> Result<(), ApplyError> {
    let hosts = tables
        .identities
        .keys()
        .filter(|prefix| prefix.len == 128)
        .count();
    let nets = tables.identities.len() - hosts;
    for (what, count, capacity) in [
        ("addresses of nodes", hosts, maps::ID_EXACT_CAPACITY),
        ("routes", nets, maps::ID_CIDR_CAPACITY),
        ("rows of policy", tables.rows.len(), maps::POLICY_CAPACITY),
        ("rules", tables.rules.len(), maps::RULE_CAPACITY),
    ] {
        if count > capacity as usize {
            return Err(ApplyError::Full {
                what,
                count,
                capacity,
            });
        }
    }
    Ok(())
}

fn changed(ops: &[TableOp]) -> impl Iterator<Item = &PolicyPrefix> {
    ops.iter().filter_map(|op| match op {
        TableOp::SetRow(prefix, _) | TableOp::RemoveRow(prefix) => Some(prefix),
        _ => None,
    })
}
