//! The verdict over one packet, stated once for the kernel, for user space and for explanations.
//!
//! [`decide`] is a function of what the packet says, of the time and of what the tables hold; it
//! changes nothing. What must be remembered goes out as an [`Effect`], so a dry run is a run whose
//! effect nobody carries out. [`continues`] is its short form, all that most packets need, and the
//! kernel asks it first.

use crate::budget::{Bucket, ICMP_ERRORS, NEW_FLOWS, Rate};
use crate::event::EventKind;
use crate::flow::{
    FRAGMENT, FlowKey, FlowState, FragmentEntry, FragmentKey, Stage, flags, is_older,
};
use crate::packet::{Facts, Kind, proto};
use crate::policy::{Direction, PolicyEntry, PolicyKey, RuleId};
use crate::tcp::{self, End};
use crate::{Address, DropReason, Identity, IdentityEntry};

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
    /// The longest prefix that matches, or [`PolicyEntry::NONE`].
    fn policy(&self, key: &PolicyKey) -> PolicyEntry;
    /// Against [`NEW_FLOWS`].
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
    /// A new flow with [`Verdict::state`], which costs its peer a token of [`NEW_FLOWS`].
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

    /// Dropped before anybody asked who or what.
    #[inline(always)]
    pub const fn refused(reason: DropReason) -> Self {
        Self::refuse(reason, &Judged::NOBODY)
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

/// Deny beats accept, whichever is wider; of two that say the same, the one for this very remote
/// speaks; without any the default denies.
#[inline(always)]
pub const fn precedence(exact: PolicyEntry, any: PolicyEntry) -> (Option<DropReason>, RuleId) {
    if exact.is_deny() {
        (Some(DropReason::DeniedByRule), exact.rule)
    } else if any.is_deny() {
        (Some(DropReason::DeniedByRule), any.rule)
    } else if exact.is_accept() {
        (None, exact.rule)
    } else if any.is_accept() {
        (None, any.rule)
    } else {
        (Some(DropReason::NoRule), RuleId::NONE)
    }
}

/// What the policy says of a flow, and of whom it spoke.
#[derive(Clone, Copy)]
struct Judged {
    drop: Option<DropReason>,
    rule: RuleId,
    remote: Identity,
    local: Identity,
    peer: u32,
}

impl Judged {
    const NOBODY: Self = Self {
        drop: None,
        rule: RuleId::NONE,
        remote: Identity::UNKNOWN,
        local: Identity::UNKNOWN,
        peer: 0,
    };

    #[inline(always)]
    const fn remembered(state: &FlowState) -> Self {
        Self {
            drop: None,
            rule: state.rule,
            remote: state.remote,
            local: state.local,
            peer: state.peer,
        }
    }
}

/// Who talks to whom. Whoever is unknown never meets [`Identity::ANY`].
#[inline(always)]
fn ends(tables: &impl Lookup, key: &FlowKey) -> Judged {
    let remote = tables.identity(&key.remote);
    let mut judged = Judged {
        remote: remote.identity,
        peer: remote.peer,
        ..Judged::NOBODY
    };
    if !remote.is_known() {
        judged.drop = Some(DropReason::UnknownIdentity);
        return judged;
    }
    if remote.is_local() {
        judged.drop = Some(DropReason::OwnAddress);
        return judged;
    }
    let local = tables.local(&key.local);
    judged.local = local.identity;
    if !local.is_known() {
        judged.drop = Some(DropReason::UnknownLocal);
    }
    judged
}

/// May a flow between these ends be opened in this direction?
#[inline(always)]
fn ask(tables: &impl Lookup, ends: &Judged, proto: u8, opened: Direction, port: u16) -> Judged {
    let mut judged = *ends;
    if judged.drop.is_none() {
        let row = |remote| tables.policy(&PolicyKey::new(remote, ends.local, opened, proto, port));
        // The second of many is found in no cache, and what is asked next is looked for meanwhile.
        let any = row(Identity::ANY);
        (judged.drop, judged.rule) = precedence(row(ends.remote), any);
    }
    judged
}

/// The port that policy sees when the flow is opened.
#[inline(always)]
pub fn policy_port(key: &FlowKey, opened: Direction) -> u16 {
    match key.proto {
        proto::ICMP => 8,
        proto::ICMPV6 => 128,
        _ => match opened {
            Direction::Ingress => key.local_port.get(),
            Direction::Egress => key.remote_port.get(),
        },
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
    if opens(facts) {
        unknown(facts, now, tables)
    } else {
        stray(facts, now, tables)
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
        next.remote = judged.remote;
        next.local = judged.local;
        next.peer = judged.peer;
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
    // A connection that was reset is forgotten on time, however often the ends repeat themselves.
    if state.flags & flags::RESET == 0 {
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

/// A flow that begins, as far as we know it.
#[inline(always)]
fn open(judged: &Judged, opened: Direction, flags: u32, now: u64, tables: &impl Lookup) -> Verdict {
    let mut verdict = Verdict::pass(judged, Effect::Open);
    verdict.event = Some(EventKind::Opened);
    verdict.state.last_seen = now;
    verdict.state.generation = tables.generation();
    verdict.state.flags = match opened {
        Direction::Ingress => flags,
        Direction::Egress => flags | flags::OPENED_EGRESS,
    };
    verdict
}

/// A packet that opens a flow which policy allows, or is dropped. Without a token for a flow it passes
/// for itself, and so does our answer to one that did.
#[inline(always)]
fn unknown(facts: &Facts, now: u64, tables: &impl Lookup) -> Verdict {
    if facts.key.remote.is_multicast() || facts.key.local.is_multicast() {
        return Verdict::refused(DropReason::Multicast);
    }
    let ends = ends(tables, &facts.key);
    let judged = ask(tables, &ends, facts.key.proto, facts.direction, facts.port);
    match judged.drop {
        None if matches!(facts.kind, Kind::Single) => Verdict::pass(&judged, Effect::Nothing),
        None => {
            let tokens = tables.new_flows(judged.peer, facts.direction);
            if tokens.has(now, rate(facts.direction)) {
                open(&judged, facts.direction, 0, now, tables)
            } else {
                Verdict::pass(&judged, Effect::Nothing)
            }
        }
        Some(reason) => {
            if matches!(facts.kind, Kind::Datagram)
                && let Some(answer) = answer(facts, now, &ends, tables)
            {
                return answer;
            }
            Verdict::refuse(reason, &judged)
        }
    }
}

/// A packet in the middle of a flow that we do not know: we may have come after it began, or have had
/// no room for it.
#[inline(always)]
fn stray(facts: &Facts, now: u64, tables: &impl Lookup) -> Verdict {
    if facts.kind.is_error() {
        return Verdict::refused(DropReason::IcmpErrorUnknownFlow);
    }
    let ends = ends(tables, &facts.key);
    let refused = Verdict::refuse(DropReason::NoFlow, &ends);
    if ends.drop.is_some() {
        return refused;
    }
    let running = matches!(facts.kind, Kind::Tcp) && tcp::is_running(facts.tcp);
    let picks_up = running && is_older(tables.pickup_until(), now, 0);
    if picks_up || is_strained(ends.peer, facts.direction, now, tables) {
        let opened = facts.direction;
        let port = policy_port(&facts.key, opened);
        let judged = ask(tables, &ends, facts.key.proto, opened, port);
        if judged.drop.is_none() {
            return resume(&judged, opened, running, now, tables);
        }
    }
    let opened = facts.direction.reverse();
    if picks_up {
        let port = policy_port(&facts.key, opened);
        let judged = ask(tables, &ends, facts.key.proto, opened, port);
        if judged.drop.is_none() {
            return resume(&judged, opened, running, now, tables);
        }
    } else if let Some(answer) = answer(facts, now, &ends, tables) {
        return answer;
    }
    refused
}

/// Makes a running TCP flow anew, if there is a token for it.
#[inline(always)]
fn resume(
    judged: &Judged,
    opened: Direction,
    running: bool,
    now: u64,
    tables: &impl Lookup,
) -> Verdict {
    if running && tables.new_flows(judged.peer, opened).has(now, rate(opened)) {
        open(
            judged,
            opened,
            flags::REPLIED | flags::CONFIRMED,
            now,
            tables,
        )
    } else {
        Verdict::pass(judged, Effect::Nothing)
    }
}

/// Our answer to a flow of which nothing is remembered, because its peer opens too many. The peer's
/// own packets never pass as answers: that would let it in wherever we may go out.
#[inline(always)]
fn answer(facts: &Facts, now: u64, ends: &Judged, tables: &impl Lookup) -> Option<Verdict> {
    if matches!(facts.direction, Direction::Ingress)
        || !is_strained(ends.peer, Direction::Ingress, now, tables)
    {
        return None;
    }
    let port = policy_port(&facts.key, Direction::Ingress);
    let judged = ask(tables, ends, facts.key.proto, Direction::Ingress, port);
    judged
        .drop
        .is_none()
        .then(|| Verdict::pass(&judged, Effect::Nothing))
}

/// Whether some of the peer's flows may have found no room: its share is taken, or it has lately used
/// its tokens faster than they come.
#[inline(always)]
fn is_strained(peer: u32, opened: Direction, now: u64, tables: &impl Lookup) -> bool {
    tables.new_flows(peer, opened).is_low(now, rate(opened)) || tables.is_share_taken(peer, opened)
}

/// Of [`NEW_FLOWS`].
#[inline(always)]
pub const fn rate(opened: Direction) -> &'static Rate {
    match opened {
        Direction::Ingress => &NEW_FLOWS[0],
        Direction::Egress => &NEW_FLOWS[1],
    }
}
