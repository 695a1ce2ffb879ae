//! The packet filter: loads, attaches, pins and fills the eBPF programs, or judges in process.
