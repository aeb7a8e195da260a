//! Turning stored floats into the model's type, on all cores.

use burn::tensor::{DType, Element, TensorData, bf16, f16};
use rayon::prelude::*;

use super::header::ElementType;

/// Elements per task: large enough that a task outweighs its scheduling.
const CHUNK: usize = 1 << 16;

/// Bytes that are converted between two reports of progress.
const BLOCK: usize = 8 << 20;

/// Little-endian floats of any width as `dtype` (f32, bf16 or f16), rounded to nearest where it is narrower. `None` if
/// `element` is no float or `dtype` is none of those.
///
/// `shape` must have as many elements as `bytes` holds.
pub fn to_dtype(bytes: &[u8], element: ElementType, shape: &[usize], dtype: DType) -> Option<TensorData> {
    to_dtype_in_blocks(bytes, element, shape, dtype, &mut |_| {})
}

/// [`to_dtype`] that tells, after each block, how many bytes it is done with.
pub fn to_dtype_in_blocks(
    bytes: &[u8],
    element: ElementType,
    shape: &[usize],
    dtype: DType,
    done: &mut dyn FnMut(usize),
) -> Option<TensorData> {
    match dtype {
        DType::F32 => from_any(bytes, element, shape, |x| x, |x| x as f32, done),
        DType::BF16 => from_any(bytes, element, shape, bf16::from_f32, bf16::from_f64, done),
        DType::F16 => from_any(bytes, element, shape, f16::from_f32, f16::from_f64, done),
        _ => None,
    }
}

/// Little-endian elements as they are, under Burn's name of their type. Tells, after each block, how many bytes it is done
/// with. The error continues "`key` ...".
pub fn as_stored(bytes: &[u8], element: ElementType, shape: &[usize], done: &mut dyn FnMut(usize)) -> Result<TensorData, String> {
    let shape = shape.to_vec();
    Ok(match element {
        ElementType::F64 => TensorData::new(map(bytes, f64::from_le_bytes, done), shape),
        ElementType::F32 => TensorData::new(map(bytes, f32::from_le_bytes, done), shape),
        ElementType::F16 => TensorData::new(map(bytes, f16::from_le_bytes, done), shape),
        ElementType::BF16 => TensorData::new(map(bytes, bf16::from_le_bytes, done), shape),
        ElementType::I64 => TensorData::new(map(bytes, i64::from_le_bytes, done), shape),
        ElementType::I32 => TensorData::new(map(bytes, i32::from_le_bytes, done), shape),
        ElementType::I16 => TensorData::new(map(bytes, i16::from_le_bytes, done), shape),
        ElementType::I8 => TensorData::new(map(bytes, i8::from_le_bytes, done), shape),
        ElementType::U64 => TensorData::new(map(bytes, u64::from_le_bytes, done), shape),
        ElementType::U32 => TensorData::new(map(bytes, u32::from_le_bytes, done), shape),
        ElementType::U16 => TensorData::new(map(bytes, u16::from_le_bytes, done), shape),
        ElementType::U8 => TensorData::new(map(bytes, u8::from_le_bytes, done), shape),
        ElementType::Bool if bytes.par_iter().any(|&b| b > 1) => {
            return Err("is a tensor of bools and holds bytes other than 0 and 1".into());
        }
        ElementType::Bool => TensorData::new(map(bytes, |[b]: [u8; 1]| b != 0, done), shape),
        ElementType::Other(name, _) => return Err(format!("has the dtype {name}, which cannot be read here")),
    })
}

/// Another float type for a tensor that is here already. Anything but the float types above goes Burn's way.
pub fn cast(data: TensorData, dtype: DType) -> TensorData {
    if data.dtype == dtype {
        return data;
    }
    let shape = data.shape.to_vec();
    let element = ElementType::of(data.dtype).filter(|e| e.is_float());
    match element.and_then(|element| to_dtype(data.as_bytes(), element, &shape, dtype)) {
        Some(converted) => converted,
        None => data.convert_dtype(dtype),
    }
}

fn from_any<T: Element>(
    bytes: &[u8],
    element: ElementType,
    shape: &[usize],
    narrow: impl Fn(f32) -> T + Sync,
    narrow64: impl Fn(f64) -> T + Sync,
    done: &mut dyn FnMut(usize),
) -> Option<TensorData> {
    let values = match element {
        ElementType::F32 => map(bytes, |b| narrow(f32::from_le_bytes(b)), done),
        ElementType::F64 => map(bytes, |b| narrow64(f64::from_le_bytes(b)), done),
        ElementType::F16 => map(bytes, |b| narrow(f16::from_le_bytes(b).to_f32()), done),
        ElementType::BF16 => map(bytes, |b| narrow(bf16::from_le_bytes(b).to_f32()), done),
        _ => return None,
    };
    (values.len() == shape.iter().product::<usize>()).then(|| TensorData::new(values, shape.to_vec()))
}

fn map<const W: usize, T: Element>(bytes: &[u8], convert: impl Fn([u8; W]) -> T + Sync, done: &mut dyn FnMut(usize)) -> Vec<T> {
    let mut values = vec![T::default(); bytes.len() / W];
    let mut read = 0;
    for (out, input) in values.chunks_mut(BLOCK / W).zip(bytes.chunks(BLOCK)) {
        out.par_chunks_mut(CHUNK).zip(input.par_chunks(CHUNK * W)).for_each(|(out, input)| {
            for (value, raw) in out.iter_mut().zip(input.as_chunks::<W>().0) {
                *value = convert(*raw);
            }
        });
        read += input.len();
        done(read);
    }
    values
}
