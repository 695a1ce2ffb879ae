//! The packet filter: loads, attaches, pins and fills the eBPF programs, or judges in process.
//!
//! Fail closed is the rule that shapes it: programs hang on the device before it comes up, they drop
//! until a policy is there, and what is pinned goes on filtering when the agent is gone.
//!
//! ```text
//! Dataplane::attach ── loader ── programs, hooks, pins       Filter::new ── software
//!    apply(&Tables) ── tables ── cfg, id_*, pol, rule_ctr        apply(&Tables)
//!    counters()     ── counters                                  judge(direction, packet)
//!    events()       ── events ── ring buffer                     counters(), events()
//! ```

use std::collections::BTreeMap;

use mesh_common::maps::Count;
use mesh_common::{Direction, DropReason, RuleId};

mod attach;
mod clock;
mod counters;
mod dry;
mod entries;
mod error;
mod established;
mod events;
mod guard;
mod half_open;
mod identities;
mod loader;
mod numbers;
mod options;
mod pins;
mod policy;
pub mod probe;
pub mod software;
mod sweep;
mod tables;
mod takeover;
mod usage;
mod walk;

pub use error::{ApplyError, AttachError};
pub use established::{Established, Only};
pub use events::READ_WITHIN;
pub use half_open::all as half_open_flows;
pub use loader::Dataplane;
pub use mesh_common::event::{EventKind, FlowEvent};
pub use options::{Foreign, Options};
pub use usage::Usage;

/// How many packets met which end.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    pub passed: BTreeMap<Direction, Count>,
    pub dropped: BTreeMap<(Direction, DropReason), Count>,
    /// By rule: flows that it admitted, or packets that it refused. What an admitted flow carries is
    /// not in here.
    pub rules: BTreeMap<RuleId, Count>,
    /// What no event tells of, because there was too much of it or nobody read fast enough.
    pub events_lost: BTreeMap<EventKind, u64>,
}

/// Events that wait for their reader.
const EVENT_QUEUE: usize = 4_096;
