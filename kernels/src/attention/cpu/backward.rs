//! Gradients by recomputing the weights block by block.

use pulp::Arch;

use super::{AttentionInput, BLOCK, padded};
use crate::cpu::math::{dot, exp, vectorized};
use crate::cpu::product::{ALIGN, Left, Product, Start, aligned};
use crate::cpu::threads::{Shared, for_each};

/// Gradients of `q`, `k` and `v`, given what the forward made, `out [b, l, h, p]` and `log_sums [b, h, l]`.
///
/// With weights `w`: `dv = w^T dout`, `ds = w (dout v^T - rowsum(dout out)) scale`, `dq = ds k`, `dk = ds^T q`.
pub(crate) fn backward(input: &AttentionInput, out: &[f32], log_sums: &[f32], dout: &[f32]) -> [Vec<f32>; 3] {
    let [b, h, g, l, s, p] = input.dims;
    let (stride, slots) = (aligned(p), aligned(s));
    let (q, k, douts) = (padded(input.q, p), input.k.padded(b * g, s, p), padded(dout, p));
    let (keys, values) = (input.k.turned(b * g, s, p), input.v.turned(b * g, s, p));
    let mut dq = vec![0.0; b * h * l * stride];
    // Per query head, added up over those that share keys afterwards.
    let (mut dk, mut dv) = (vec![0.0; b * h * s * stride], vec![0.0; b * h * s * stride]);
    let shared = [&mut dq, &mut dk, &mut dv].map(|grad| Shared::new(grad));
    let r = h / g;
    for_each(b * h, 4 * b * h * l * s * p, Scratch::new, |scratch, head| {
        let group = head / r;
        // SAFETY: one head per task.
        let [dq, dk, dv] = unsafe {
            [
                shared[0].part(head * l * stride, l * stride),
                shared[1].part(head * s * stride, s * stride),
                shared[2].part(head * s * stride, s * stride),
            ]
        };
        Head {
            batch: head / h,
            q: &input.q[head * l * p..][..l * p],
            q_padded: &q[head * l * stride..][..l * stride],
            k_padded: &k.from(group)[..s * stride],
            keys: &keys[group * p * slots..][..p * slots],
            values: &values[group * p * slots..][..p * slots],
            out: &out[(head / h * l * h + head % h) * p..],
            log_sums: &log_sums[head * l..][..l],
            dout: &dout[head * l * p..][..l * p],
            dout_padded: &douts[head * l * stride..][..l * stride],
        }
        .run(input, scratch, [dq, dk, dv]);
    });
    [cut(&dq, stride, p), cut(&add_heads(&dk, b * g, r), stride, p), cut(&add_heads(&dv, b * g, r), stride, p)]
}

/// Sums over the heads of each group.
fn add_heads(parts: &[f32], groups: usize, r: usize) -> Vec<f32> {
    let size = parts.len() / (groups * r).max(1);
    let mut sums = vec![0.0; groups * size];
    for (sum, heads) in sums.chunks_exact_mut(size.max(1)).zip(parts.chunks_exact((r * size).max(1))) {
        for head in heads.chunks_exact(size) {
            sum.iter_mut().zip(head).for_each(|(sum, value)| *sum += value);
        }
    }
    sums
}

/// Undoes [`padded`].
fn cut(values: &[f32], stride: usize, p: usize) -> Vec<f32> {
    values.chunks_exact(stride).flat_map(|row| &row[..p]).copied().collect()
}

struct Scratch {
    weights: Vec<f32>,
    slopes: Vec<f32>,
}

impl Scratch {
    fn new() -> Self {
        Self { weights: vec![0.0; BLOCK * BLOCK], slopes: vec![0.0; BLOCK * BLOCK] }
    }
}

/// One query head and what it reads.
struct Head<'a> {
    batch: usize,
    q: &'a [f32],
    q_padded: &'a [f32],
    k_padded: &'a [f32],
    keys: &'a [f32],
    values: &'a [f32],
    /// From the head's first row on; rows lie `h * p` apart.
    out: &'a [f32],
    log_sums: &'a [f32],
    dout: &'a [f32],
    dout_padded: &'a [f32],
}

impl Head<'_> {
    fn run(&self, input: &AttentionInput, scratch: &mut Scratch, [dq, dk, dv]: [&mut [f32]; 3]) {
        let [_, h, _, l, s, p] = input.dims;
        let (arch, stride) = (Arch::new(), aligned(p));
        for first in (0..l).step_by(BLOCK) {
            let queries = BLOCK.min(l - first);
            let end = input.end(first + queries - 1);
            let inner: Vec<f32> = (first..first + queries).map(|t| dot(&self.dout[t * p..][..p], &self.out[t * h * p..][..p])).collect();
            for from in (0..end).step_by(BLOCK) {
                let width = BLOCK.min(end - from);
                if !input.meet(self.batch, first..first + queries, from..from + width) {
                    continue;
                }
                let Scratch { weights, slopes } = &mut *scratch;
                for (out, left, right) in [(&mut *weights, self.q, self.keys), (&mut *slopes, self.dout, self.values)] {
                    Product {
                        out,
                        out_stride: BLOCK,
                        left: Left::rows(&left[first * p..], p),
                        right: &right[from..],
                        right_stride: aligned(s),
                        rows: queries,
                        columns: width.next_multiple_of(ALIGN),
                        depth: p,
                        start: Start::Zero,
                    }
                    .run(arch);
                }
                for i in 0..queries {
                    let weights = &mut weights[i * BLOCK..][..width];
                    input.hide(weights, self.batch, first + i, from);
                    let slopes = &mut slopes[i * BLOCK..][..width];
                    vectorized!(arch, differentiate(weights, slopes, input.scale, self.log_sums[first + i], inner[i]));
                }
                let (rows, columns, start) = (width, stride, Start::Old);
                let columns_of = |values| Left { values, row: 1, column: BLOCK };
                for (out, left, right) in [(&mut *dv, &*weights, self.dout_padded), (&mut *dk, &*slopes, self.q_padded)] {
                    let (out, right) = (&mut out[from * stride..], &right[first * stride..]);
                    let (left, depth) = (columns_of(left), queries);
                    Product { out, out_stride: stride, left, right, right_stride: stride, rows, columns, depth, start }.run(arch);
                }
                let (out, right, left) = (&mut dq[first * stride..], &self.k_padded[from * stride..], Left::rows(slopes, BLOCK));
                Product { out, out_stride: stride, left, right, right_stride: stride, rows: queries, columns, depth: width, start }
                    .run(arch);
            }
        }
    }
}

/// Scores to weights, and their gradients to those of the raw scores.
#[inline(always)]
fn differentiate(weights: &mut [f32], slopes: &mut [f32], scale: f32, log_sum: f32, inner: f32) {
    for (weight, slope) in weights.iter_mut().zip(slopes) {
        *weight = exp(*weight * scale - log_sum);
        *slope = *weight * (*slope - inner) * scale;
    }
}
