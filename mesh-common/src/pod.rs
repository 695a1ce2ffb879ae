//! Leave for aya to copy the map types as bytes.
#![expect(
    unsafe_code,
    reason = "Pod is an unsafe marker, and these types are the crate's whole purpose"
)]

use aya::Pod;

use crate::addr::Prefix;
use crate::budget::{self, PeerFreed, PeerLoad};
use crate::event::{DenyEntry, DenyKey};
use crate::flow::{Flow, FlowEntry, FlowKey, FragmentEntry, FragmentKey};
use crate::half_open::Set;
use crate::maps::{Config, Count};
use crate::place::Place;
use crate::policy::{self, RuleId};
use crate::{Address, IdentityEntry, Sides};

macro_rules! pod {
    ($($type:ty),* $(,)?) => {$(
        // SAFETY: repr(C) or transparent over integers, without padding (sizes are asserted beside
        // each type), so every byte is initialised and every bit pattern is a value.
        unsafe impl Pod for $type {}
    )*};
}

pod!(
    Address,
    Config,
    Count,
    DenyEntry,
    DenyKey,
    Flow,
    FlowEntry,
    FlowKey,
    FragmentEntry,
    FragmentKey,
    IdentityEntry,
    PeerFreed,
    PeerLoad,
    Place,
    Prefix,
    RuleId,
    Set,
    Sides,
    budget::Bucket,
    policy::Bucket,
);
