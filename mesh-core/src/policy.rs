//! Who may reach whom: from the text that an operator writes to the rows of one node's maps.
//!
//! ```text
//! text ── Document::parse ──► Document ── check ──► good, or Problems with line and column
//!                                │
//!                 Subjects ──► compile ──► CompiledPolicy ── node(id) ──► identities, entries, rules
//!                                               ├── peers(id), routes(viewer, router)
//!                                               └── evaluate(src, dst, protocol, port)
//! ```
//! All pure. The language is that of Tailscale's policy file (HuJSON) and then some.
//!
//! What is hard: a rule speaks of people, roles and prefixes, a packet shows two addresses. Every
//! address belongs to a *class*, the set of selectors that it satisfies; classes are what the
//! kernel knows as identities, and rules are only ever multiplied out over the classes that a node
//! can meet, never over addresses.

mod approve;
mod apps;
mod atoms;
mod attributes;
mod bits;
mod check;
mod classes;
mod compile;
mod diff;
mod entries;
mod explain;
mod format;
mod ground;
mod hujson;
mod identity;
mod idle;
mod ipset;
mod ipsets;
mod kinds;
mod peers;
mod pools;
mod ports;
mod posture;
mod problem;
mod resolve;
mod room;
mod rules;
mod selector;
mod slab;
mod ssh;
mod syntax;
mod tests_block;

pub use approve::auto_approved;
pub use apps::Capabilities;
pub use check::check;
pub use compile::{CompiledPolicy, compile};
pub use diff::{Change, What, diff, diff_answer};
pub use explain::{
    Answer, AtEnd, Decision, Explainer, Explanation, Judged, Question, Reach, Reason, Row,
    Unanswerable, Way, ask, explain_own, what_can_i_reach, who_can_reach_me,
};
pub use format::format;
pub use hujson::MAX_SIZE;
pub use pools::{Allotment, allotment};
pub use ports::{protocol_name, protocol_number};
pub use problem::{Problem, Problems, Span};
pub use resolve::{Subjects, tells_apart};
pub use ssh::SshRule;
pub use syntax::{Document, SshAction};

/// A policy to start from, with every role that a small mesh has.
pub const EXAMPLE: &str = include_str!("../../deploy/policy.example.hujson");

/// What holds as long as nobody has set a policy: everybody may reach everybody.
pub const ALLOW_ALL: &str =
    "{\n\t\"grants\": [{\"src\": [\"*\"], \"dst\": [\"*\"], \"ip\": [\"*\"]}],\n}\n";
