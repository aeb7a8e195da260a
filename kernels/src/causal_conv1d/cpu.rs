//! On slices: a token's channels are one vector, its taps are rows that lie side by side in the cache.

use pulp::Arch;

use crate::cpu::Documents;
use crate::cpu::math::{silu, silu_with_slope, vectorized};
use crate::cpu::threads::{Shared, for_each};

/// Arguments as slices; shapes as in [`super::ConvArgs`].
pub(crate) struct ConvInput<'a> {
    /// `b`, `l`, `e`, `k`.
    pub dims: [usize; 4],
    pub x: &'a [f32],
    pub weight: &'a [f32],
    pub bias: Option<&'a [f32]>,
    pub state: Option<&'a [f32]>,
    pub documents: Documents<'a>,
    pub silu: bool,
}

impl ConvInput<'_> {
    /// Taps as rows: `[k, e]`.
    fn taps(&self) -> Vec<f32> {
        let [_, _, e, k] = self.dims;
        let mut taps = vec![0.0; k * e];
        for (channel, weight) in self.weight.chunks_exact(k).enumerate() {
            for (j, &value) in weight.iter().enumerate() {
                taps[j * e + channel] = value;
            }
        }
        taps
    }

    /// The input `position` tokens after a row's start as document `id` sees it; `None` where that is zero.
    fn source(&self, row: usize, position: isize, id: i32) -> Option<&[f32]> {
        let [_, l, e, k] = self.dims;
        if self.documents.id(row, position) != id {
            return None;
        }
        match usize::try_from(position) {
            Ok(position) => Some(&self.x[(row * l + position) * e..][..e]),
            Err(_) => self.state.map(|state| &state[(row * (k - 1) + position.wrapping_add_unsigned(k - 1) as usize) * e..][..e]),
        }
    }

    /// Id of a row's last real token, or of the incoming state.
    fn last(&self, row: usize) -> i32 {
        self.documents.id(row, self.documents.len(row) as isize - 1)
    }
}

/// Tokens of a task.
const TOKENS: usize = 16;

/// `y [b, l, e]` and the outgoing state `[b, k - 1, e]`.
pub(crate) fn forward(input: &ConvInput) -> (Vec<f32>, Vec<f32>) {
    let [b, l, e, k] = input.dims;
    let (mut y, mut state) = (vec![0.0; b * l * e], vec![0.0; b * (k - 1) * e]);
    let taps = input.taps();
    let none = vec![0.0; e];
    let bias = input.bias.unwrap_or(&none);
    let arch = Arch::new();
    let blocks = l.div_ceil(TOKENS);
    let shared = Shared::new(&mut y);
    for_each(
        b * blocks,
        b * l * e * (k + 8),
        || (),
        |(), task| {
            let (row, block) = (task / blocks, task % blocks);
            for t in block * TOKENS..input.documents.len(row).min((block + 1) * TOKENS) {
                // SAFETY: each token belongs to one task.
                let y = unsafe { shared.part((row * l + t) * e, e) };
                let id = input.documents.id(row, t as isize);
                let source = |j: usize| input.source(row, (t + j) as isize - (k as isize - 1), id).unwrap_or(&none);
                match k {
                    4 => vectorized!(arch, four_taps(y, bias, &taps, std::array::from_fn(source), input.silu)),
                    _ => vectorized!(arch, any_taps(y, bias, &taps, source, input.silu)),
                }
            }
        },
    );
    for row in 0..b {
        for j in 0..k - 1 {
            let position = (input.documents.len(row) + j) as isize - (k as isize - 1);
            if let Some(source) = input.source(row, position, input.last(row)) {
                state[(row * (k - 1) + j) * e..][..e].copy_from_slice(source);
            }
        }
    }
    (y, state)
}

#[inline(always)]
fn four_taps(y: &mut [f32], bias: &[f32], taps: &[f32], sources: [&[f32]; 4], activate: bool) {
    let e = y.len();
    let (w0, rest) = taps.split_at(e);
    let (w1, rest) = rest.split_at(e);
    let (w2, w3) = rest.split_at(e);
    let [u0, u1, u2, u3] = sources.map(|source| &source[..e]);
    let (bias, w3) = (&bias[..e], &w3[..e]);
    for i in 0..e {
        y[i] = bias[i] + w0[i] * u0[i] + w1[i] * u1[i] + w2[i] * u2[i] + w3[i] * u3[i];
    }
    if activate {
        y.iter_mut().for_each(|y| *y = silu(*y));
    }
}

#[inline(always)]
fn any_taps<'a>(y: &mut [f32], bias: &[f32], taps: &[f32], source: impl Fn(usize) -> &'a [f32], activate: bool) {
    y.copy_from_slice(bias);
    for (j, tap) in taps.chunks_exact(y.len()).enumerate() {
        for ((y, tap), source) in y.iter_mut().zip(tap).zip(source(j)) {
            *y += tap * source;
        }
    }
    if activate {
        y.iter_mut().for_each(|y| *y = silu(*y));
    }
}

/// Gradients, shaped as the arguments; those of absent arguments are to be ignored.
pub(crate) struct Grads {
    pub x: Vec<f32>,
    pub weight: Vec<f32>,
    pub bias: Vec<f32>,
    pub state: Vec<f32>,
}

/// Channels of a task.
const CHANNELS: usize = 128;

/// Gradients from those of `y` and of the outgoing state.
pub(crate) fn backward(input: &ConvInput, dy: Option<&[f32]>, dstate: Option<&[f32]>) -> Grads {
    let [b, l, e, k] = input.dims;
    let (mut dx, mut dpast) = (vec![0.0; b * l * e], vec![0.0; b * (k - 1) * e]);
    // Of each row: gradients of the taps, then of the bias. [b, k + 1, e]
    let mut parts = vec![0.0; b * (k + 1) * e];
    let taps = input.taps();
    let out = Outputs { dx: Shared::new(&mut dx), dpast: Shared::new(&mut dpast), parts: Shared::new(&mut parts) };
    let blocks = e.div_ceil(CHANNELS);
    let arch = Arch::new();
    for_each(
        b * blocks,
        b * l * e * (3 * k + 16),
        || vec![0.0; CHANNELS],
        |slopes, task| {
            let (row, from) = (task / blocks, task % blocks * CHANNELS);
            let channels = Channels { row, from, count: CHANNELS.min(e - from) };
            if let Some(dy) = dy {
                vectorized!(arch, channels.outputs(input, &taps, dy, &out, slopes));
            }
            if let Some(dstate) = dstate {
                channels.state(input, dstate, &out);
            }
        },
    );
    let (mut dw, mut db) = (vec![0.0; e * k], vec![0.0; e]);
    for part in parts.chunks_exact((k + 1) * e) {
        for channel in 0..e {
            (0..k).for_each(|j| dw[channel * k + j] += part[j * e + channel]);
            db[channel] += part[k * e + channel];
        }
    }
    Grads { x: dx, weight: dw, bias: db, state: dpast }
}

struct Outputs<'a> {
    dx: Shared<'a>,
    dpast: Shared<'a>,
    parts: Shared<'a>,
}

/// Some channels of a row: what one task differentiates.
struct Channels {
    row: usize,
    from: usize,
    count: usize,
}

impl Channels {
    /// Where the gradient of the input that [`ConvInput::source`] finds at a position goes; `None` without such input.
    fn target<'a>(&self, input: &ConvInput, position: isize, out: &'a Outputs) -> Option<(&'a Shared<'a>, usize)> {
        let [_, l, e, k] = input.dims;
        match usize::try_from(position) {
            Ok(position) => Some((&out.dx, (self.row * l + position) * e + self.from)),
            Err(_) => {
                let slot = position.wrapping_add_unsigned(k - 1) as usize;
                input.state.map(|_| (&out.dpast, (self.row * (k - 1) + slot) * e + self.from))
            }
        }
    }

    /// What `dy` gives to inputs, taps and bias.
    #[inline(always)]
    fn outputs(&self, input: &ConvInput, taps: &[f32], dy: &[f32], out: &Outputs, slopes: &mut [f32]) {
        let [_, l, e, k] = input.dims;
        let (row, from, count) = (self.row, self.from, self.count);
        let slopes = &mut slopes[..count];
        for t in 0..input.documents.len(row) {
            let id = input.documents.id(row, t as isize);
            let source = |j: usize| {
                let position = (t + j) as isize - (k as isize - 1);
                input.source(row, position, id).map(|source| (position, &source[from..from + count]))
            };
            let dy = &dy[(row * l + t) * e + from..][..count];
            if input.silu {
                match input.bias {
                    Some(bias) => slopes.copy_from_slice(&bias[from..from + count]),
                    None => slopes.fill(0.0),
                }
                for j in 0..k {
                    if let Some((_, source)) = source(j) {
                        let tap = &taps[j * e + from..][..count];
                        slopes.iter_mut().zip(source).zip(tap).for_each(|((sum, u), w)| *sum += u * w);
                    }
                }
                slopes.iter_mut().zip(dy).for_each(|(slope, dy)| *slope = silu_with_slope(*slope).1 * dy);
            } else {
                slopes.copy_from_slice(dy);
            }
            for j in 0..k {
                let Some((position, source)) = source(j) else { continue };
                let tap = &taps[j * e + from..][..count];
                // SAFETY: rows and channels of a task are its own.
                let dw = unsafe { out.parts.part((row * (k + 1) + j) * e + from, count) };
                dw.iter_mut().zip(source).zip(&*slopes).for_each(|((sum, u), slope)| *sum += u * slope);
                if let Some((grads, at)) = self.target(input, position, out) {
                    // SAFETY: as above.
                    let target = unsafe { grads.part(at, count) };
                    target.iter_mut().zip(tap).zip(&*slopes).for_each(|((sum, w), slope)| *sum += w * slope);
                }
            }
            // SAFETY: as above.
            let db = unsafe { out.parts.part((row * (k + 1) + k) * e + from, count) };
            db.iter_mut().zip(&*slopes).for_each(|(sum, slope)| *sum += slope);
        }
    }

    /// What the gradient of the outgoing state gives to the inputs it was copied from.
    fn state(&self, input: &ConvInput, dstate: &[f32], out: &Outputs) {
        let [_, _, e, k] = input.dims;
        for j in 0..k - 1 {
            let position = (input.documents.len(self.row) + j) as isize - (k as isize - 1);
            if input.source(self.row, position, input.last(self.row)).is_none() {
                continue;
            }
            if let Some((grads, at)) = self.target(input, position, out) {
                // SAFETY: rows and channels of a task are its own.
                let target = unsafe { grads.part(at, self.count) };
                let dstate = &dstate[(self.row * (k - 1) + j) * e + self.from..][..self.count];
                target.iter_mut().zip(dstate).for_each(|(sum, d)| *sum += d);
            }
        }
    }
}
