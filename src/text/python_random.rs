/*! CPython's `random.seed(int)`, `random.randint` and `random.shuffle`, number for number.

The method's reference draws its calibration windows with Python's generator, so repeating its
calibration means repeating that generator: MT19937 (Matsumoto and Nishimura 1998) seeded by key
array, and rejection sampling on the leading bits of its 32-bit words. */

/// Words of MT19937's state.
const STATE_WORDS: usize = 624;
/// Distance of the two words that one step mixes.
const SHIFT: usize = 397;
/// The low 31 bits of a word; the recurrence takes the top bit from one word, the rest from the next.
const LOW_BITS: u32 = 0x7fff_ffff;

/// Python's `random` module in the state that `random.seed(seed)` leaves it in.
#[derive(Clone)]
pub struct PythonRandom {
    state: [u32; STATE_WORDS],
    /// The next word of `state` to hand out; `STATE_WORDS` when all are used.
    next: usize,
}

impl PythonRandom {
    /// `random.seed(seed)`. Python seeds with the 32-bit digits of the integer, lowest first, without
    /// leading zeros (and one digit for 0).
    pub fn new(seed: u64) -> Self {
        let digits = [seed as u32, (seed >> 32) as u32];
        let used = if digits[1] == 0 { 1 } else { 2 };
        Self { state: seeded_by_key(&digits[..used]), next: STATE_WORDS }
    }

    /// `random.randint(low, high)`: an integer in `low..=high`.
    ///
    /// # Panics
    /// If `low > high`, where Python raises `ValueError`.
    pub fn randint(&mut self, low: u64, high: u64) -> u64 {
        assert!(low <= high, "randint of the empty range {low}..={high}");
        // The count of numbers can be 2^64, hence u128; every draw below it fits u64 again.
        let count = u128::from(high - low) + 1;
        let bits = u128::BITS - count.leading_zeros();
        loop {
            let draw = self.random_bits(bits);
            if draw < count {
                return low + draw as u64;
            }
        }
    }

    /// `random.random()`: a number in [0, 1) of 53 bits.
    pub fn random(&mut self) -> f64 {
        let (high, low) = (self.word() >> 5, self.word() >> 6);
        (f64::from(high) * f64::from(1 << 26) + f64::from(low))
            / f64::from(1u32 << 31)
            / f64::from(1 << 22)
    }

    /// `random.shuffle(items)`.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let chosen = self.randint(0, last as u64) as usize;
            items.swap(last, chosen);
        }
    }

    /// `random.getrandbits(bits)` for 1..=128 bits: entire words from the lowest up, and of the last
    /// word its leading bits.
    fn random_bits(&mut self, bits: u32) -> u128 {
        let mut result = 0;
        let mut position = 0;
        while position < bits {
            let wanted = (bits - position).min(32);
            result |= u128::from(self.word() >> (32 - wanted)) << position;
            position += 32;
        }
        result
    }

    /// The next 32 bits, tempered.
    fn word(&mut self) -> u32 {
        if self.next == STATE_WORDS {
            self.renew();
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    /// Steps the recurrence through the entire state.
    fn renew(&mut self) {
        for i in 0..STATE_WORDS {
            let low = self.state[(i + 1) % STATE_WORDS];
            let joined = (self.state[i] & !LOW_BITS) | (low & LOW_BITS);
            let twist = if low & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + SHIFT) % STATE_WORDS] ^ (joined >> 1) ^ twist;
        }
        self.next = 0;
    }
}

/// MT19937's state from one 32-bit number: Knuth's linear generator.
fn seeded_by_number(seed: u32) -> [u32; STATE_WORDS] {
    let mut state = [seed; STATE_WORDS];
    for i in 1..STATE_WORDS {
        state[i] = fold(state[i - 1]).wrapping_mul(1_812_433_253).wrapping_add(i as u32);
    }
    state
}

/// MT19937's state from an array of 32-bit numbers, which must not be empty.
fn seeded_by_key(key: &[u32]) -> [u32; STATE_WORDS] {
    let mut state = seeded_by_number(19_650_218);
    let mut i = 1;
    for step in 0..STATE_WORDS.max(key.len()) {
        let digit = step % key.len();
        state[i] = (state[i] ^ fold(state[i - 1]).wrapping_mul(1_664_525))
            .wrapping_add(key[digit])
            .wrapping_add(digit as u32);
        i = following(&mut state, i);
    }
    for _ in 1..STATE_WORDS {
        state[i] =
            (state[i] ^ fold(state[i - 1]).wrapping_mul(1_566_083_941)).wrapping_sub(i as u32);
        i = following(&mut state, i);
    }
    state[0] = 0x8000_0000;
    state
}

/// The index after `i`. Word 0 only carries the last word round to word 1.
fn following(state: &mut [u32; STATE_WORDS], i: usize) -> usize {
    if i + 1 < STATE_WORDS {
        return i + 1;
    }
    state[0] = state[STATE_WORDS - 1];
    1
}

/// Folds a word's top two bits onto its lowest.
fn fold(word: u32) -> u32 {
    word ^ (word >> 30)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_those_of_cpython() {
        let mut random = PythonRandom::new(0);
        let found: Vec<f64> = (0..3).map(|_| random.random()).collect();
        assert_eq!(found, [0.8444218515250481, 0.7579544029403025, 0.420571580830845]);
    }

    /// The results of CPython 3.11 after `random.seed(seed)`, calls in this order.
    struct Expected {
        seed: u64,
        below_100: [u64; 5],
        starts: [u64; 5],
        coins: [u64; 8],
        wide: [u64; 3],
        word: u128,
        words: [u64; 2],
        double_words: [u64; 2],
    }

    #[test]
    fn repeats_cpython() {
        let expected = [
            Expected {
                seed: 0,
                below_100: [49, 97, 53, 5, 33],
                starts: [268055, 254766, 212302, 159023, 249874],
                coins: [1, 0, 0, 1, 0, 0, 1, 0],
                wide: [216080438496, 162048393474, 728787161649],
                word: 2027837527,
                words: [2404381470, 1519522183],
                double_words: [11268875677793928277, 16842081330453989823],
            },
            Expected {
                seed: 1,
                below_100: [17, 72, 97, 8, 32],
                starts: [61823, 259750, 235662, 247592, 199027],
                coins: [0, 0, 1, 0, 1, 1, 0, 1],
                wide: [505954991676, 65787859354, 55930447594],
                word: 2789779421,
                words: [2325348894, 1001090105],
                double_words: [12485651886753059295, 14037008217343658153],
            },
            Expected {
                seed: 42,
                below_100: [81, 14, 3, 94, 35],
                starts: [128393, 117026, 73158, 53736, 285929],
                coins: [0, 1, 0, 0, 0, 0, 0, 0],
                wide: [436202226093, 482838161067, 16618518354],
                word: 3259052811,
                words: [3460967357, 2998485882],
                double_words: [5125821543982213238, 3971837850219807024],
            },
            Expected {
                seed: (1 << 40) + 3,
                below_100: [28, 7, 70, 12, 72],
                starts: [159457, 223307, 122780, 247091, 291926],
                coins: [1, 1, 1, 1, 1, 1, 1, 0],
                wide: [268267605692, 1085893923228, 60418105969],
                word: 1548885872,
                words: [444091099, 1315563557],
                double_words: [18171208735756653107, 3071394226861198422],
            },
            Expected {
                seed: u64::MAX,
                below_100: [2, 31, 43, 79, 27],
                starts: [239108, 49816, 194534, 28496, 100950],
                coins: [1, 0, 1, 1, 1, 1, 0, 1],
                wide: [649805335942, 822481804090, 312569204528],
                word: 1519317735,
                words: [2289921186, 1014651685],
                double_words: [9216757401018146450, 8683345642407444636],
            },
        ];
        for e in expected {
            let mut random = PythonRandom::new(e.seed);
            assert_eq!(e.below_100.map(|_| random.randint(0, 99)), e.below_100, "seed {}", e.seed);
            assert_eq!(e.starts.map(|_| random.randint(0, 301_366)), e.starts);
            assert_eq!(e.coins.map(|_| random.randint(0, 1)), e.coins);
            assert_eq!(e.wide.map(|_| random.randint(7, 7 + (1 << 40))), e.wide);
            assert_eq!(random.random_bits(32), e.word);
            assert_eq!(e.words.map(|_| random.randint(0, u32::MAX.into())), e.words);
            assert_eq!(e.double_words.map(|_| random.randint(0, u64::MAX - 1)), e.double_words);
            assert_eq!(random.randint(5, 5), 5);
        }
    }

    #[test]
    fn stays_in_step_beyond_one_state() {
        let mut random = PythonRandom::new(0);
        let thousandth = (0..1000).map(|_| random.randint(0, 1_000_000)).last();
        assert_eq!(thousandth, Some(921_079));
    }
}
