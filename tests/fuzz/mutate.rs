//! Mutants: what a byte-level fuzzer does to an input, from a seed instead of from coverage.

/// Draws mutants from a sequence that depends on nothing but a name.
pub(crate) struct Mutator {
    state: u64,
}

/// Values at which lengths, counts and signs turn.
const EDGES: [u8; 9] = [0, 1, 0x0c, 0x3f, 0x40, 0x7f, 0x80, 0xc0, 0xff];

impl Mutator {
    pub(crate) fn new(name: &str) -> Self {
        // FNV-1a: any mixing of the name will do.
        let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        Self {
            state: name.bytes().fold(0xcbf2_9ce4_8422_2325, mix) | 1,
        }
    }

    /// One of the inputs with one to eight changes.
    pub(crate) fn mutant(&mut self, inputs: &[&[u8]], longest: usize) -> Vec<u8> {
        let mut bytes = self.pick(inputs).to_vec();
        for _ in 0..=self.below(8) {
            self.change(&mut bytes, inputs);
        }
        bytes.truncate(longest);
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>, inputs: &[&[u8]]) {
        let at = self.below(bytes.len() + 1);
        let length = self.below(16) + 1;
        let end = (at + length).min(bytes.len());
        match self.below(8) {
            0 => self.set(bytes, at, |byte, mutator| byte ^ (1 << mutator.below(8))),
            1 => self.set(bytes, at, |_, mutator| EDGES[mutator.below(EDGES.len())]),
            2 => self.set(bytes, at, |byte, mutator| {
                let step = u8::try_from(mutator.below(9)).unwrap_or_default();
                byte.wrapping_add(step).wrapping_sub(4)
            }),
            3 => drop(bytes.drain(at..end)),
            4 => {
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
            5 => {
                let edge = EDGES[self.below(EDGES.len())];
                bytes.splice(at..at, vec![edge; length]);
            }
            6 => bytes.truncate(at),
            _ => {
                // A piece of another input, instead of or between what is here.
                let other = self.pick(inputs);
                let from = self.below(other.len() + 1);
                let to = (from + length * 4).min(other.len());
                let until = if self.below(2) == 0 { at } else { end };
                bytes.splice(at..until, other[from..to].iter().copied());
            }
        }
    }

    fn set(&mut self, bytes: &mut [u8], at: usize, change: impl Fn(u8, &mut Self) -> u8) {
        if let Some(byte) = bytes.get_mut(at) {
            *byte = change(*byte, self);
        }
    }

    fn pick<'a>(&mut self, inputs: &[&'a [u8]]) -> &'a [u8] {
        inputs[self.below(inputs.len())]
    }

    /// A number less than `bound`, which is small against 2^64.
    fn below(&mut self, bound: usize) -> usize {
        // Marsaglia's xorshift64.
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state % bound as u64) as usize
    }
}
