//! Doors only: decode, call, encode.

pub mod admin;
pub mod caller;
pub mod control;
pub mod error;
pub mod policy;
mod text;
