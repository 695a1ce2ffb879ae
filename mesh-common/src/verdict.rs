//! The verdict over one packet, stated once for the kernel, for user space and for explanations.
//!
//! [`decide`] is a function of what the packet says, of the time and of what the tables hold; it
//! changes nothing. What must be remembered goes out as an [`Effect`], so a dry run is a run whose
//! effect nobody carries out. [`continues`] is its short form, all that most packets need, and the
//! kernel asks it first. What the policy says lies in `judged`, and what becomes of a packet that no table
//! knows the flow of in `opening`.

mod judged;
mod opening;

use crate::budget::{Bucket, ICMP_ERRORS};
use crate::event::EventKind;
use crate::flow::{
    FRAGMENT, FlowKey, FlowState, FragmentEntry, FragmentKey, Stage, flags, is_older,
};
use crate::packet::{Facts, Kind};
use crate::policy::{Direction, PolicyEntry, PolicyKey, RuleId};
use crate::tcp::{self, End};
use crate::{Address, DropReason, Identity, IdentityEntry};
use judged::{Judged, ask, ends};

pub use judged::{outcome, policy_port, prevailing};
pub use opening::rate;

/// What [`decide`] asks; every answer must come from the same moment's tables.
pub trait Lookup {
    /// 0 until a policy was loaded.
    fn generation(&self) -> u32;
    fn flow(&self, stage: Stage, key: &FlowKey) -> Option<FlowState>;
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentEntry>;
    /// [`IdentityEntry::UNKNOWN`] for nobody.
    fn identity(&self, address: &Address) -> IdentityEntry;
    /// The same of an address on this side, which is nearly always that of the packet before.
    fn local(&self, address: &Address) -> IdentityEntry {
        self.identity(address)
    }
    /// Of the longest prefixes that match, about this remote and about everybody, the one that is [`prevailing`]; or
    /// [`PolicyEntry::NONE`].
    fn policy(&self, key: &PolicyKey) -> PolicyEntry;
    /// Against [`rate`].
    fn new_flows(&self, peer: u32, opened: Direction) -> Bucket;
    /// Whether flows that were opened so have taken the peer's share of the established ones.
    fn is_share_taken(&self, peer: u32, opened: Direction) -> bool;
    /// Against [`ICMP_ERRORS`].
    fn icmp_errors(&self, peer: u32) -> Bucket;
    /// [`crate::maps::Config::pickup_until`].
    fn pickup_until(&self) -> u64;
}

/// What must be remembered of this packet. Flat, because a compiler copies an absent payload as
/// whatever a register holds, and a verifier does not let pointers be cut up.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    Nothing,
    /// Refresh the entry in place: its time, and [`STICKY`] flags that [`Verdict::state`] adds.
    TouchHalfOpen,
    TouchEstablished,
    /// Put [`Verdict::state`] under [`Facts::key`] into this table, and out of the other.
    WriteHalfOpen,
    WriteEstablished,
    /// A new flow with [`Verdict::state`], which costs its peer a token of [`rate`].
    Open,
    /// An ICMP error, which costs its peer a token of [`ICMP_ERRORS`].
    Report,
}

impl Effect {
    #[inline(always)]
    const fn touch(stage: Stage) -> Self {
        match stage {
            Stage::HalfOpen => Self::TouchHalfOpen,
            Stage::Established => Self::TouchEstablished,
        }
    }

    #[inline(always)]
    const fn write(stage: Stage) -> Self {
        match stage {
            Stage::HalfOpen => Self::WriteHalfOpen,
            Stage::Established => Self::WriteEstablished,
        }
    }
}

/// Flags that a packet may add to an entry in place. None of them grants anything by itself.
pub const STICKY: u32 = flags::REPLIED | flags::FIN_OPENER | flags::FIN_RESPONDER | flags::RESET;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Verdict {
    /// `None`: the packet passes.
    pub drop: Option<DropReason>,
    /// The rule that decided, now or when the flow was opened.
    pub rule: RuleId,
    pub remote: Identity,
    pub local: Identity,
    pub effect: Effect,
    /// What the agent should hear of it.
    pub event: Option<EventKind>,
    pub state: FlowState,
}

impl Verdict {
    #[inline(always)]
    pub const fn passes(&self) -> bool {
        self.drop.is_none()
    }

    /// What the counter of a rule counts: a flow that it admits, be it once more, and a packet that it
    /// refuses.
    #[inline(always)]
    pub const fn is_decision(&self) -> bool {
        matches!(self.event, Some(EventKind::Opened)) || !self.passes()
    }

    /// Dropped before anybody asked who or what.
    #[inline(always)]
    pub const fn refused(reason: DropReason) -> Self {
        Self::refuse(reason, &Judged::NOBODY)
    }

    /// Whether it was dropped before anybody knew whose it is.
    #[inline(always)]
    pub fn is_nameless(&self, facts: &Facts) -> bool {
        let is_named = self.remote != Identity::UNKNOWN && facts.remote.is_same(&facts.key.remote);
        !(self.passes() || is_named)
    }

    /// Says whose it is, as far as the tables know: who sends what nobody can read, or an error about another's flow,
    /// has to bear the blame, and the cost of being told of.
    #[inline(always)]
    pub fn name(&mut self, facts: &Facts, tables: &impl Lookup) {
        let key = FlowKey {
            remote: facts.remote,
            ..facts.key
        };
        let ends = ends(tables, &key);
        self.remote = ends.remote;
        self.local = ends.local;
        self.state.peer = ends.peer;
    }

    #[inline(always)]
    const fn refuse(reason: DropReason, judged: &Judged) -> Self {
        Self {
            drop: Some(reason),
            event: Some(EventKind::Denied),
            ..Self::pass(judged, Effect::Nothing)
        }
    }

    #[inline(always)]
    const fn pass(judged: &Judged, effect: Effect) -> Self {
        Self {
            drop: None,
            rule: judged.rule,
            remote: judged.remote,
            local: judged.local,
            effect,
            event: None,
            state: FlowState {
                last_seen: 0,
                generation: 0,
                flags: 0,
                remote: judged.remote,
                local: judged.local,
                rule: judged.rule,
                peer: judged.peer,
            },
        }
    }
}

/// Finds the ports of a later fragment, which only its first one had.
#[inline(always)]
pub fn complete(facts: &mut Facts, now: u64, tables: &impl Lookup) -> Result<(), DropReason> {
    if !matches!(facts.kind, Kind::LaterFragment) {
        return Ok(());
    }
    match tables.fragment(&facts.fragment_key()) {
        Some(first) if !is_older(now, first.last_seen, FRAGMENT) => {
            facts.key.remote_port = first.remote_port;
            facts.key.local_port = first.local_port;
            facts.key.proto = first.proto;
            Ok(())
        }
        _ => Err(DropReason::FragmentWithoutFirst),
    }
}

/// Does an established flow simply go on? Then [`decide`] would let the packet pass, and remember nothing
/// of it but its time and its size.
#[inline(always)]
pub fn continues(
    kind: Kind,
    proto: u8,
    tcp: u8,
    now: u64,
    generation: u32,
    state: &FlowState,
) -> bool {
    const CHANGED: u32 = flags::DENIED | flags::RESET;
    let plain = match kind {
        Kind::Tcp => tcp::is_plain(tcp),
        Kind::Datagram | Kind::EchoRequest | Kind::EchoReply => true,
        _ => false,
    };
    plain
        && generation != 0
        && state.generation == generation
        && state.flags & (flags::CONFIRMED | flags::REPLIED | CHANGED)
            == flags::CONFIRMED | flags::REPLIED
        && !state.is_expired(proto, now)
}

/// Judges one packet, [`complete`]d. `now` is in nanoseconds of the clock that stamped the flows.
#[inline(always)]
pub fn decide(facts: &Facts, now: u64, tables: &impl Lookup) -> Verdict {
    if tables.generation() == 0 {
        return Verdict::refused(DropReason::NoPolicy);
    }
    let mut stage = Stage::Established;
    let mut found = alive(tables, stage, &facts.key, now);
    if found.is_none() {
        stage = Stage::HalfOpen;
        found = alive(tables, stage, &facts.key, now);
    }
    if let Some(state) = found
        && let Some(verdict) = known(facts, now, stage, &state, tables)
    {
        return verdict;
    }
    new(facts, now, tables)
}

/// [`decide`], as if no table knew the packet's flow.
#[inline(always)]
pub fn decide_new(facts: &Facts, now: u64, tables: &impl Lookup) -> Verdict {
    if tables.generation() == 0 {
        return Verdict::refused(DropReason::NoPolicy);
    }
    new(facts, now, tables)
}

#[inline(always)]
fn new(facts: &Facts, now: u64, tables: &impl Lookup) -> Verdict {
    if opens(facts) {
        opening::unknown(facts, now, tables)
    } else {
        opening::stray(facts, now, tables)
    }
}

#[inline(always)]
fn alive(tables: &impl Lookup, stage: Stage, key: &FlowKey, now: u64) -> Option<FlowState> {
    let state = tables.flow(stage, key)?;
    (!state.is_expired(key.proto, now)).then_some(state)
}

/// A packet whose flow is in a table, or an ICMP error that speaks of one. `None`: it wants to open a
/// flow of its own under the same key.
#[inline(always)]
fn known(
    facts: &Facts,
    now: u64,
    stage: Stage,
    state: &FlowState,
    tables: &impl Lookup,
) -> Option<Verdict> {
    if matches!(facts.kind, Kind::Tcp) && tcp::opens(facts.tcp) && state.is_closing() {
        return None;
    }
    let opened = state.opened();
    let mut next = *state;
    let stale = state.generation != tables.generation();
    if stale {
        let ends = ends(tables, &facts.key);
        let port = policy_port(&facts.key, opened);
        let judged = ask(tables, &ends, facts.key.proto, opened, port);
        next.generation = tables.generation();
        next.rule = judged.rule;
        // Whoever is nobody now is still told of as who it was.
        if ends.drop.is_none() {
            next.remote = ends.remote;
            next.local = ends.local;
            next.peer = ends.peer;
        }
        next.flags = match judged.drop {
            Some(_) => state.flags | flags::DENIED,
            None => state.flags & !flags::DENIED,
        };
    }
    let judged = Judged::remembered(&next);
    let from = if facts.direction as u8 == opened as u8 {
        End::Opener
    } else {
        End::Responder
    };
    if next.flags & flags::DENIED != 0 {
        // What was denied was the opener's flow; the other end may have one of its own to open.
        if matches!(from, End::Responder) && opens(facts) {
            return None;
        }
        let mut verdict = Verdict::refuse(DropReason::Revoked, &judged);
        if stale && !facts.kind.is_error() {
            verdict.effect = Effect::write(stage);
            verdict.state = next;
            if state.flags & flags::DENIED == 0 {
                verdict.event = Some(EventKind::Revoked);
            }
        }
        return Some(verdict);
    }
    let mut confirms = false;
    match facts.kind {
        Kind::IcmpError | Kind::PacketTooBig => return Some(error(facts, now, &judged, tables)),
        Kind::Tcp => match tcp::step(next.flags, from, facts.tcp) {
            Some(step) => {
                next.flags = step.flags;
                confirms = step.confirms;
            }
            None => return Some(Verdict::refuse(DropReason::TcpOutOfState, &judged)),
        },
        Kind::LaterFragment => {}
        _ => {
            if matches!(from, End::Responder) {
                next.flags |= flags::REPLIED;
                confirms = true;
            }
        }
    }
    // Repeating a reset keeps nothing alive. Whatever else comes does: the ends did not believe it.
    if state.flags & flags::RESET == 0 || facts.tcp & tcp::RST == 0 {
        next.last_seen = now;
    }
    let first = confirms && state.flags & flags::CONFIRMED == 0;
    if first {
        next.flags |= flags::CONFIRMED;
    }
    let moves = matches!(stage, Stage::HalfOpen)
        && confirms
        && (first || is_new_second(state.last_seen, now))
        && !tables.is_share_taken(next.peer, opened);
    let effect = if moves {
        Effect::WriteEstablished
    } else if stale || first {
        Effect::write(stage)
    } else {
        Effect::touch(stage)
    };
    let mut verdict = Verdict::pass(&judged, effect);
    if state.flags & flags::DENIED != 0 {
        verdict.event = Some(EventKind::Opened);
    } else if first {
        verdict.event = Some(EventKind::Confirmed);
    } else if next.is_closing() && !state.is_closing() {
        verdict.event = Some(EventKind::Closed);
    }
    verdict.state = next;
    Some(verdict)
}

/// A flow that found no room among the established asks again about once a second.
#[inline(always)]
const fn is_new_second(then: u64, now: u64) -> bool {
    then >> 30 != now >> 30
}

/// An ICMP error about a flow that stands: only the node at its far end may report on it, and only so
/// often. That a packet was too big is true whoever noticed, and without it the flow would hang.
#[inline(always)]
fn error(facts: &Facts, now: u64, judged: &Judged, tables: &impl Lookup) -> Verdict {
    if matches!(facts.kind, Kind::PacketTooBig) || matches!(facts.direction, Direction::Egress) {
        return Verdict::pass(judged, Effect::Nothing);
    }
    let sender = tables.identity(&facts.remote);
    if !sender.is_known() || sender.peer != judged.peer {
        return Verdict::refuse(DropReason::IcmpErrorForeign, judged);
    }
    if !tables.icmp_errors(judged.peer).has(now, &ICMP_ERRORS) {
        return Verdict::refuse(DropReason::IcmpErrorRate, judged);
    }
    Verdict::pass(judged, Effect::Report)
}

/// Could this packet be the first of a flow?
#[inline(always)]
fn opens(facts: &Facts) -> bool {
    match facts.kind {
        Kind::Tcp => tcp::opens(facts.tcp),
        Kind::Datagram | Kind::EchoRequest | Kind::Single => true,
        Kind::EchoReply | Kind::IcmpError | Kind::PacketTooBig | Kind::LaterFragment => false,
    }
}
