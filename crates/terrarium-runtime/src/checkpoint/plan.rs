//! What a saved checkpoint holds, and where each tensor comes from.

use std::collections::HashMap;

use burn::tensor::{DType, TensorData};
use terrarium_kernels::KernelBackend;
use terrarium_models::decoder::Reader;
use terrarium_models::{Decoder, DecoderConfig, WeightEntry};

use super::Checkpoint;
use crate::Result;
use crate::error::AdapterError;
use crate::tensors::{TensorSpec, cast};

/// Parameters by path.
pub(super) trait Parameters {
    /// The element type of a parameter and its number of elements; `None` if there is no such parameter.
    fn describe(&self, path: &str) -> Option<(DType, usize)>;

    /// All paths.
    fn paths(&self) -> Vec<String>;

    /// The parameter as `dtype`.
    fn read(&mut self, path: &str, dtype: DType) -> Result<TensorData>;
}

/// The parameters of a model; each leaves its device when it is read.
pub(super) struct FromModel(HashMap<String, Reader>);

impl FromModel {
    pub(super) fn new<B: KernelBackend>(model: &Decoder<B>) -> Self {
        Self(model.readers().into_iter().map(|reader| (reader.path.clone(), reader)).collect())
    }
}

impl Parameters for FromModel {
    fn describe(&self, path: &str) -> Option<(DType, usize)> {
        self.0.get(path).map(|reader| (reader.dtype, reader.elements))
    }

    fn paths(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    fn read(&mut self, path: &str, dtype: DType) -> Result<TensorData> {
        let reader = self.0.get(path).ok_or_else(|| AdapterError::Model(format!("the model has no {path}")))?;
        Ok(cast(reader.read(), dtype))
    }
}

/// The parameters of a checkpoint, read from its files.
pub(super) struct FromCheckpoint<'a> {
    checkpoint: &'a Checkpoint,
    entries: HashMap<String, WeightEntry>,
}

impl<'a> FromCheckpoint<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint) -> Self {
        let entries = checkpoint.config.table().entries.into_iter().map(|entry| (entry.path.clone(), entry)).collect();
        Self { checkpoint, entries }
    }
}

impl Parameters for FromCheckpoint<'_> {
    fn describe(&self, path: &str) -> Option<(DType, usize)> {
        let entry = self.entries.get(path)?;
        let stored = entry.keys().find_map(|key| self.checkpoint.find(key))?;
        let dtype = match stored.element().dtype()? {
            DType::F64 => DType::F32,
            dtype => dtype,
        };
        Some((dtype, entry.len()))
    }

    fn paths(&self) -> Vec<String> {
        self.entries.keys().cloned().collect()
    }

    fn read(&mut self, path: &str, dtype: DType) -> Result<TensorData> {
        let read = self.entries.get(path).map(|entry| self.checkpoint.parameter(entry, dtype)).transpose()?.flatten();
        read.ok_or_else(|| AdapterError::Model(format!("the checkpoint has no {path}")).into())
    }
}

/// The tensors of a checkpoint in the making, in the order of the model.
pub(super) struct Plan {
    tensors: Vec<Planned>,
}

struct Planned {
    spec: TensorSpec,
    /// Parameters that are its rows; one without rows is all of it.
    from: Vec<WeightEntry>,
}

impl Plan {
    /// Compares the parameters of `source` with those that `config` asks for. Types are those of the parameters unless
    /// `dtype` is given.
    pub(super) fn new(config: &DecoderConfig, source: &dyn Parameters, dtype: Option<DType>) -> Result<Self> {
        let table = config.table();
        let mut left = source.paths();
        let mut tensors: Vec<Planned> = Vec::new();
        let mut at: HashMap<String, usize> = HashMap::new();
        for entry in table.entries.into_iter().chain(table.copies) {
            let Some((found, _)) = source.describe(&entry.path).filter(|(_, elements)| *elements == entry.len()) else {
                let (path, shape) = (&entry.path, &entry.shape);
                let problem = format!("the model has no {path} of shape {shape:?}: it is not the one its configuration describes");
                return Err(AdapterError::Model(problem).into());
            };
            left.retain(|path| *path != entry.path);
            let next = tensors.len();
            let index = *at.entry(entry.key.clone()).or_insert(next);
            if index == next {
                let spec = TensorSpec { key: entry.key.clone(), dtype: dtype.unwrap_or(found), shape: entry.shape.clone() };
                tensors.push(Planned { spec, from: vec![] });
            }
            tensors[index].from.push(entry);
        }
        match left.iter().min() {
            None => Ok(Self { tensors }),
            Some(path) => Err(AdapterError::Model(format!("the model's {path} has no place in a checkpoint of its configuration")).into()),
        }
    }

    pub(super) fn specs(&self) -> impl Iterator<Item = &TensorSpec> {
        self.tensors.iter().map(|tensor| &tensor.spec)
    }

    /// The type that most bytes have.
    pub(super) fn dtype(&self) -> DType {
        let mut bytes: Vec<(DType, u64)> = Vec::new();
        for spec in self.specs() {
            match bytes.iter_mut().find(|(dtype, _)| *dtype == spec.dtype) {
                Some((_, size)) => *size += spec.bytes(),
                None => bytes.push((spec.dtype, spec.bytes())),
            }
        }
        bytes.into_iter().max_by_key(|&(_, size)| size).map_or(DType::F32, |(dtype, _)| dtype)
    }

    /// How many tensors each file of at most `limit` bytes takes (a larger tensor has one for itself).
    pub(super) fn shards(&self, limit: u64) -> Vec<usize> {
        let mut shards = vec![0];
        let mut filled = 0;
        for spec in self.specs() {
            if filled > 0 && filled + spec.bytes() > limit {
                shards.push(0);
                filled = 0;
            }
            filled += spec.bytes();
            *shards.last_mut().expect("there is always one") += 1;
        }
        shards
    }

    /// Tensor `i`, put together.
    pub(super) fn make(&self, i: usize, source: &mut dyn Parameters) -> Result<TensorData> {
        let Planned { spec, from } = &self.tensors[i];
        if let [entry] = from.as_slice()
            && entry.rows.is_none()
        {
            let data = source.read(&entry.path, spec.dtype)?;
            return Ok(TensorData { shape: spec.shape.clone().into(), ..data });
        }
        let mut bytes = vec![0u8; spec.bytes() as usize];
        let width = bytes.len() / spec.shape[0].max(1);
        let mut filled = 0;
        for entry in from {
            let Some(rows) = entry.rows else { continue };
            let data = source.read(&entry.path, spec.dtype)?;
            let run = rows.len * width;
            for (start, piece) in rows.starts().zip(data.as_bytes().chunks_exact(run)) {
                bytes[start * width..start * width + run].copy_from_slice(piece);
            }
            filled += rows.rows();
        }
        if filled != spec.shape[0] {
            let problem = format!("{}: its parameters fill {filled} of {} rows", spec.key, spec.shape[0]);
            return Err(AdapterError::Model(problem).into());
        }
        Ok(TensorData::from_bytes_vec(bytes, spec.shape.clone(), spec.dtype))
    }
}
