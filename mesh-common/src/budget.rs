//! Who may use how much: token buckets, and what each peer holds.
//!
//! A bucket is one word, so that CPUs that race for its last token at worst give it out twice.

/// How fast a [`Bucket`] fills, and how much it holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rate {
    /// Nanoseconds that one token takes to come.
    interval: u64,
    /// Nanoseconds that a full bucket takes to fill, less one token.
    tolerance: u64,
}

impl Rate {
    pub const fn new(per_second: u64, burst: u64) -> Self {
        let interval = 1_000_000_000 / per_second;
        Self {
            interval,
            tolerance: interval * (burst - 1),
        }
    }
}

/// A token bucket by the generic cell rate algorithm (ITU-T I.371, annex A): the time at which it
/// will be full. Zero is a full one.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Bucket(u64);

impl Bucket {
    /// By a signed difference: another CPU may have taken a token a moment after our `now`.
    #[inline(always)]
    const fn ahead(self, now: u64) -> i64 {
        self.0.wrapping_sub(now).cast_signed()
    }

    #[inline(always)]
    pub const fn has(self, now: u64, rate: &Rate) -> bool {
        self.ahead(now) <= rate.tolerance.cast_signed()
    }

    #[inline(always)]
    pub const fn is_full(self, now: u64) -> bool {
        self.ahead(now) <= 0
    }

    /// Less than half full.
    #[inline(always)]
    pub const fn is_low(self, now: u64, rate: &Rate) -> bool {
        self.ahead(now) > rate.tolerance.cast_signed() / 2
    }

    /// The bucket with one token less, whether it had one or not.
    #[inline(always)]
    pub const fn taken(self, now: u64, rate: &Rate) -> Self {
        let from = if self.ahead(now) < 0 { now } else { self.0 };
        Self(from.wrapping_add(rate.interval))
    }
}

/// New flows of one peer, by who opens them ([`crate::Direction`]). A peer alone then takes thirteen seconds to push half
/// of the others' half-open flows out ([`crate::half_open::SETS`]), and we take three: longer than a handshake.
pub const NEW_FLOWS: [Rate; 2] = [Rate::new(4_096, 4_096), Rate::new(16_384, 16_384)];
/// ICMP errors from one peer, as many as Linux sends to one host (`icmp_msgs_per_sec`).
pub const ICMP_ERRORS: Rate = Rate::new(1_000, 50);

/// The value of `peer_load`, which only the packet path writes.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PeerLoad {
    /// Flows that came into `ct_est`, less those that the packet path took out again, by who opened
    /// them. Together with [`PeerFreed`] it tells how many are held.
    pub added: [u32; 2],
    /// Against [`NEW_FLOWS`].
    pub new: [Bucket; 2],
    /// Against [`crate::event::PEER_RATE`].
    pub events: Bucket,
    /// Against [`ICMP_ERRORS`].
    pub errors: Bucket,
}

impl PeerLoad {
    /// Nothing that the next packet could not make anew.
    pub fn is_idle(&self, now: u64) -> bool {
        let [ingress, egress] = self.new;
        [ingress, egress, self.events, self.errors]
            .iter()
            .all(|bucket| bucket.is_full(now))
    }
}

/// The value of `peer_freed`, which only the agent writes: what must be taken from
/// [`PeerLoad::added`] to get the flows that its last sweep has found.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PeerFreed {
    pub freed: [u32; 2],
}

const _: () = assert!(size_of::<PeerLoad>() == 40);
const _: () = assert!(size_of::<PeerFreed>() == 8);

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_bucket_gives_its_burst_at_once_and_then_its_rate() {
        let rate = Rate::new(100, 10);
        for start in [0, 5 * SECOND, u64::MAX - SECOND] {
            let mut bucket = Bucket(start);
            let mut taken = 0;
            for tick in 0..1_000 {
                let now = start.wrapping_add(tick * SECOND / 500);
                if bucket.has(now, &rate) {
                    bucket = bucket.taken(now, &rate);
                    taken += 1;
                }
            }
            assert_eq!(taken, 10 + 199, "two seconds from {start}");
        }
    }

    #[test]
    fn a_bucket_never_used_is_full() {
        let rate = Rate::new(1, 1);
        assert!(Bucket::default().has(7 * SECOND, &rate));
        let empty = Bucket::default().taken(7 * SECOND, &rate);
        assert!(!empty.has(7 * SECOND, &rate));
        assert!(empty.has(8 * SECOND, &rate));
    }
}
