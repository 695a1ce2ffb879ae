//! The control plane of the mesh.
#![forbid(unsafe_code)]
pub mod preauth;
pub mod state_dir;
pub mod store;
