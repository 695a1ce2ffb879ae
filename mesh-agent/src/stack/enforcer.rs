//! Who judges the packets: programs in the kernel, or the same verdict in process.
//!
//! The kernel's WireGuard without programs would carry packets that nobody judges, so it is refused:
//! the device is removed and the userspace backend taken, whose packets all pass through us.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use mesh_common::event::{DenyEntry, DenyKey};
use mesh_common::flow::{FlowEntry, FlowKey, Stage};
use mesh_common::{Direction, DropReason};
use mesh_core::dataplane::Tables;
use mesh_core::dataplane::vigil::{Lapse, Standing};
use mesh_core::dataplane::why::{Answer, Question};
use mesh_core::health::{Condition, Severity};
use tokio::sync::mpsc;
use tokio::task::block_in_place;

use super::{Settings, index_of, open_options};
use crate::brief;
use crate::dataplane::software::Filter;
use crate::dataplane::{AttachError, Counters, Dataplane, EventKind, FlowEvent, Options, Usage};
use crate::net::{self, Net};
use crate::wg::{self, Backend, Choice, Judgement};

/// Where flows come from that are only asked about: the service of discarding, which no client has.
const ASKING_PORT: u16 = 9;

/// What goes with the programs beside speed.
const UNGUARDED: &str = ", and packets for this node's mesh addresses, or from those of peers, that come in on other interfaces are not dropped (CVE-2019-14899)";

/// How long the programs are left to others while many guards are hung.
const TURN: Duration = Duration::from_millis(1);

/// The filter of one device.
#[derive(Debug)]
pub enum Enforcer {
    Programs(Box<Mutex<Dataplane>>),
    InProcess(Arc<Filter>),
}

impl Enforcer {
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Programs(_) => "ebpf",
            Self::InProcess(_) => "in process",
        }
    }

    pub(super) fn apply(&self, tables: &Tables) -> anyhow::Result<()> {
        match self {
            Self::Programs(programs) => {
                block_in_place(|| locked(programs).apply(tables)).context("load the policy")
            }
            Self::InProcess(filter) => {
                filter.apply(tables);
                Ok(())
            }
        }
    }

    /// Keeps the node's mesh addresses from being reached through any interface but `mesh`.
    pub(super) fn guard(&self, mesh: &str) -> anyhow::Result<()> {
        match self {
            Self::Programs(programs) => {
                block_in_place(|| guard(programs, mesh)).context("guard the other interfaces")
            }
            Self::InProcess(_) => Ok(()),
        }
    }

    /// Frees the memory of flows that are over; returns whether there is no room for more all the same.
    pub(super) fn sweep(&self) -> anyhow::Result<bool> {
        match self {
            Self::Programs(programs) => {
                let mut programs = locked(programs);
                block_in_place(|| programs.sweep()).context("sweep the flows")?;
                Ok(programs.is_full())
            }
            Self::InProcess(filter) => {
                filter.sweep();
                Ok(filter.is_full())
            }
        }
    }

    /// Where the filter is; `None` if the kernel would not say.
    pub(super) fn standing(&self) -> Option<Standing> {
        match self {
            Self::Programs(programs) => block_in_place(|| locked(programs).standing())
                .inspect_err(|error| tracing::warn!(%error, "ask where the programs are"))
                .ok(),
            Self::InProcess(_) => Some(Standing::First),
        }
    }

    /// Puts programs that were taken off back where they were.
    pub(super) fn hang(&self) -> anyhow::Result<()> {
        match self {
            Self::Programs(programs) => block_in_place(|| locked(programs).hang()),
            Self::InProcess(_) => Ok(()),
        }
    }

    /// Puts guards back; returns what was wrong, by interface, and what could not be done.
    pub(super) fn mend_guards(&self) -> (Vec<(String, Lapse)>, anyhow::Result<()>) {
        match self {
            Self::Programs(programs) => block_in_place(|| locked(programs).mend_guards()),
            Self::InProcess(_) => (Vec::new(), Ok(())),
        }
    }

    /// Sees to it that the next agent finds maps and programs.
    pub(super) fn keep_pinned(&self) -> anyhow::Result<()> {
        match self {
            Self::Programs(programs) => {
                let mut programs = locked(programs);
                if programs.is_pinned() {
                    return Ok(());
                }
                block_in_place(|| programs.pin())
            }
            Self::InProcess(_) => Ok(()),
        }
    }

    /// What becomes of flows and packets from now on, for one reader.
    pub(super) fn events(&self) -> Option<mpsc::Receiver<FlowEvent>> {
        match self {
            Self::Programs(programs) => locked(programs).events().ok().flatten(),
            Self::InProcess(filter) => Some(filter.events()),
        }
    }

    /// Ends the flows that `tables`, which were applied, no longer allow; returns them.
    pub(super) fn review(&self, tables: &Tables) -> anyhow::Result<Vec<(FlowKey, FlowEntry)>> {
        match self {
            Self::Programs(programs) => {
                block_in_place(|| locked(programs).review(tables)).context("review the flows")
            }
            Self::InProcess(filter) => Ok(filter.review(tables)),
        }
    }

    /// Flows of one stage.
    pub fn flows(&self, stage: Stage) -> anyhow::Result<Vec<(FlowKey, FlowEntry)>> {
        match self {
            Self::Programs(programs) => {
                block_in_place(|| locked(programs).flows(stage)).context("read the flows")
            }
            Self::InProcess(filter) => Ok(filter.flows(stage)),
        }
    }

    /// A flow that was established, if it is still there.
    pub(super) fn flow(&self, key: &FlowKey) -> Option<FlowEntry> {
        match self {
            Self::Programs(programs) => block_in_place(|| locked(programs).flow(key)),
            Self::InProcess(filter) => filter.flow(key),
        }
    }

    /// What would become of a new flow.
    pub fn why(&self, question: &Question, direction: Direction) -> anyhow::Result<Answer> {
        let packet = question.packet(ASKING_PORT);
        match self {
            Self::Programs(programs) => {
                let explained = block_in_place(|| locked(programs).explain(direction, &packet))?;
                Ok(Answer {
                    drop: DropReason::from_number(explained.reason),
                    rule: explained.rule,
                })
            }
            Self::InProcess(filter) => Ok(filter.explain(direction, &packet)),
        }
    }

    /// How full the kernel's maps are; `None` where there are none.
    pub fn usage(&self) -> anyhow::Result<Option<Vec<Usage>>> {
        match self {
            Self::Programs(programs) => {
                let programs = locked(programs);
                block_in_place(|| programs.usage()).map(Some)
            }
            Self::InProcess(_) => Ok(None),
        }
    }

    /// Denied packets, counted.
    pub(super) fn denials(&self) -> anyhow::Result<Vec<(DenyKey, DenyEntry)>> {
        match self {
            Self::Programs(programs) => {
                block_in_place(|| locked(programs).denials()).context("read the denials")
            }
            Self::InProcess(filter) => Ok(filter.denials()),
        }
    }

    /// The clock that stamps flows.
    pub(super) fn clock(&self) -> Duration {
        match self {
            Self::Programs(_) => {
                let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicCoarse);
                Duration::try_from(now).unwrap_or_default()
            }
            Self::InProcess(filter) => filter.clock(),
        }
    }

    pub fn counters(&self) -> anyhow::Result<Counters> {
        match self {
            Self::Programs(programs) => {
                block_in_place(|| locked(programs).counters()).context("read the counters")
            }
            Self::InProcess(filter) => Ok(filter.counters()),
        }
    }

    /// How many events of each kind were lost since this was last asked.
    pub(super) fn losses(&self) -> anyhow::Result<BTreeMap<EventKind, u64>> {
        match self {
            Self::Programs(programs) => {
                block_in_place(|| locked(programs).losses()).context("read what was lost")
            }
            Self::InProcess(filter) => Ok(filter.losses()),
        }
    }

    /// The device must be down.
    pub(super) fn detach(self) -> anyhow::Result<()> {
        match self {
            Self::Programs(programs) => {
                let programs = programs
                    .into_inner()
                    .unwrap_or_else(PoisonError::into_inner);
                block_in_place(|| programs.detach())
            }
            Self::InProcess(_) => Ok(()),
        }
    }
}

fn locked(programs: &Mutex<Dataplane>) -> MutexGuard<'_, Dataplane> {
    // A panic elsewhere leaves at worst a policy half written, which the next apply repairs.
    programs.lock().unwrap_or_else(PoisonError::into_inner)
}

/// In small parts: of many guards each takes the kernel some 20 ms, and the watch over the mesh's own device
/// waits for the same lock.
fn guard(programs: &Mutex<Dataplane>, mesh: &str) -> anyhow::Result<()> {
    let mut there_is_more = {
        let mut programs = locked(programs);
        // Listed behind the lock: whoever waited for it knows what came meanwhile.
        let others = net::others(mesh)?;
        programs.want_guards(others.iter().map(String::as_str))?;
        // Of a few nobody sees that they were missing.
        programs.hang_guards()?
    };
    while there_is_more {
        std::thread::sleep(TURN);
        there_is_more = locked(programs).hang_guards()?;
    }
    Ok(())
}

/// A device, down, with its filter on it.
#[derive(Debug)]
pub(super) struct Raised {
    pub(super) backend: Backend,
    pub(super) enforcer: Enforcer,
    /// Raised and cleared by what was found.
    pub(super) conditions: Vec<(&'static str, Option<Condition>)>,
    /// Where the programs were that an earlier agent has left on this device, if it was there.
    pub(super) found: Option<Standing>,
}

/// Opens the device and hangs the filter on it. `is_first`: what is there is another agent's.
pub(super) async fn raise(settings: &Settings, is_first: bool) -> anyhow::Result<Raised> {
    let kernel = match settings.backend {
        Choice::Auto => wg::kernel::is_supported().await,
        Choice::Kernel => true,
        Choice::Userspace => false,
    };
    let mut refused = None;
    if kernel {
        // Through a device that is down nothing has passed, whatever hung on it.
        let is_adopted = match index_of(&settings.interface) {
            Some(index) if is_first => Net::new().await?.is_up(index).await?,
            _ => false,
        };
        let backend = open_kernel(settings).await?;
        match attach(settings) {
            Ok(programs) => {
                let found = programs.found().filter(|_| is_adopted);
                let raised = judged_by_programs(backend, programs);
                return Ok(Raised { found, ..raised });
            }
            Err(error) if settings.backend == Choice::Kernel => {
                return Err(anyhow::Error::new(error).context(
                    "the kernel's WireGuard is refused without eBPF programs: nobody would enforce the policy",
                ));
            }
            Err(error) => {
                let error = brief(&anyhow::Error::new(error));
                tracing::warn!(error, "no programs for the kernel's device");
                refused = Some(error);
            }
        }
        if let Backend::Kernel(device) = backend {
            device.remove().await?;
        }
    }
    let mut raised = raise_userspace(settings).await?;
    raised.conditions.push((
        "KernelBackendRefused",
        refused.map(|error| Condition {
            severity: Severity::Warning,
            text: format!("the kernel's WireGuard is there but its packets could not be filtered: {error}"),
            next_step: "the slower userspace backend is in use; give the agent CAP_BPF and CAP_PERFMON and a BPF file system",
        }),
    ));
    Ok(raised)
}

/// The kernel's device, adopted with its programs; or made anew, if they are past taking over.
async fn open_kernel(settings: &Settings) -> anyhow::Result<Backend> {
    let open = async || Backend::open(Choice::Kernel, &open_options(settings, None)).await;
    let backend = open().await?;
    let is_orphaned =
        block_in_place(|| Dataplane::is_orphaned(&settings.interface, &attach_options(settings)));
    match backend {
        Backend::Kernel(device) if matches!(is_orphaned, Ok(true)) => {
            tracing::warn!(
                interface = settings.interface,
                "programs hang there that no pin leads to: make the interface anew"
            );
            device.remove().await?;
            open().await
        }
        backend => Ok(backend),
    }
}

fn attach_options(settings: &Settings) -> Options {
    Options {
        pin_dir: settings.pin_dir.clone(),
        numbers: Some(settings.guard_numbers.clone()),
        object_path: settings.ebpf_object.clone(),
        ..Options::default()
    }
}

fn attach(settings: &Settings) -> Result<Dataplane, AttachError> {
    let options = attach_options(settings);
    let start = Instant::now();
    let programs = block_in_place(|| Dataplane::attach(&settings.interface, &options))?;
    tracing::info!(
        elapsed = ?start.elapsed(),
        interface = settings.interface,
        "eBPF programs attached"
    );
    Ok(programs)
}

fn judged_by_programs(backend: Backend, programs: Dataplane) -> Raised {
    Raised {
        backend,
        enforcer: Enforcer::Programs(Box::new(Mutex::new(programs))),
        conditions: vec![("BuiltWithoutEbpf", None), ("EbpfUnavailable", None)],
        found: None,
    }
}

/// Every packet passes through our filter until programs judge instead.
async fn raise_userspace(settings: &Settings) -> anyhow::Result<Raised> {
    let filter = Arc::new(Filter::new());
    let programs_judge = Arc::new(AtomicBool::new(false));
    let judge = {
        let (filter, programs_judge) = (filter.clone(), programs_judge.clone());
        wg::Filter::new(move |direction, packet| {
            if programs_judge.load(Ordering::Relaxed) {
                return Judgement::Pass;
            }
            match filter.judge(direction, packet).passes() {
                true => Judgement::Pass,
                false => Judgement::Drop,
            }
        })
    };
    let options = open_options(settings, Some(judge));
    let backend = Backend::open(Choice::Userspace, &options).await?;
    let error = match attach(settings) {
        Ok(programs) => {
            programs_judge.store(true, Ordering::Relaxed);
            return Ok(judged_by_programs(backend, programs));
        }
        Err(error) => error,
    };
    let condition = match &error {
        AttachError::NoObject => (
            "BuiltWithoutEbpf",
            Some(Condition {
                severity: Severity::Warning,
                text: format!(
                    "this agent was built without its eBPF programs: the policy is enforced in process{UNGUARDED}"
                ),
                next_step: "run `cargo xtask build-ebpf` before building the agent",
            }),
        ),
        _ => {
            let error = brief(&anyhow::Error::new(error));
            tracing::warn!(error, "no programs for the userspace device");
            (
                "EbpfUnavailable",
                Some(Condition {
                    severity: Severity::Warning,
                    text: format!(
                        "no eBPF programs on the interface, the policy is enforced in process{UNGUARDED}: {error}"
                    ),
                    next_step: "give the agent CAP_BPF and CAP_PERFMON and a folder on a BPF file system, then start it again",
                }),
            )
        }
    };
    Ok(Raised {
        backend,
        enforcer: Enforcer::InProcess(filter),
        conditions: vec![condition],
        found: None,
    })
}
