//! From a node's policy to the rows of the kernel's maps.
