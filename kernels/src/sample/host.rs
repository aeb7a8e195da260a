//! A draw on the host.

use super::SampleOptions;

/// Bijection of 32 bits in which every bit of the input moves about half of the output's (C. Wellons' `lowbias32`).
fn mix(mut x: u32) -> u32 {
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// What the hashes of one draw begin from.
fn keys(seed: u64, count: u32) -> [u32; 2] {
    let low = mix((seed as u32).wrapping_add(0x9e37_79b9u32.wrapping_mul(count.wrapping_add(1))));
    [low, mix((seed >> 32) as u32 ^ low.wrapping_add(0x85eb_ca6b))]
}

/// A number from Gumbel's distribution for one token of a draw.
fn gumbel(keys: [u32; 2], id: u32) -> f32 {
    let hash = mix(mix(id ^ keys[0]).wrapping_add(keys[1]));
    // In the middle of one of 2^23 parts of the unit interval: neither 0 nor 1.
    let uniform = ((hash >> 9) as f32 + 0.5) * (1.0 / 8_388_608.0);
    -(-uniform.ln()).ln()
}

/// Smallest logit that may be drawn.
fn floor(logits: &[f32], options: SampleOptions) -> f32 {
    let SampleOptions { temperature, top_k, top_p } = options;
    let mut floor = f32::NEG_INFINITY;
    if top_k > 0 && top_k < logits.len() {
        let mut values = logits.to_vec();
        floor = *values.select_nth_unstable_by(top_k - 1, |a, b| b.total_cmp(a)).1;
    }
    if top_p < 1.0 {
        let mut kept: Vec<f32> = logits.iter().copied().filter(|x| *x >= floor).collect();
        kept.sort_unstable_by(|a, b| b.total_cmp(a));
        let best = kept[0];
        let weight = |x: &f32| f64::from((x - best) / temperature).exp();
        let goal = f64::from(top_p) * kept.iter().map(weight).sum::<f64>();
        let mut sum = 0.0;
        let reaches = |x: &&f32| {
            sum += weight(x);
            sum >= goal
        };
        floor = kept.iter().find(reaches).copied().unwrap_or(floor);
    }
    floor
}

/// Draws from logits that are numbers or minus infinity, for a row of this seed that has made so many draws; nothing where all are
/// minus infinity.
pub fn draw(logits: &[f32], options: SampleOptions, seed: u64, count: u32) -> Option<u32> {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if best == f32::NEG_INFINITY {
        return None;
    }
    let (floor, keys) = (floor(logits, options), keys(seed, count));
    let score = |(id, x): (usize, &f32)| ((x - best) / options.temperature + gumbel(keys, id as u32), id as u32);
    let may = logits.iter().enumerate().filter(|(_, x)| **x >= floor && **x > f32::NEG_INFINITY);
    // The first among equals.
    may.map(score).reduce(|a, b| if b.0 > a.0 { b } else { a }).map(|(_, id)| id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(logits: &[f32], options: SampleOptions, draws: u32) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for count in 0..draws {
            counts[draw(logits, options, 7, count).unwrap() as usize] += 1.0 / f64::from(draws);
        }
        counts
    }

    #[test]
    fn draws_of_neighbouring_seeds_counts_and_tokens_are_independent() {
        let options = SampleOptions { temperature: 1.0, top_k: 0, top_p: 1.0 };
        // Two tokens, so each draw is a bit: of 4096 of them some half agree with those of another seed or of the draw before.
        let bits = |seed: u64, from: u32| (0..4096).map(|count| draw(&[0.0; 2], options, seed, from + count).unwrap()).collect::<Vec<_>>();
        let agree = |a: &[u32], b: &[u32]| a.iter().zip(b).filter(|(a, b)| a == b).count();
        let own = bits(5, 0);
        for other in [bits(6, 0), bits(5 + (1 << 32), 0), bits(5, 1), bits(5 ^ (1 << 31), 0)] {
            assert!((1900..2200).contains(&agree(&own, &other)), "{}", agree(&own, &other));
        }
        assert!((1900..2200).contains(&own.iter().map(|bit| *bit as usize).sum::<usize>()));
        // Uniform over many: each of 64 tokens some 64 times in 4096 draws.
        let counts = frequencies(&[0.0; 64], options, 4096);
        let chi: f64 = counts.iter().map(|f| (f * 4096.0 - 64.0).powi(2) / 64.0).sum();
        assert!((30.0..110.0).contains(&chi), "{chi}");
    }

    #[test]
    fn rare_tokens_are_as_rare_as_they_should_be() {
        let logits = [0.0, (0.001f32).ln(), (0.0001f32).ln()];
        let found = frequencies(&logits, SampleOptions { temperature: 1.0, top_k: 0, top_p: 1.0 }, 400_000);
        assert!((found[1] / 0.001 - 1.0).abs() < 0.2 && (found[2] / 0.0001 - 1.0).abs() < 0.5, "{found:?}");
    }
}
