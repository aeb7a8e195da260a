//! One more token for every row, against buffers of fixed size that it is written into.
//!
//! What changes from step to step (how many slots are used, each row's position) is read from the device, so a step is the same call
//! every time and can be recorded (see [`crate::record`]).

pub(crate) mod reference;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};

use super::SlotIds;
use crate::error::expect_shape;
use crate::{ArgumentError, KernelBackend};

/// Positions of a block of [`Angles`].
pub(crate) const NEAR: usize = 1024;

/// Where the rows of a batch stand, on the device.
#[derive(Debug, Clone)]
pub struct Standing<B: Backend> {
    /// `[1 + b]`: slots in use, then the position of each row's next token.
    pub(crate) places: Tensor<B, 1, Int>,
    /// `[b + b * s]`: each row's document, then those of its slots; absent where all slots may be seen.
    pub(crate) documents: Option<Tensor<B, 1, Int>>,
    rows: usize,
    capacity: usize,
}

impl<B: KernelBackend> Standing<B> {
    /// Rows with `slots` used slots of `capacity`, whose next tokens are at `positions`. In `documents`, where rows hold several documents or
    /// padding, a row has one query, which goes on with its document.
    ///
    /// # Errors
    /// When counts do not match, or the slots are not fewer than the capacity.
    pub fn new(
        slots: usize,
        positions: &[i32],
        documents: Option<&SlotIds>,
        capacity: usize,
        device: &B::Device,
    ) -> Result<Self, ArgumentError> {
        let rows = positions.len();
        expect_shape("attention_step", "slots in use, at most", &[slots.min(capacity)], &[slots])?;
        let upload = |values: Vec<i32>| Tensor::from_data(TensorData::new(values.clone(), [values.len()]), (device, DType::I32));
        let documents = match documents {
            None => None,
            Some(ids) => {
                expect_shape("attention_step", "query ids", &[ids.queries.len()], &[rows])?;
                expect_shape("attention_step", "slot ids", &[ids.slots.len()], &[rows * slots])?;
                let row = |row: usize| {
                    let own = ids.queries[row];
                    ids.slots[row * slots..(row + 1) * slots].iter().copied().chain(std::iter::repeat_n(own, capacity - slots))
                };
                Some(upload(ids.queries.iter().copied().chain((0..rows).flat_map(row)).collect()))
            }
        };
        let places = upload(std::iter::once(slots as i32).chain(positions.iter().copied()).collect());
        Ok(Self { places, documents, rows, capacity })
    }

    /// Every row is a token further: in place, where nobody else holds it.
    pub fn advance(self) -> Self {
        Self { places: B::next_places(self.places), ..self }
    }
}

impl<B: Backend> Standing<B> {
    /// Slots of the buffers.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Slots in use and positions, as they lie on the device.
    pub fn places(&self) -> &Tensor<B, 1, Int> {
        &self.places
    }
}

/// Cosines and sines of the rotary angles of positions below some number.
///
/// Position `t` has the angle of `t % 1024` and that of the block it is in added: both tables are short, and exact in float32.
#[derive(Debug, Clone)]
pub struct Angles<B: Backend> {
    /// `[2 * 1024 * half]`: cosines, then sines.
    pub(crate) near: Tensor<B, 1>,
    /// `[2 * blocks * half]`.
    pub(crate) far: Tensor<B, 1>,
    pub(crate) half: usize,
    pub(crate) blocks: usize,
}

impl<B: Backend> Angles<B> {
    /// For positions below `count`, with these frequencies in radians per position, one per rotated pair.
    pub fn new(frequencies: &[f64], count: usize, device: &B::Device) -> Self {
        let blocks = count.div_ceil(NEAR).max(1);
        let table = |count: usize, step: usize| {
            let angle = |t: usize| frequencies.iter().map(move |w| (t * step) as f64 * w);
            let cos = (0..count).flat_map(angle).map(|x| x.cos() as f32);
            let values: Vec<f32> = cos.chain((0..count).flat_map(angle).map(|x| x.sin() as f32)).collect();
            let len = values.len();
            Tensor::from_data(TensorData::new(values, [len]), (device, DType::F32))
        };
        Self { near: table(NEAR, 1), far: table(blocks, NEAR), half: frequencies.len(), blocks }
    }
}

/// Arguments of [`attention_step`].
#[derive(Debug, Clone)]
pub struct StepArgs<B: Backend> {
    /// `[b, h, p]`, not rotated.
    pub q: Tensor<B, 3>,
    /// `[b, g, p]`, not rotated.
    pub k: Tensor<B, 3>,
    /// `[b, g, p]`.
    pub v: Tensor<B, 3>,
    /// `[b, g, s, p]`, rotated; `s` is the capacity.
    pub keys: Tensor<B, 4>,
    /// `[b, g, s, p]`.
    pub values: Tensor<B, 4>,
    /// Rotary angles, where there are any.
    pub angles: Option<Angles<B>>,
    /// Multiplies the scores.
    pub scale: f32,
    /// Where the rows stand before this token.
    pub standing: Standing<B>,
}

/// What [`attention_step`] gives.
#[derive(Debug, Clone)]
pub struct StepOut<B: Backend> {
    /// `[b, h, p]`.
    pub y: Tensor<B, 3>,
    /// The buffers with the new token, in place where nobody else holds them.
    pub keys: Tensor<B, 4>,
    /// See `keys`.
    pub values: Tensor<B, 4>,
}

impl<B: Backend> StepArgs<B> {
    /// Checks that the shapes agree.
    ///
    /// # Errors
    /// The first disagreement found.
    pub fn check(&self) -> Result<(), ArgumentError> {
        const OP: &str = "attention_step";
        let [b, h, p] = self.q.dims();
        let [_, g, _] = self.k.dims();
        let s = self.standing.capacity;
        expect_shape(OP, "rows", &[self.standing.rows], &[b])?;
        expect_shape(OP, "k", &self.k.dims(), &[b, g, p])?;
        expect_shape(OP, "v", &self.v.dims(), &[b, g, p])?;
        expect_shape(OP, "keys", &self.keys.dims(), &[b, g, s, p])?;
        expect_shape(OP, "values", &self.values.dims(), &[b, g, s, p])?;
        if let Some(angles) = self.angles.as_ref().filter(|angles| 2 * angles.half > p || angles.blocks * NEAR < s) {
            let (need, found) = ([p, s], [2 * angles.half, angles.blocks * NEAR]);
            return expect_shape(OP, "rotated channels and positions of the angles", &found, &need);
        }
        if g == 0 || !h.is_multiple_of(g) {
            return Err(ArgumentError::NotDivisible { op: OP, what: "query heads", value: h, by: "key heads", divisor: g });
        }
        Ok(())
    }
}

/// Rotates query and key to their row's position, writes key and value into the next slot, and attends to all slots up to it. Not
/// differentiable. There must be a slot left; the caller advances the standing when all layers have made the step.
///
/// # Panics
/// When [`StepArgs::check`] fails.
pub fn attention_step<B: KernelBackend>(args: StepArgs<B>) -> StepOut<B> {
    if let Err(error) = args.check() {
        panic!("{error}");
    }
    B::attention_step(args)
}
