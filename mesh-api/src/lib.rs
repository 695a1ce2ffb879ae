//! What the mesh shares over the wire: the protobuf messages, their conversions to mesh-core's
//! types, signed netmap updates, and the pinned TLS channel that carries them.
//!
//! A generated type is a claim by somebody else. It becomes a mesh-core type through `TryFrom`, in
//! one place, and an [`Invalid`] says which field was wrong; nothing behind that door asks again.
#![forbid(unsafe_code)]

pub mod channel;
pub mod convert;
pub mod held;
pub mod join;
pub mod netmap;
pub mod update;

/// Code generated from `proto/mesh/v1/*.proto`; `cargo xtask codegen` writes it.
#[allow(
    clippy::all,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    clippy::use_self,
    clippy::semicolon_if_nothing_returned,
    clippy::or_fun_call,
    clippy::uninlined_format_args,
    missing_debug_implementations,
    unreachable_pub,
    unused_qualifications,
    reason = "generated"
)]
pub mod v1 {
    include!("gen/mesh.v1.rs");
}

pub use convert::Invalid;
pub use join::Join;

/// Version of the node protocol. Both ends name theirs in `Hello`; only equal ones talk.
pub const PROTOCOL: u32 = 1;
