//! The node daemon: it does what mesh-core decides.

pub mod dataplane;
pub mod dns;
pub mod net;
pub mod sys;
pub mod wg;
