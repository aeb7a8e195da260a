//! Plain tensor operations; they ask the device where the rows stand.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};

use super::{Angles, NEAR, StepArgs, StepOut};
use crate::attention::{AttentionArgs, AttentionMask, SlotIds, reference};

fn host<B: Backend>(values: &Tensor<B, 1, Int>) -> Vec<i32> {
    values.to_data().iter::<i32>().collect()
}

/// Cosines and sines `[b, 1, half]` of these positions.
fn angles<B: Backend>(angles: &Angles<B>, positions: &[i32]) -> [Tensor<B, 3>; 2] {
    let (b, half) = (positions.len(), angles.half);
    let of = |table: &Tensor<B, 1>, count: usize, rows: Vec<i32>| {
        let rows = Tensor::<B, 1, Int>::from_data(TensorData::new(rows, [b]), &table.device());
        let both = table.clone().reshape([2, count, half]).select(1, rows);
        [0, 1].map(|part| both.clone().narrow(0, part, 1).reshape([b, 1, half]))
    };
    let [near_cos, near_sin] = of(&angles.near, NEAR, positions.iter().map(|t| t % NEAR as i32).collect());
    let [far_cos, far_sin] = of(&angles.far, angles.blocks, positions.iter().map(|t| t / NEAR as i32).collect());
    [near_cos.clone() * far_cos.clone() - near_sin.clone() * far_sin.clone(), near_sin * far_cos + near_cos * far_sin]
}

/// Rotates pairs `(i, i + half)` of `[b, heads, p]`.
fn rotate<B: Backend>(x: Tensor<B, 3>, [cos, sin]: &[Tensor<B, 3>; 2]) -> Tensor<B, 3> {
    let (dtype, [_, _, p], half) = (x.dtype(), x.dims(), cos.dims()[2]);
    let x = x.cast(DType::F32);
    let (first, second) = (x.clone().narrow(2, 0, half), x.clone().narrow(2, half, half));
    let mut parts = vec![
        first.clone() * cos.clone() - second.clone() * sin.clone(),
        second * cos.clone() + first * sin.clone(), //
    ];
    if 2 * half < p {
        parts.push(x.narrow(2, 2 * half, p - 2 * half));
    }
    Tensor::cat(parts, 2).cast(dtype)
}

/// See [`super::attention_step`].
pub(crate) fn attention_step<B: Backend>(args: StepArgs<B>) -> StepOut<B> {
    let StepArgs { q, k, v, keys, values, angles: table, scale, standing } = args;
    let [b, h, p] = q.dims();
    let [_, g, capacity, _] = keys.dims();
    let places = host(&standing.places);
    let slot = places[0] as usize;
    let (q, k) = match &table {
        Some(table) => {
            let turned = angles(table, &places[1..]);
            (rotate(q, &turned), rotate(k, &turned))
        }
        None => (q, k),
    };
    let write = |buffer: Tensor<B, 4>, new: Tensor<B, 3>| buffer.slice_assign([0..b, 0..g, slot..slot + 1, 0..p], new.unsqueeze_dim(2));
    let (keys, values) = (write(keys, k), write(values, v));
    let s = slot + 1;
    let mask = match &standing.documents {
        None => AttentionMask::causal(1, s),
        Some(documents) => {
            let ids = host(documents);
            let slots = ids[b..].chunks(capacity).flat_map(|row| row[..s].iter().copied()).collect();
            AttentionMask::new(1, s, Some(SlotIds { batch: b, queries: ids[..b].to_vec(), slots }.into()))
        }
    };
    let used = |buffer: &Tensor<B, 4>| buffer.clone().narrow(2, 0, s);
    let y = reference::attention(AttentionArgs { q: q.unsqueeze_dim(2), k: used(&keys), v: used(&values), scale, mask });
    StepOut { y: y.reshape([b, h, p]), keys, values }
}
