//! One table from our errors to gRPC's codes, for both doors.

use tonic::{Code, Status};

use crate::registry::{Fault, Refusal};
use crate::store::StoreError;
use crate::world::ChangeError;

/// The status, with the words that were meant for whoever asked. Takes the error whole so that it
/// can stand in `map_err`.
pub fn status(error: ChangeError) -> Status {
    match error {
        ChangeError::Refused(Refusal { fault, text }) => Status::new(code(fault), text),
        ChangeError::Store(error @ StoreError::Full) => Status::resource_exhausted(format!(
            "{error}: nothing was changed; it works again as soon as there is space"
        )),
        ChangeError::Store(error @ StoreError::Busy) => {
            Status::unavailable(format!("{error}: nothing was changed; try again"))
        }
        // The details are in the coordinator's log; a node needs none of them.
        ChangeError::Store(StoreError::Damaged(_) | StoreError::Failed(_)) => {
            Status::unavailable("the coordinator's database failed: nothing was changed")
        }
        ChangeError::Store(StoreError::Conflict) => {
            Status::aborted("somebody else changed the database: try again")
        }
        ChangeError::Stopped => Status::unavailable("the coordinator is shutting down"),
    }
}

fn code(fault: Fault) -> Code {
    match fault {
        Fault::Invalid => Code::InvalidArgument,
        Fault::NotFound => Code::NotFound,
        Fault::Exists => Code::AlreadyExists,
        Fault::Precondition => Code::FailedPrecondition,
        Fault::Denied => Code::PermissionDenied,
        Fault::Exhausted => Code::ResourceExhausted,
    }
}
