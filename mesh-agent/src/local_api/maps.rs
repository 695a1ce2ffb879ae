//! How full the packet path's maps are.

use mesh_api::v1;
use tonic::Status;

use crate::stack::Enforcer;

pub(super) fn response(enforcer: &Enforcer) -> Result<v1::MapsResponse, Status> {
    let usage = enforcer
        .usage()
        .map_err(|error| Status::internal(format!("{error:#}")))?;
    let usage = usage.ok_or_else(|| {
        Status::failed_precondition("the policy is enforced in process: there are no maps")
    })?;
    let maps = usage.into_iter().map(|usage| v1::MapUse {
        name: usage.map.to_owned(),
        entries: usage.entries,
        capacity: usage.capacity,
        memory_bytes: usage.memory_bytes,
    });
    Ok(v1::MapsResponse {
        maps: maps.collect(),
    })
}
