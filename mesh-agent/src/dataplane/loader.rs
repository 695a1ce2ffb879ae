//! Loads the object, adopts what an earlier agent left, and hangs the programs on the device.
//!
//! Between two agents, of one layout or of two, there is no moment without a filter: a program is
//! replaced in its place, and one of another layout only when the new maps hold a policy.

use std::collections::BTreeMap;
use std::fs;
use std::io;

use anyhow::Context as _;
use aya::maps::Map;
use aya::programs::{ProgramError, SchedClassifier};
use aya::{Ebpf, EbpfLoader};
use mesh_common::Direction;
use mesh_common::event::{DenyEntry, DenyKey, EventKind, Explanation};
use mesh_common::flow::{FlowEntry, FlowKey, Stage};
use mesh_common::half_open::{SETS, WAYS};
use mesh_common::maps::{self, PINNED};
use mesh_core::dataplane::Tables;
use mesh_core::dataplane::vigil::{Lapse, Standing};
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::attach::{self, Chain, Hook, Way};
use super::clock::Clock;
use super::dry;
use super::error::{ApplyError, AttachError, failed};
use super::events;
use super::guard::{AT_ONCE, GUARD, Guards};
use super::half_open::REVOKE;
use super::identities::IDENTIFY;
use super::options::{Foreign, Options};
use super::pins::{Folder, Pins, Role};
use super::probe;
use super::tables::Kernel;
use super::takeover::{carry_flows, carry_half_open, found, hang, hang_or_wait, left};
use super::usage::{Usage, memory};
use super::{Counters, FlowEvent};

/// The programs on one device, and their tables. Dropping it leaves both as they are.
#[derive(Debug)]
pub struct Dataplane {
    ebpf: Ebpf,
    interface: String,
    chain: Chain,
    pins: Pins,
    ingress: Hook,
    egress: Hook,
    /// Names of the two programs in the object.
    names: [&'static str; 2],
    /// Other layouts' folders, until the first policy is loaded.
    earlier: Vec<Folder>,
    guards: Guards,
    kernel: Kernel,
    events: Option<Map>,
    found: Option<Standing>,
}

const INGRESS: (Role, Way) = (Role::Ingress, Way::Ingress);
const EGRESS: (Role, Way) = (Role::Egress, Way::Egress);

impl Dataplane {
    /// Filters both directions of `interface` from here on: under what an earlier agent left, or,
    /// if there is nothing, by dropping everything until [`Dataplane::apply`]. Programs of another
    /// layout stay where they are until then.
    ///
    /// Blocks for some tens of milliseconds while the kernel verifies.
    pub fn attach(interface: &str, options: &Options) -> Result<Self, AttachError> {
        let folder = Folder::open(&options.pin_dir)?;
        folder.check_layout()?;
        let mut ebpf = load(&folder, options)?;
        let names = match options.foreign {
            Some(Foreign { ethernet: true, .. }) => ["mesh_in_l2", "mesh_eg_l2"],
            _ => ["mesh_in", "mesh_eg"],
        };
        let clock =
            Clock::set(classifier(&mut ebpf, "ticks")?).map_err(|source| AttachError::Program {
                program: "ticks",
                source: Box::new(source),
            })?;
        // Now, so that a kernel that refuses it does so here and not at the first change of policy.
        classifier(&mut ebpf, REVOKE)?;
        classifier(&mut ebpf, IDENTIFY)?;
        let failed = |program| failed(program, interface);
        let earlier = folder
            .others()
            .map_err(|source| failed(names[0])(source.into()))?;
        let mut kernel = Kernel::open(&mut ebpf)?;
        kernel.configure(options, clock, earlier.is_empty())?;
        let events = ebpf.take_map(maps::EVENTS);
        if events.is_none() {
            return Err(AttachError::Incomplete(maps::EVENTS));
        }
        let chain = options.chain();
        let found = found(interface, chain, &folder, &earlier).map_err(failed(names[0]))?;
        let mut hang = |program, end| {
            let loaded = classifier(&mut ebpf, program)?;
            hang_or_wait(loaded, interface, end, chain, &folder, &earlier).map_err(failed(program))
        };
        let ingress = hang(names[0], INGRESS)?;
        let egress = hang(names[1], EGRESS)?;
        let guard = classifier(&mut ebpf, GUARD)?;
        let guards = Guards::new(guard, &folder, &earlier, options).map_err(failed(GUARD))?;
        Ok(Self {
            ebpf,
            interface: interface.to_owned(),
            chain,
            pins: Pins::of(folder)?,
            ingress,
            egress,
            names,
            earlier,
            guards,
            kernel,
            events,
            found,
        })
    }

    /// Where the programs of an earlier agent were when these were hung; `None` if it has left none.
    pub fn found(&self) -> Option<Standing> {
        self.found
    }

    /// Whether programs hang on `interface` that an agent of ours may have left, and no pin by which
    /// to take them over: they would go on under a policy that nobody can change.
    pub fn is_orphaned(interface: &str, options: &Options) -> Result<bool, AttachError> {
        let folder = Folder::open(&options.pin_dir)?;
        let look = || -> anyhow::Result<bool> {
            let mut folders = folder.others()?;
            folders.push(folder);
            let mut left = Vec::new();
            for folder in &folders {
                left.extend(folder.programs(Role::Ingress)?);
            }
            // A clsact filter is replaced without being known.
            Ok(left.is_empty()
                && options.chain() == Chain::Tcx
                && attach::count(interface, Way::Ingress, Chain::Tcx)? > 0)
        };
        look().map_err(failed("mesh_in", interface))
    }

    /// Makes the tables what they should be, and every running flow be judged anew. On an error the
    /// old policy stands.
    ///
    /// Blocks for some tens of milliseconds where the change before is not made on both sides yet: the kernel
    /// waits until no CPU uses the policy before that.
    pub fn apply(&mut self, tables: &Tables) -> Result<(), ApplyError> {
        let identify = classifier(&mut self.ebpf, IDENTIFY).map_err(ApplyError::Load)?;
        self.kernel.apply(tables, identify)?;
        if self.earlier.is_empty() {
            return Ok(());
        }
        self.take_over().map_err(ApplyError::TakeOver)
    }

    /// Puts our programs in the place of another layout's.
    fn take_over(&mut self) -> anyhow::Result<()> {
        self.carry_flows()?;
        for from in &self.earlier {
            carry_half_open(from, &self.pins.folder, &self.kernel.config)?;
        }
        self.hang()?;
        // Those that were opened meanwhile.
        let flows = self.carry_flows()?;
        self.guards.mend(classifier(&mut self.ebpf, GUARD)?).1?;
        for folder in self.earlier.drain(..) {
            folder.remove().context("remove another layout's pins")?;
        }
        info!(flows, "took over from another layout");
        Ok(())
    }

    fn carry_flows(&mut self) -> anyhow::Result<usize> {
        let flows = &mut self.kernel.established;
        let folders = self.earlier.iter();
        folders.map(|from| carry_flows(from, flows)).sum()
    }

    /// Puts the programs where they should be, in the place of any earlier agent's.
    pub fn hang(&mut self) -> anyhow::Result<()> {
        let (folder, chain) = (&self.pins.folder, self.chain);
        for (hook, name, (role, way)) in [
            (&mut self.ingress, self.names[0], INGRESS),
            (&mut self.egress, self.names[1], EGRESS),
        ] {
            let program = classifier(&mut self.ebpf, name)?;
            let left = left(folder, &self.earlier, role)?;
            *hook = hang(program, &self.interface, (role, way), chain, folder, &left)?;
        }
        Ok(())
    }

    /// Keeps packets for this node's mesh addresses, and from those of the mesh, from coming in on these interfaces:
    /// all but the mesh's own; loopback is left out. Told the whole set each time. An interface that is gone is no error.
    pub fn guard<'a>(
        &mut self,
        interfaces: impl IntoIterator<Item = &'a str>,
    ) -> Result<(), AttachError> {
        self.want_guards(interfaces)?;
        while self.hang_guards()? {}
        Ok(())
    }

    /// The first half of [`Self::guard`].
    pub fn want_guards<'a>(
        &mut self,
        interfaces: impl IntoIterator<Item = &'a str>,
    ) -> Result<(), AttachError> {
        // Ours know no address yet, and those of the earlier agent do.
        if !self.earlier.is_empty() {
            return Ok(());
        }
        self.guards.want(interfaces)
    }

    /// The second half, a few at a time; true: there is more to do.
    pub fn hang_guards(&mut self) -> Result<bool, AttachError> {
        if !self.earlier.is_empty() {
            return Ok(false);
        }
        let program = classifier(&mut self.ebpf, GUARD)?;
        self.guards.hang(program, AT_ONCE)
    }

    /// Puts back guards that somebody took off; returns what was wrong, by interface, and what could not be done.
    pub fn mend_guards(&mut self) -> (Vec<(String, Lapse)>, anyhow::Result<()>) {
        match classifier(&mut self.ebpf, GUARD) {
            Ok(program) => self.guards.mend(program),
            Err(error) => (Vec::new(), Err(error.into())),
        }
    }

    /// What was passed, dropped and decided since the maps were made.
    pub fn counters(&self) -> Result<Counters, ApplyError> {
        self.kernel.counters()
    }

    /// How many events of each kind were lost since this was last asked, of an agent before this one too.
    pub fn losses(&mut self) -> Result<BTreeMap<EventKind, u64>, ApplyError> {
        self.kernel.losses()
    }

    /// What becomes of flows and packets from now on; `None` if asked before. Needs a tokio runtime.
    pub fn events(&mut self) -> io::Result<Option<mpsc::Receiver<FlowEvent>>> {
        self.events.take().map(events::read).transpose()
    }

    /// Forgets flows whose time is long over; returns how many stand. To be called every few seconds:
    /// the packet path honours timeouts by itself, this frees their memory. And does what the last change
    /// has left for later.
    pub fn sweep(&mut self) -> Result<usize, ApplyError> {
        let caught_up = self.catch_up();
        let swept = self.kernel.sweep();
        caught_up.and(swept)
    }

    /// Does what the last change of the policy has left for later.
    pub fn catch_up(&mut self) -> Result<(), ApplyError> {
        let identify = classifier(&mut self.ebpf, IDENTIFY).map_err(ApplyError::Load)?;
        self.kernel.catch_up(identify)
    }

    /// Whether the last sweep found so many established flows that no more are taken in.
    pub fn is_full(&self) -> bool {
        self.kernel.is_full()
    }

    /// Ends the flows that `tables` no longer allow, and returns them with their tombstones. To be called
    /// with what was applied, after every change: packets of such flows are dropped in any case, this tells of those
    /// that send none.
    pub fn review(&mut self, tables: &Tables) -> Result<Vec<(FlowKey, FlowEntry)>, ApplyError> {
        // No packet is under way any more that would open a flow by the policy before.
        if let Err(error) = self.catch_up() {
            warn!(%error, "make the change of the policy on the other side");
        }
        let revoke = classifier(&mut self.ebpf, REVOKE).map_err(ApplyError::Load)?;
        self.kernel.review(tables, revoke)
    }

    /// Flows of one stage, with what they carried.
    pub fn flows(&self, stage: Stage) -> Result<Vec<(FlowKey, FlowEntry)>, ApplyError> {
        self.kernel.flows(stage)
    }

    /// A flow that was established, if it is still there.
    pub fn flow(&self, key: &FlowKey) -> Option<FlowEntry> {
        self.kernel.flow(key)
    }

    /// How full the maps are.
    pub fn usage(&self) -> anyhow::Result<Vec<Usage>> {
        let mut usage = self.pins.usage()?;
        // Its elements are not its entries.
        let half_open = usage.iter_mut().find(|usage| usage.map == maps::CT_NEW);
        if let Some(half_open) = half_open {
            half_open.entries = self.kernel.flows(Stage::HalfOpen)?.len() as u64;
            half_open.capacity *= WAYS as u64;
        }
        for usage in &mut usage {
            if matches!(usage.map, maps::ID_EXACT | maps::ID_CIDR | maps::RULE_CTR) {
                usage.capacity /= u64::from(maps::ROOM);
            }
        }
        // That one holds but the maps that hold the policies.
        let policy = usage.iter_mut().find(|usage| usage.map == maps::POL);
        if let Some(policy) = policy {
            let (rows, tables) = self.kernel.policies();
            policy.entries = rows as u64;
            policy.capacity = maps::POLICY_CAPACITY.into();
            for table in tables {
                policy.memory_bytes += memory(table)?;
            }
        }
        Ok(usage)
    }

    /// What the programs would do with the packet, which goes this way: asked of dry ones over the same
    /// maps, which remember nothing and count nothing.
    pub fn explain(&mut self, direction: Direction, packet: &[u8]) -> anyhow::Result<Explanation> {
        let name = match direction {
            Direction::Ingress => "why_in",
            Direction::Egress => "why_eg",
        };
        let mut out = vec![0; packet.len()];
        dry::run(classifier(&mut self.ebpf, name)?, packet, &mut out)?;
        Explanation::from_bytes(&out).context("a dry run gave back too little")
    }

    /// Denied packets, counted since the maps were made.
    pub fn denials(&self) -> Result<Vec<(DenyKey, DenyEntry)>, ApplyError> {
        self.kernel.denials()
    }

    /// Whether our programs still are where they were put, and nobody's before them.
    pub fn standing(&mut self) -> io::Result<Standing> {
        let standing = self.ingress.standing()?.max(self.egress.standing()?);
        self.ingress.told();
        self.egress.told();
        Ok(standing)
    }

    /// Whether the next agent would find maps and programs.
    pub fn is_pinned(&self) -> bool {
        // An earlier layout's still hang where ours will.
        let hooks = [(Role::Ingress, &self.ingress), (Role::Egress, &self.egress)];
        let hooks = hooks.iter().filter(|_| self.earlier.is_empty());
        let mut programs = hooks
            .map(|(role, hook)| (*role, hook.program_id()))
            .chain([(Role::Guard, self.guards.program_id())]);
        self.pins.are_there()
            && programs.all(|(role, id)| self.pins.folder.program(role, id).exists())
    }

    /// Pins again what is not pinned any more.
    pub fn pin(&mut self) -> anyhow::Result<()> {
        let base = self.pins.folder.base();
        // On a file system that was mounted anew it is yet to be made.
        let place = base.ancestors().find(|place| place.exists());
        anyhow::ensure!(
            probe::is_bpffs(place.unwrap_or(base))?,
            "{} is not on a BPF file system",
            base.display()
        );
        self.pins.mend()?;
        let [ingress, egress] = self.names;
        for (role, name) in [
            (Role::Ingress, ingress),
            (Role::Egress, egress),
            (Role::Guard, GUARD),
        ] {
            self.pins
                .folder
                .keep(role, classifier(&mut self.ebpf, name)?)?;
        }
        Ok(())
    }

    /// Takes programs and maps away. The device must be down: from here nothing filters.
    pub fn detach(mut self) -> anyhow::Result<()> {
        self.guards.clear()?;
        self.ingress.unhang()?;
        self.egress.unhang()?;
        for folder in self.earlier.iter().chain([&self.pins.folder]) {
            match folder.remove() {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        Ok(())
    }

    /// A loaded program, for whoever measures or tests it.
    pub fn program(&self, name: &str) -> Option<&SchedClassifier> {
        self.ebpf.program(name)?.try_into().ok()
    }

    /// The same, loaded if it was not.
    pub fn load_program(&mut self, name: &'static str) -> Result<&SchedClassifier, AttachError> {
        classifier(&mut self.ebpf, name).map(|program| &*program)
    }

    /// The object, for its log records.
    pub fn object(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// The tables in the kernel.
    pub fn kernel(&mut self) -> &mut Kernel {
        &mut self.kernel
    }
}

/// As often as libbpf tries.
const ATTEMPTS: u32 = 5;

fn load(folder: &Folder, options: &Options) -> Result<Ebpf, AttachError> {
    let mut loader = EbpfLoader::new();
    for name in PINNED {
        loader.map_pin_path(name, folder.map(name));
    }
    loader.map_max_entries(maps::CT_EST, options.flow_capacity());
    loader.map_max_entries(maps::CT_NEW, options.half_open_sets.unwrap_or(SETS));
    let loaded = match (&options.object_path, probe::EMBEDDED) {
        (Some(path), _) => {
            let object = fs::read(path).map_err(|source| AttachError::Object {
                path: path.clone(),
                source,
            })?;
            loader.load(&object)
        }
        (None, Some(object)) => loader.load(object),
        (None, None) => return Err(AttachError::NoObject),
    };
    loaded.map_err(|source| AttachError::Load(Box::new(source)))
}

/// The program, loaded into the kernel if it was not.
fn classifier<'a>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, AttachError> {
    let program = ebpf
        .program_mut(name)
        .ok_or(AttachError::Incomplete(name))?;
    let failed = |source| AttachError::Program {
        program: name,
        source: Box::new(source),
    };
    let program: &mut SchedClassifier = program.try_into().map_err(failed)?;
    let mut attempts = 0;
    while program.fd().is_err() {
        attempts += 1;
        match program.load() {
            Err(error) if was_interrupted(&error) && attempts < ATTEMPTS => {}
            result => result.map_err(failed)?,
        }
    }
    Ok(program)
}

/// The verifier gives up for a signal, even one that is for another thread and nobody minds, as SIGCHLD.
fn was_interrupted(error: &ProgramError) -> bool {
    matches!(error, ProgramError::LoadError { io_error, .. } if io_error.kind() == io::ErrorKind::WouldBlock)
}
