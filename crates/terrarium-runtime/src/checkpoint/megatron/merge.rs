//! Putting the shards of tensor-parallel ranks together.

use std::borrow::Cow;
use std::path::Path;

use burn::tensor::{DType, TensorData};

use crate::Result;
use crate::error::{CheckpointError, MegatronError};
use crate::tensors::{ElementType, Entry, MappedFile, as_stored, to_dtype};

/// How the ranks divide a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rule {
    /// All ranks hold the same.
    Same,
    /// Rank after rank along the first dimension; given `parts`, component by component (a gated MLP).
    Rows,
    /// Rank after rank along the second dimension.
    Columns,
    /// Along the first dimension, each component by itself.
    Components,
}

/// Ends of keys and their rules; the first that fits holds. Megatron-Core names its layers so in every version, and
/// newer ones write `conv1d_weight` for `conv1d.weight`.
const RULES: [(&str, Rule); 31] = [
    ("word_embeddings.weight", Rule::Rows),
    ("output_layer.weight", Rule::Rows),
    ("output_layer.bias", Rule::Rows),
    ("position_embeddings.weight", Rule::Same),
    (".in_proj.weight", Rule::Components),
    (".in_proj.bias", Rule::Components),
    (".conv1d.weight", Rule::Components),
    (".conv1d.bias", Rule::Components),
    (".conv1d_weight", Rule::Components),
    (".conv1d_bias", Rule::Components),
    (".A_log", Rule::Rows),
    (".D", Rule::Rows),
    (".dt_bias", Rule::Rows),
    ("mixer.norm.weight", Rule::Rows),
    (".out_proj.weight", Rule::Columns),
    (".out_proj.bias", Rule::Same),
    (".linear_fc1.weight", Rule::Rows),
    (".linear_fc1.bias", Rule::Rows),
    (".linear_fc2.weight", Rule::Columns),
    (".linear_fc2.bias", Rule::Same),
    (".linear_qkv.weight", Rule::Rows),
    (".linear_qkv.bias", Rule::Rows),
    (".linear_proj.weight", Rule::Columns),
    (".linear_proj.bias", Rule::Same),
    ("layer_norm_weight", Rule::Same),
    ("layer_norm_bias", Rule::Same),
    ("layernorm.weight", Rule::Same),
    ("layernorm.bias", Rule::Same),
    ("norm.weight", Rule::Same),
    ("norm.bias", Rule::Same),
    ("rotary_pos_emb.inv_freq", Rule::Same),
];

impl Rule {
    /// The rule of a key; `None` for tensors whose division is not known.
    pub fn of(key: &str) -> Option<Self> {
        RULES.iter().find(|(end, _)| key.ends_with(end)).map(|(_, rule)| *rule)
    }
}

/// The shape of `tp` shards put together; `None` if the shards cannot be divided so.
pub(super) fn merged_shape(shard: &[usize], rule: Rule, tp: usize) -> Option<Vec<usize>> {
    let mut shape = shard.to_vec();
    let dim = match rule {
        Rule::Same => return Some(shape),
        Rule::Rows | Rule::Components => 0,
        Rule::Columns => 1,
    };
    let size = shape.get_mut(dim)?;
    *size = size.checked_mul(tp)?;
    shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
    Some(shape)
}

/// A tensor in the files of one pipeline stage.
pub(crate) struct Merged<'a> {
    /// The shard of each rank.
    pub(super) shards: Vec<(&'a MappedFile, &'a Entry)>,
    pub(super) rule: Rule,
    /// The shape of the whole.
    pub(super) shape: &'a [usize],
}

impl<'a> Merged<'a> {
    pub(crate) fn element(&self) -> ElementType {
        self.shards[0].1.element
    }

    pub(crate) fn shape(&self) -> &[usize] {
        self.shape
    }

    pub(crate) fn file(&self) -> &'a Path {
        self.shards[0].0.path()
    }

    /// See `Stored::data`.
    pub(crate) fn data(&self, dtype: DType, parts: Option<&[usize]>) -> Result<TensorData> {
        if let [(file, entry)] = self.shards[..] {
            return file.read(entry, dtype);
        }
        let bytes = self.raw(parts)?;
        let data = to_dtype(&bytes, self.element(), self.shape, dtype);
        data.ok_or_else(|| self.error(0, format!("is {} {:?}, which cannot be read as {dtype:?}", self.element().name(), self.shape)))
    }

    /// The tensor as stored. Tensors of components are not divided further here: ranks follow one another.
    pub(crate) fn tensor(&self) -> Result<TensorData> {
        if let [(file, entry)] = self.shards[..] {
            return file.tensor(entry);
        }
        let bytes = self.raw(None)?;
        as_stored(&bytes, self.element(), self.shape, &mut |_| {}).map_err(|problem| self.error(0, problem))
    }

    /// See `Stored::raw`.
    pub(crate) fn raw(&self, parts: Option<&[usize]>) -> Result<Cow<'a, [u8]>> {
        let (file, entry) = self.shards[0];
        if self.shards.len() == 1 {
            return Ok(file.bytes(entry));
        }
        match (self.rule, parts) {
            (Rule::Same, _) => self.same(),
            (Rule::Rows, None) => {
                let rows = self.shape[0];
                self.interleave(&[rows]).map(Cow::Owned)
            }
            (Rule::Rows | Rule::Components, Some(parts)) => self.interleave(parts).map(Cow::Owned),
            (Rule::Components, None) => {
                let problem = "is divided component by component, and the sizes of its components are not known here";
                Err(self.error(0, problem.into()))
            }
            (Rule::Columns, _) => Ok(Cow::Owned(self.columns())),
        }
    }

    fn same(&self) -> Result<Cow<'a, [u8]>> {
        let (file, entry) = self.shards[0];
        let first = file.bytes(entry);
        for (rank, (file, entry)) in self.shards.iter().enumerate().skip(1) {
            let equal = file.bytes(entry) == first;
            file.release(entry, usize::MAX);
            if !equal {
                return Err(self.error(rank, "differs from that of rank 0, and all ranks should hold the same".into()));
            }
        }
        Ok(first)
    }

    /// All ranks' share of the first component, then of the second and so on; `parts` are rows of the whole.
    fn interleave(&self, parts: &[usize]) -> Result<Vec<u8>> {
        let (tp, rows) = (self.shards.len(), self.shape[0]);
        let sum = parts.iter().try_fold(0usize, |sum, &part| sum.checked_add(part));
        if sum != Some(rows) || parts.iter().any(|part| part % tp != 0) {
            return Err(self.error(0, format!("has {rows} rows over {tp} ranks, which are not the components {parts:?} divided evenly")));
        }
        let shards: Vec<_> = self.shards.iter().map(|(file, entry)| file.bytes(entry)).collect();
        let row = (shards[0].len() * tp).checked_div(rows).unwrap_or(0);
        let mut out = Vec::with_capacity(rows * row);
        let mut from = 0;
        for part in parts {
            let to = from + part / tp * row;
            shards.iter().for_each(|shard| out.extend_from_slice(&shard[from..to]));
            from = to;
        }
        self.release();
        Ok(out)
    }

    /// Row by row, the ranks' columns side by side.
    fn columns(&self) -> Vec<u8> {
        let shards: Vec<_> = self.shards.iter().map(|(file, entry)| file.bytes(entry)).collect();
        let rows = self.shape[0].max(1);
        let width = shards[0].len() / rows;
        let mut out = Vec::with_capacity(shards.iter().map(|shard| shard.len()).sum());
        for row in 0..rows {
            shards.iter().for_each(|shard| out.extend_from_slice(&shard[row * width..(row + 1) * width]));
        }
        self.release();
        out
    }

    pub(crate) fn release(&self) {
        self.shards.iter().for_each(|(file, entry)| file.release(entry, usize::MAX));
    }

    fn error(&self, rank: usize, problem: String) -> crate::Error {
        let (file, entry) = self.shards[rank];
        let error = MegatronError::Key { file: file.path().to_path_buf(), key: entry.key.clone(), problem };
        CheckpointError::from(error).into()
    }
}
