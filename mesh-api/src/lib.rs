//! What the mesh shares over the wire.
