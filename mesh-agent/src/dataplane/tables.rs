//! Writes the tables into the kernel, step by step, as mesh-core orders them.
//!
//! Two policies lie in the kernel, and one is in use. A change is written into the other, which is
//! then swapped in; and when there is time the same change into what is now the other: work in
//! proportion to the change. Only when one has become too small is another made, and filled with all of it.
//! What a step has done is noted at once, so that after an error the next attempt starts from what
//! really is there.

use std::array;
use std::collections::BTreeMap;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{
    Array, ArrayOfMaps, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuHashMap, PerCpuValues,
};
use aya::{Ebpf, util};
use mesh_common::addr::Prefix;
use mesh_common::budget::{PeerFreed, PeerLoad};
use mesh_common::event::{DenyEntry, DenyKey};
use mesh_common::flow::PICKUP;
use mesh_common::maps::{self, Config, Count};
use mesh_common::place::Secret;
use mesh_common::policy::PolicyPrefix;
use mesh_common::{Address, IdentityEntry, RuleId};
use mesh_core::dataplane::{RowWrite, Settings, TableOp, Tables, layout, reconcile};
use rand_core::{OsRng, RngCore as _};

use super::clock::{self, Clock};
use super::error::AttachError;
use super::established::Established;
use super::options::{Foreign, Options};
use super::policy::Policy;
use crate::sys;

/// `BPF_NOEXIST`: do not overwrite.
const ONLY_NEW: u64 = 1;

#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    #[error("{count} {what}, and the kernel's table holds {capacity}: the old policy stands")]
    Full {
        what: &'static str,
        count: usize,
        capacity: u32,
    },
    #[error("{step}")]
    Kernel {
        step: &'static str,
        #[source]
        source: Box<MapError>,
    },
    /// The policy is loaded, and programs of another layout still filter under the one before.
    #[error("take over from another layout's programs")]
    TakeOver(#[source] anyhow::Error),
    #[error(transparent)]
    Load(AttachError),
    #[error("count the CPUs")]
    Cpus(#[source] std::io::Error),
}

impl ApplyError {
    pub(super) fn at(step: &'static str) -> impl FnOnce(MapError) -> Self {
        move |source| Self::Kernel {
            step,
            source: Box::new(source),
        }
    }
}

/// The kernel's tables, and what we know of their content.
pub struct Kernel {
    pub(super) cfg: Array<MapData, Config>,
    exact: HashMap<MapData, Address, IdentityEntry>,
    cidr: LpmTrie<MapData, Address, IdentityEntry>,
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
    /// The other one, if it is equal to it.
    shadow: Option<Policy>,
    /// The other one, if the last change is still to be made in it.
    behind: Option<(Policy, Vec<RowWrite>)>,
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

fn take<M: TryFrom<Map, Error = MapError>>(
    ebpf: &mut Ebpf,
    map: &'static str,
) -> Result<M, AttachError> {
    let found = ebpf.take_map(map).ok_or(AttachError::Incomplete(map))?;
    M::try_from(found).map_err(|source| AttachError::Map {
        map,
        source: Box::new(source),
    })
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
            exact: take(ebpf, maps::ID_EXACT)?,
            cidr: take(ebpf, maps::ID_CIDR)?,
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
            shadow: None,
            behind: None,
        };
        kernel.adopt().map_err(unreadable)?;
        Ok(kernel)
    }

    /// Reads what an earlier agent left. Its policy cannot be read (that takes CAP_SYS_ADMIN), only
    /// replaced; until then it goes on deciding.
    fn adopt(&mut self) -> Result<(), MapError> {
        let mut identities = BTreeMap::new();
        for entry in &self.exact {
            let (address, entry) = entry?;
            identities.insert(Prefix { len: 128, address }, entry);
        }
        for entry in &self.cidr {
            let (key, entry) = entry?;
            let (len, address) = (key.prefix_len(), key.data());
            identities.insert(Prefix { len, address }, entry);
        }
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

    pub(super) fn apply(&mut self, desired: &Tables) -> Result<(), ApplyError> {
        check_room(desired)?;
        let ops = reconcile(&self.observed, desired);
        let step = ApplyError::at;
        // An agent before us may have died between the two.
        let renames = self.config.identities == 0 || ops.iter().any(is_about_identities);
        if renames {
            // From here on programs ask anew for each packet.
            self.config.identities = 0;
            self.cfg
                .set(0, self.config, 0)
                .map_err(step("say that identities change"))?;
        }
        // First, so that nobody whose number changes is nobody for longer than it takes to swap.
        let mut prepared = match ops.contains(&TableOp::Swap) {
            true => Some(self.prepare(&ops, desired)?),
            false => None,
        };
        for op in &ops {
            match op {
                TableOp::Blank(prefix) => self.identify(*prefix, IdentityEntry::UNKNOWN)?,
                TableOp::Identify(prefix, entry) => self.identify(*prefix, *entry)?,
                TableOp::Forget(prefix) => self.forget(prefix)?,
                // Written already.
                TableOp::SetRow(..) | TableOp::RemoveRow(_) => {}
                TableOp::Settle => sys::maps::wait_for_programs()
                    .map_err(ApplyError::at("wait for packets under way"))?,
                TableOp::Swap => self.swap(prepared.take(), &ops, desired)?,
                TableOp::CountRule(rule) => self.count_rule(*rule)?,
                TableOp::ForgetRule(rule) => {
                    let removed = self.rule_ctr.remove(&rule.0);
                    ignore_missing(removed).map_err(step("forget a rule's counter"))?;
                    self.observed.rules.remove(rule);
                }
                TableOp::Set(settings) => {
                    self.config = settings.set_in(self.config);
                    self.observed.settings = *settings;
                }
            }
        }
        // Never 0, which means that no policy was loaded.
        self.config.generation = self.config.generation.wrapping_add(1).max(1);
        if renames {
            self.config.identities = self.config.generation;
        }
        self.cfg
            .set(0, self.config, 0)
            .map_err(step("raise the generation"))
    }

    /// Rows of the policy in use, and the policies that are in memory.
    pub(super) fn policies(&self) -> (usize, impl Iterator<Item = &MapData>) {
        let behind = self.behind.as_ref().map(|(policy, _)| policy);
        let all = [self.active.as_ref(), self.shadow.as_ref(), behind];
        let maps = all.into_iter().flatten().map(Policy::map);
        (self.observed.rows.len(), maps)
    }

    /// Makes the last change in the policy that has gone out of use. If that fails, the next change starts
    /// from a fresh one.
    pub fn catch_up(&mut self) {
        if let Some((mut before, writes)) = self.behind.take()
            && before.write(&writes).is_ok()
        {
            self.shadow = Some(before);
        }
    }

    /// The policy to come, and what was written into the other of the two for it.
    fn prepare(
        &mut self,
        ops: &[TableOp],
        desired: &Tables,
    ) -> Result<(Policy, Vec<RowWrite>), ApplyError> {
        self.catch_up();
        let writes = layout(changed(ops), &desired.rows);
        let shadow = self.shadow.take();
        let written = shadow.and_then(|mut shadow| shadow.write(&writes).ok().map(|()| shadow));
        let next = match written {
            Some(shadow) => shadow,
            None => {
                let all = layout(desired.rows.keys(), &desired.rows);
                Policy::of(&all).map_err(ApplyError::at("make a map for the policy"))?
            }
        };
        Ok((next, writes))
    }

    fn swap(
        &mut self,
        prepared: Option<(Policy, Vec<RowWrite>)>,
        ops: &[TableOp],
        desired: &Tables,
    ) -> Result<(), ApplyError> {
        let Some((next, writes)) = prepared else {
            return Ok(());
        };
        // When this returns, no CPU uses the old policy any more.
        if let Err(error) = self.outer.set(0, next.map(), 0) {
            return Err(ApplyError::at("swap the policy")(error));
        }
        let before = self.active.replace(next);
        for prefix in changed(ops) {
            match desired.rows.get(prefix) {
                Some(entry) => self.observed.rows.insert(*prefix, *entry),
                None => self.observed.rows.remove(prefix),
            };
        }
        self.behind = before.map(|before| (before, writes));
        Ok(())
    }

    fn identify(&mut self, prefix: Prefix, entry: IdentityEntry) -> Result<(), ApplyError> {
        let written = if prefix.len == 128 {
            self.exact.insert(prefix.address, entry, 0)
        } else {
            let key = Key::new(prefix.len, prefix.address);
            self.cidr.insert(&key, entry, 0)
        };
        written.map_err(ApplyError::at("write who stands behind a prefix"))?;
        self.observed.identities.insert(prefix, entry);
        Ok(())
    }

    fn forget(&mut self, prefix: &Prefix) -> Result<(), ApplyError> {
        let removed = if prefix.len == 128 {
            self.exact.remove(&prefix.address)
        } else {
            self.cidr.remove(&Key::new(prefix.len, prefix.address))
        };
        ignore_missing(removed).map_err(ApplyError::at("forget who stood behind a prefix"))?;
        self.observed.identities.remove(prefix);
        Ok(())
    }

    /// The rule counts from now on; if it did before, it goes on from there.
    fn count_rule(&mut self, rule: RuleId) -> Result<(), ApplyError> {
        let cpus = util::nr_cpus().map_err(|(_, error)| ApplyError::Cpus(error))?;
        let zero =
            PerCpuValues::try_from(vec![Count::default(); cpus]).map_err(ApplyError::Cpus)?;
        match self.rule_ctr.insert(rule.0, zero, ONLY_NEW) {
            Err(MapError::SyscallError(error))
                if error.io_error.raw_os_error() == Some(libc::EEXIST) => {}
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

const fn is_about_identities(op: &TableOp) -> bool {
    matches!(
        op,
        TableOp::Blank(_) | TableOp::Identify(..) | TableOp::Forget(_)
    )
}

fn changed(ops: &[TableOp]) -> impl Iterator<Item = &PolicyPrefix> {
    ops.iter().filter_map(|op| match op {
        TableOp::SetRow(prefix, _) | TableOp::RemoveRow(prefix) => Some(prefix),
        _ => None,
    })
}

fn ignore_missing(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::SyscallError(error))
            if error.io_error.kind() == std::io::ErrorKind::NotFound =>
        {
            Ok(())
        }
        Err(MapError::KeyNotFound) => Ok(()),
        other => other,
    }
}
