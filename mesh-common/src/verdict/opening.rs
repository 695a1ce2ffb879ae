//! A packet whose flow is in no table: it opens one, belongs to one that began before us or found no
//! room, or is dropped.
//!
//! What is hard is a peer that opens more flows than it has a share of. Its packets beyond that pass or
//! are dropped each for itself, by the policy alone, and so do our answers; nobody else's flows make room.

use super::judged::{Judged, ask, ends, policy_port};
use super::{Effect, Lookup, Verdict};
use crate::DropReason;
use crate::budget::{NEW_FLOWS, Rate};
use crate::event::EventKind;
use crate::flow::{flags, is_older};
use crate::packet::{Facts, Kind};
use crate::policy::Direction;
use crate::tcp;

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
pub(super) fn unknown(facts: &Facts, now: u64, tables: &impl Lookup) -> Verdict {
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
pub(super) fn stray(facts: &Facts, now: u64, tables: &impl Lookup) -> Verdict {
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
