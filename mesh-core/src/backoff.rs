//! Jittered exponential backoff; the randomness is injected as a seed.
//!
//! The jitter is the point: after a coordinator restart every node of the mesh retries, and they
//! must not do so together.

use std::time::Duration;

/// Wait before the first retry. A restarted coordinator is back within a second or two, so the
/// first retries may be quick.
const FIRST: Duration = Duration::from_millis(200);
/// Longest wait, before jitter. Ten thousand nodes then knock some five hundred times a second.
const LONGEST: Duration = Duration::from_secs(20);

/// Doubling waits, each multiplied by a factor from 0.5 to 1.5.
#[derive(Clone, Debug)]
pub struct Backoff {
    attempt: u32,
    random: SplitMix,
}

impl Backoff {
    pub fn new(seed: u64) -> Self {
        Self {
            attempt: 0,
            random: SplitMix(seed),
        }
    }

    /// The wait before the next attempt.
    pub fn next_wait(&mut self) -> Duration {
        let doubled = FIRST.saturating_mul(1 << self.attempt.min(16));
        self.attempt = self.attempt.saturating_add(1);
        self.jitter(doubled.min(LONGEST))
    }

    /// The attempt succeeded for good: start again from the shortest wait.
    pub fn reset(&mut self) {
        self.attempt = 0;
    }

    /// `wait` times a factor from 0.5 to 1.5.
    pub fn jitter(&mut self, wait: Duration) -> Duration {
        let parts = u32::try_from(self.random.next() % 1024).expect("below 1024");
        wait / 2 + wait / 1024 * parts
    }
}

/// Sebastiano Vigna's SplitMix64: enough to spread waits, never for secrets.
#[derive(Clone, Debug)]
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_start_again() {
        let mut backoff = Backoff::new(7);
        let waits: Vec<Duration> = (0..40).map(|_| backoff.next_wait()).collect();
        assert!(waits[0] >= FIRST / 2 && waits[0] <= FIRST * 3 / 2);
        assert!(waits.iter().all(|wait| *wait <= LONGEST * 3 / 2));
        assert!(waits[20..].iter().all(|wait| *wait >= LONGEST / 2));
        backoff.reset();
        assert!(backoff.next_wait() <= FIRST * 3 / 2);
    }

    #[test]
    fn two_seeds_wait_differently() {
        let spread = |seed| {
            let mut backoff = Backoff::new(seed);
            (0..8).map(|_| backoff.next_wait()).collect::<Vec<_>>()
        };
        assert_eq!(spread(1), spread(1));
        assert_ne!(spread(1), spread(2));
    }
}
