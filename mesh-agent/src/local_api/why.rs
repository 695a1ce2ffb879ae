//! What would become of a new flow, by the packet path itself and by the policy.

use std::net::IpAddr;

use mesh_api::v1;
use mesh_common::{DropReason, proto};
use mesh_core::dataplane::why::{Answer, Question};
use mesh_core::netmap::{Netmap, Rule};
use tonic::Status;

use crate::snapshot::{Family, Snapshot};
use crate::stack::Handle;

pub(super) fn answer(
    look: &Snapshot,
    handle: Option<&Handle>,
    request: &v1::WhyRequest,
) -> Result<v1::WhyResponse, Status> {
    let (Some(handle), Some(plan)) = (handle, look.desired.as_deref()) else {
        return Err(Status::failed_precondition(
            "nothing is filtered: this node is down",
        ));
    };
    let out_of_range = |_| Status::invalid_argument("a protocol or port is out of range");
    let proto = u8::try_from(request.proto).map_err(out_of_range)?;
    let (source, destination) = ends(look, &request.source, &request.destination, proto)?;
    let port = u16::try_from(request.port).map_err(out_of_range)?;
    let question = Question::new(source, destination, proto, port)
        .map_err(|refused| Status::invalid_argument(refused.to_string()))?;
    let direction = question
        .direction(&plan.dataplane)
        .map_err(|refused| Status::failed_precondition(refused.to_string()))?;
    let kernel = handle
        .enforcer
        .why(&question, direction)
        .map_err(|error| Status::internal(format!("{error:#}")))?;
    let policy = question.ask(&plan.netmap.policy, direction);
    Ok(v1::WhyResponse {
        direction: direction.name().to_owned(),
        source: question.source.to_string(),
        destination: question.destination.to_string(),
        kernel: Some(judgement(&plan.netmap, &kernel)),
        policy: Some(judgement(&plan.netmap, &policy)),
        differs: kernel != policy,
        judged_by: handle.enforcer.kind().to_owned(),
    })
}

/// Of one family: whoever is named by name has both.
fn ends(
    look: &Snapshot,
    source: &str,
    destination: &str,
    protocol: u8,
) -> Result<(IpAddr, IpAddr), Status> {
    let wants = |text: &str| Some(text.parse::<IpAddr>().ok()?.to_canonical());
    let family = match wants(source).or_else(|| wants(destination)) {
        Some(IpAddr::V6(_)) => Family::V6,
        None if protocol == proto::ICMPV6 => Family::V6,
        Some(IpAddr::V4(_)) | None => Family::V4,
    };
    // An address need not be anybody's.
    let find = |text: &str| match wants(text) {
        Some(address) => Ok(address),
        None => look
            .resolve(text, family)
            .map(|(_, address)| address)
            .ok_or_else(|| super::unknown_node(look, text)),
    };
    Ok((find(source)?, find(destination)?))
}

fn judgement(netmap: &Netmap, answer: &Answer) -> v1::Judgement {
    let rule = netmap.policy.rules.get(&answer.rule);
    v1::Judgement {
        allowed: answer.drop.is_none(),
        reason: answer.drop.map_or("", DropReason::name).to_owned(),
        help: answer.drop.map_or("", DropReason::help).to_owned(),
        rule: answer.rule.0,
        line: rule.map_or(0, |rule| rule.line),
        place: rule.map_or_else(String::new, Rule::place),
        summary: rule.map_or_else(String::new, |rule| rule.summary.clone()),
    }
}
