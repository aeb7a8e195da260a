//! Python's `random.Random(seed)`: the harness draws its examples and bootstrap samples with it, so that everyone draws the same.

const N: usize = 624;
const M: usize = 397;

/// The Mersenne Twister, seeded as Python seeds it with a small integer.
pub(crate) struct Random {
    state: [u32; N],
    next: usize,
}

impl Random {
    /// `random.Random(seed)`.
    pub fn new(seed: u32) -> Self {
        let mut state = [0u32; N];
        state[0] = 19_650_218;
        for i in 1..N {
            state[i] = 1_812_433_253u32.wrapping_mul(state[i - 1] ^ (state[i - 1] >> 30)).wrapping_add(i as u32);
        }
        // `init_by_array` with a key of one word.
        let mut i = 1;
        for _ in 0..N {
            state[i] = (state[i] ^ (state[i - 1] ^ (state[i - 1] >> 30)).wrapping_mul(1_664_525)).wrapping_add(seed);
            i = turn(&mut state, i);
        }
        for _ in 0..N - 1 {
            state[i] = (state[i] ^ (state[i - 1] ^ (state[i - 1] >> 30)).wrapping_mul(1_566_083_941)).wrapping_sub(i as u32);
            i = turn(&mut state, i);
        }
        state[0] = 0x8000_0000;
        Self { state, next: N }
    }

    fn word(&mut self) -> u32 {
        if self.next == N {
            for i in 0..N {
                let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
                let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ odd;
            }
            self.next = 0;
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// Below `n`, from 1 to 2^32 - 1.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let drawn = (self.word() >> (32 - bits)) as usize;
            if drawn < n {
                return drawn;
            }
        }
    }

    /// `choices(range(n))[0]`, where `n` is not 0.
    pub fn choice(&mut self, n: usize) -> usize {
        let (high, low) = (self.word() >> 5, self.word() >> 6);
        let uniform = (f64::from(high) * 67_108_864.0 + f64::from(low)) / 9_007_199_254_740_992.0;
        (uniform * n as f64) as usize
    }

    /// `sample(range(n), k)`, where `k <= n`.
    pub fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        let mut limit = 21;
        if k > 5 {
            limit += 4usize.pow(((k * 3) as f64).log(4.0).ceil() as u32);
        }
        if n <= limit {
            let mut pool: Vec<usize> = (0..n).collect();
            return (0..k)
                .map(|i| {
                    let at = self.below(n - i);
                    let drawn = pool[at];
                    pool[at] = pool[n - i - 1];
                    drawn
                })
                .collect();
        }
        let mut drawn = Vec::with_capacity(k);
        while drawn.len() < k {
            let at = self.below(n);
            if !drawn.contains(&at) {
                drawn.push(at);
            }
        }
        drawn
    }
}

/// The next place of a seeding pass.
fn turn(state: &mut [u32; N], i: usize) -> usize {
    if i + 1 < N {
        return i + 1;
    }
    state[0] = state[N - 1];
    1
}

#[cfg(test)]
mod tests {
    use super::Random;

    #[test]
    fn samples_are_those_of_python() {
        // random.Random(1234), then these calls of sample(range(n), k).
        let mut random = Random::new(1234);
        assert_eq!(random.sample(100, 5), [99, 56, 14, 0, 11]);
        assert_eq!(random.sample(2251, 5), [143, 343, 403, 1452, 969]);
        assert_eq!(random.sample(10, 3), [0, 9, 8]);
        assert_eq!(random.sample(1000, 8), [354, 663, 638, 495, 630, 474, 152, 93]);
    }

    #[test]
    fn choices_are_those_of_python() {
        // random.Random(7).choices(range(100), k=6)
        let mut random = Random::new(7);
        assert_eq!((0..6).map(|_| random.choice(100)).collect::<Vec<_>>(), [32, 15, 65, 7, 53, 36]);
    }
}
