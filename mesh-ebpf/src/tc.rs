//! What a program says to TC, and where TC's packets begin.
//!
//! A TCX program that says "pass" hides every program behind it, so ours says "next".

/// TCX_NEXT and TC_ACT_UNSPEC: the next program decides.
pub const NEXT: i32 = -1;
/// TC_ACT_SHOT.
pub const DROP: i32 = 2;

/// Where the IP header starts on a device without a link layer, such as WireGuard's and a TUN.
pub const L3: usize = 0;
/// Behind an Ethernet header.
pub const L2: usize = 14;
