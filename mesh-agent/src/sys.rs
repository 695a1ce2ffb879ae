//! Every `unsafe` of the agent: raw system calls that no crate wraps.
