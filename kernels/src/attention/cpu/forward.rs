//! Blocks of queries against blocks of slots.

use pulp::{Arch, Simd, WithSimd};

use super::{AttentionInput, BLOCK, Matrices};
use crate::cpu::math::{exp, vectorized};
use crate::cpu::product::{ALIGN, Left, Product, Start, aligned};
use crate::cpu::threads::{Shared, for_each};

/// What backward needs besides the inputs.
pub(crate) struct Outcome {
    /// `[b, l, h, p]`: heads behind tokens, as projections take them.
    pub out: Vec<f32>,
    /// Logarithm of the sum of exponentials of the scores, `[b, h, l]`; infinite where nothing is seen.
    pub log_sums: Vec<f32>,
}

/// How queries and slots are cut into tasks. Independent of the number of threads.
struct Tasks {
    /// Heads that share keys and values, taken together.
    heads: usize,
    /// Queries of each head.
    queries: usize,
    /// Slots.
    slots: usize,
    head_blocks: usize,
    query_blocks: usize,
    splits: usize,
}

impl Tasks {
    fn new([b, h, g, l, s, _]: [usize; 6]) -> Self {
        const ENOUGH: usize = 16;
        const SPLIT: usize = 8 * BLOCK;
        let r = h / g;
        let heads = (BLOCK / l.max(1)).clamp(1, r);
        let queries = l.clamp(1, BLOCK);
        let (head_blocks, query_blocks) = (r.div_ceil(heads), l.div_ceil(queries));
        // Few queries leave threads idle unless the slots are shared out as well.
        let slots = if b * g * head_blocks * query_blocks < ENOUGH { SPLIT } else { s.next_multiple_of(BLOCK).max(BLOCK) };
        Self { heads, queries, slots, head_blocks, query_blocks, splits: s.div_ceil(slots) }
    }
}

/// Unfinished sums over a part of the slots; one set for each split.
struct Partial<'a> {
    /// `[splits, b h l, aligned(p)]`
    out: Shared<'a>,
    /// `[splits, b h l, 2]`: the largest score and the sum of exponentials relative to it.
    sums: Shared<'a>,
}

/// Output and logarithms of the sums.
pub(crate) fn forward(input: &AttentionInput) -> Outcome {
    let [b, h, g, l, s, p] = input.dims;
    let tasks = Tasks::new(input.dims);
    let (stride, rows) = (aligned(p), b * h * l);
    let v = input.v.padded(b * g, s, p);
    // Turning the keys pays when many queries read them.
    let keys = (tasks.heads * tasks.queries >= 16).then(|| input.k.turned(b * g, s, p));
    let (mut out, mut sums) = (vec![0.0; tasks.splits * rows * stride], vec![0.0; tasks.splits * rows * 2]);
    let partial = Partial { out: Shared::new(&mut out), sums: Shared::new(&mut sums) };
    let count = b * g * tasks.head_blocks * tasks.query_blocks * tasks.splits;
    let scratch = || vec![0.0; tasks.heads * tasks.queries * BLOCK];
    for_each(count, rows * s * p, scratch, |scores, index| {
        let (split, rest) = (index % tasks.splits, index / tasks.splits);
        // Late queries see the most: they go first.
        let (query_block, rest) = (tasks.query_blocks - 1 - rest % tasks.query_blocks, rest / tasks.query_blocks);
        let (head_block, rest) = (rest % tasks.head_blocks, rest / tasks.head_blocks);
        let (group, batch) = (rest % g, rest / g);
        let first = query_block * tasks.queries;
        let heads = tasks.heads.min(h / g - head_block * tasks.heads);
        let task = Task {
            batch,
            group: batch * g + group,
            row: (batch * h + group * (h / g) + head_block * tasks.heads) * l + first,
            heads,
            first,
            queries: tasks.queries.min(l - first),
            slots: split * tasks.slots..s.min((split + 1) * tasks.slots),
            split: split * rows,
        };
        task.run(input, keys.as_deref(), &v, &partial, scores);
    });
    finish(input, &tasks, &out, &sums)
}

/// Rows of a task that finishes them.
const ROWS: usize = 64;

/// Merges the splits and divides by the sums.
fn finish(input: &AttentionInput, tasks: &Tasks, partial: &[f32], sums: &[f32]) -> Outcome {
    let [b, h, _, l, _, p] = input.dims;
    let (stride, rows) = (aligned(p), b * h * l);
    let (mut out, mut log_sums) = (vec![0.0; rows * p], vec![f32::INFINITY; rows]);
    let shared = [&mut out, &mut log_sums].map(|values| Shared::new(values));
    for_each(
        rows.div_ceil(ROWS),
        tasks.splits * rows * p,
        || (),
        |(), task| {
            for row in task * ROWS..rows.min((task + 1) * ROWS) {
                let (batch, head, t) = (row / (h * l), row / l % h, row % l);
                // SAFETY: each row belongs to one task.
                let (out, log_sum) = unsafe { (shared[0].part(((batch * l + t) * h + head) * p, p), shared[1].part(row, 1)) };
                let of = |split: usize| (sums[(split * rows + row) * 2], sums[(split * rows + row) * 2 + 1]);
                let largest = (0..tasks.splits).map(|split| of(split).0).fold(f32::NEG_INFINITY, f32::max);
                let mut total = 0.0;
                for split in 0..tasks.splits {
                    let (max, sum) = of(split);
                    if max == f32::NEG_INFINITY {
                        continue;
                    }
                    let weight = (max - largest).exp();
                    total += weight * sum;
                    let part = &partial[(split * rows + row) * stride..][..p];
                    out.iter_mut().zip(part).for_each(|(out, part)| *out += weight * part);
                }
                if total != 0.0 {
                    out.iter_mut().for_each(|out| *out /= total);
                    log_sum[0] = largest + total.ln();
                }
            }
        },
    );
    Outcome { out, log_sums }
}

/// Some queries of heads of one group, against a part of the slots.
struct Task {
    batch: usize,
    /// Index of the keys and values.
    group: usize,
    /// Row of the first query of the first head in `q`; heads follow at a distance of `l` rows.
    row: usize,
    heads: usize,
    /// Position of the first query.
    first: usize,
    queries: usize,
    slots: std::ops::Range<usize>,
    /// Rows before this split's in the partial results.
    split: usize,
}

impl Task {
    fn run(&self, input: &AttentionInput, keys: Option<&[f32]>, v: &Matrices, partial: &Partial, scores: &mut [f32]) {
        let [_, _, _, l, s, p] = input.dims;
        let (arch, stride) = (Arch::new(), aligned(p));
        for head in 0..self.heads {
            let row = self.row + head * l;
            // SAFETY: a query and a split belong to one task.
            let sums = unsafe { partial.sums.part((self.split + row) * 2, self.queries * 2) };
            sums.chunks_exact_mut(2).for_each(|sums| sums[0] = f32::NEG_INFINITY);
        }
        let queries = self.first..self.first + self.queries;
        let end = self.slots.end.min(input.end(queries.end - 1));
        for from in (self.slots.start..end).step_by(BLOCK) {
            let width = BLOCK.min(end - from);
            if !input.meet(self.batch, queries.clone(), from..from + width) {
                continue;
            }
            for head in 0..self.heads {
                let row = self.row + head * l;
                let q = &input.q[row * p..][..self.queries * p];
                let scores = &mut scores[..self.queries * BLOCK];
                match keys {
                    Some(keys) => {
                        let right = &keys[self.group * p * aligned(s) + from..];
                        Product {
                            out: scores,
                            out_stride: BLOCK,
                            left: Left::rows(q, p),
                            right,
                            right_stride: aligned(s),
                            rows: self.queries,
                            columns: width.next_multiple_of(ALIGN),
                            depth: p,
                            start: Start::Zero,
                        }
                        .run(arch);
                    }
                    None => arch.dispatch(Scores { scores, q, k: &input.k.from(self.group)[from * p..][..width * p], p }),
                }
                // SAFETY: as above.
                let (sums, out) = unsafe {
                    (
                        partial.sums.part((self.split + row) * 2, self.queries * 2),
                        partial.out.part((self.split + row) * stride, self.queries * stride),
                    )
                };
                let mut shrink = [0.0; BLOCK];
                for (i, (scores, sums)) in scores.chunks_exact_mut(BLOCK).zip(sums.chunks_exact_mut(2)).enumerate() {
                    input.hide(&mut scores[..width], self.batch, self.first + i, from);
                    shrink[i] = vectorized!(arch, soften(&mut scores[..width], input.scale, sums));
                }
                Product {
                    out,
                    out_stride: stride,
                    left: Left::rows(scores, BLOCK),
                    right: &v.from(self.group)[from * stride..],
                    right_stride: stride,
                    rows: self.queries,
                    columns: stride,
                    depth: width,
                    start: Start::Rows(&shrink),
                }
                .run(arch);
            }
        }
    }
}

/// Scores to exponentials relative to the largest score so far; returns the factor for what was summed up before.
#[inline(always)]
fn soften(scores: &mut [f32], scale: f32, sums: &mut [f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; ALIGN];
    let mut blocks = scores.chunks_exact_mut(ALIGN);
    for block in blocks.by_ref() {
        for (lane, score) in lanes.iter_mut().zip(block) {
            *score *= scale;
            *lane = if *score > *lane { *score } else { *lane };
        }
    }
    let mut largest = sums[0];
    for score in blocks.into_remainder() {
        *score *= scale;
        largest = largest.max(*score);
    }
    largest = lanes.into_iter().fold(largest, f32::max);
    if largest == f32::NEG_INFINITY {
        scores.fill(0.0);
        return 1.0;
    }
    let shrink = exp(sums[0] - largest);
    let mut lanes = [0.0; ALIGN];
    let mut blocks = scores.chunks_exact_mut(ALIGN);
    for block in blocks.by_ref() {
        for (lane, score) in lanes.iter_mut().zip(block) {
            *score = exp(*score - largest);
            *lane += *score;
        }
    }
    let mut sum = 0.0;
    for score in blocks.into_remainder() {
        *score = exp(*score - largest);
        sum += *score;
    }
    sums[1] = sums[1] * shrink + sum + lanes.into_iter().sum::<f32>();
    sums[0] = largest;
    shrink
}

/// Scores of few queries: products along the rows of `k` as they lie.
struct Scores<'a> {
    scores: &'a mut [f32],
    q: &'a [f32],
    k: &'a [f32],
    p: usize,
}

impl WithSimd for Scores<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for (slot, key) in self.k.chunks_exact(self.p).enumerate() {
            let (key, key_tail) = S::as_simd_f32s(key);
            for (query, scores) in self.q.chunks_exact(self.p).zip(self.scores.chunks_exact_mut(BLOCK)) {
                let (query, query_tail) = S::as_simd_f32s(query);
                let mut sum = simd.splat_f32s(0.0);
                for (&q, &k) in query.iter().zip(key) {
                    sum = simd.mul_add_f32s(q, k, sum);
                }
                sum = simd.mul_add_f32s(simd.partial_load_f32s(query_tail), simd.partial_load_f32s(key_tail), sum);
                scores[slot] = simd.reduce_sum_f32s(sum);
            }
        }
    }
}
