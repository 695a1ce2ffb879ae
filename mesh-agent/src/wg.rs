//! WireGuard, by the kernel or in process.
