//! What the packet filter counted, in the words of the policy text.

use mesh_api::v1;

use crate::dataplane::Counters;
use crate::snapshot::Snapshot;

/// Rules that are counted still but no longer in the policy are left out.
pub(super) fn response(look: &Snapshot, counters: &Counters) -> v1::CountersResponse {
    let passed = counters
        .passed
        .iter()
        .map(|(direction, count)| ("passed", direction, count));
    let dropped = counters
        .dropped
        .iter()
        .map(|((direction, reason), count)| (reason.name(), direction, count));
    let reasons = passed
        .chain(dropped)
        .map(|(reason, direction, count)| v1::ReasonCounter {
            reason: reason.to_owned(),
            direction: direction.name().to_owned(),
            packets: count.packets,
            bytes: count.bytes,
        })
        .collect();
    let rules = look
        .netmap
        .iter()
        .flat_map(|netmap| &netmap.policy.rules)
        .map(|(id, rule)| {
            let count = counters.rules.get(id).copied().unwrap_or_default();
            v1::RuleCounter {
                rule: id.0,
                line: rule.line,
                place: rule.place(),
                summary: rule.summary.clone(),
                packets: count.packets,
                bytes: count.bytes,
            }
        })
        .collect();
    v1::CountersResponse { reasons, rules }
}
