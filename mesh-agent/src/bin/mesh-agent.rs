//! The node daemon of the mesh.
fn main() {}
