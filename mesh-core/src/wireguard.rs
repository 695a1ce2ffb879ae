//! The WireGuard device: what it should hold, what it holds, and the steps between.
