//! The policy's table, asked.
//!
//! What is hard is to ask with few calls: where a processor must not predict its returns (SRSO, AMD Zen 3 and 4) each
//! costs some five nanoseconds, as much as what is asked, and that the kernel makes for a slot of the table cannot be
//! saved. Nearly every row lies in the bucket that it hashes to, or nowhere, so that is looked at in place; but not for
//! the lengths of a range of ports, for which the stack has no room (Linux 6.1).

use mesh_common::policy::{Bucket, Row, RowKey, RuleId, find, longest, near};
use mesh_common::verdict::prevailing;
use mesh_common::{Be16, Be32, PolicyEntry, PolicyKey, side};

use crate::maps::{POL, Policy};

/// What the policy of a generation says of a key's remote, or of everybody.
#[inline(always)]
pub fn entry(key: &PolicyKey, generation: u32) -> PolicyEntry {
    let about = u32::from(key.direction) << 24 | u32::from(key.proto) << 16;
    let about = about | u32::from(key.port.get());
    let answer = policy_entry(key.remote.get(), key.local.get(), about, generation);
    PolicyEntry {
        flags: answer as u32,
        rule: RuleId((answer >> 32) as u32),
    }
}

/// [`entry`]: the flags, and above them the rule. `about` is the direction, the protocol and the port, from above.
///
/// Global, because it is asked in many places; of numbers, because it is deep on the stack.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn policy_entry(remote: u32, local: u32, about: u32, generation: u32) -> u64 {
    let Some((slots, mask)) = table(generation) else {
        return 0;
    };
    let key = PolicyKey {
        remote: Be32::new(remote),
        local: Be32::new(local),
        direction: (about >> 24) as u8,
        proto: (about >> 16) as u8,
        port: Be16::new(about as u16),
    };
    let other = |at: &RowKey| Row::from_bits(policy_row(at.ends, at.about, generation));
    let row = |at: &RowKey| match near(at, mask, |slot| slots.get(slot).map(of_words)) {
        Some(row) => row,
        None => other(at),
    };
    // First: the remote's own row, one of many, is in no cache, and what comes after is done meanwhile.
    let any = longest(&key.of_anybody(), row, other);
    let entry = prevailing(longest(&key, row, other), any);
    u64::from(entry.rule.0) << 32 | u64::from(entry.flags)
}

/// The [`Row`] under this [`RowKey`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn policy_row(ends: u64, about: u32, generation: u32) -> u64 {
    let at = RowKey { ends, about };
    match table(generation) {
        Some((slots, mask)) => find(&at, mask, |slot| slots.get(slot).map(of_words)).to_bits(),
        None => 0,
    }
}

/// The slots of a generation's policy, and [`Bucket::mask`].
#[inline(always)]
fn table(generation: u32) -> Option<(&'static Policy, u32)> {
    let slots = POL.get(side(generation))?;
    let first = slots.get(0).map(of_words)?;
    Some((slots, first.mask()))
}

/// The map's slots, for what they are.
#[inline(always)]
fn of_words(words: &[u64; 8]) -> &Bucket {
    const _: () = assert!(size_of::<Bucket>() == size_of::<[u64; 8]>());
    const _: () = assert!(align_of::<Bucket>() == align_of::<[u64; 8]>());
    // SAFETY: the bucket is eight words, every pattern of which is one; user space gives it up before
    // programs see it.
    unsafe { &*core::ptr::from_ref(words).cast() }
}
