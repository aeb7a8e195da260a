//! One tensor of a checkpoint, wherever its bytes are.

use std::borrow::Cow;
use std::path::Path;

use burn::tensor::{DType, TensorData};

use super::megatron::Merged;
use crate::Result;
use crate::tensors::{ElementType, Entry, MappedFile};

/// A tensor that was found under its key: in one file, or in those of several ranks.
pub(crate) struct Stored<'a> {
    place: Place<'a>,
}

enum Place<'a> {
    One(&'a MappedFile, &'a Entry),
    Merged(Merged<'a>),
}

impl<'a> Stored<'a> {
    pub(super) fn one(file: &'a MappedFile, entry: &'a Entry) -> Self {
        Self { place: Place::One(file, entry) }
    }

    pub(super) fn merged(merged: Merged<'a>) -> Self {
        Self { place: Place::Merged(merged) }
    }

    /// Its element type.
    pub(crate) fn element(&self) -> ElementType {
        match &self.place {
            Place::One(_, entry) => entry.element,
            Place::Merged(merged) => merged.element(),
        }
    }

    /// Its shape, merged.
    pub(crate) fn shape(&self) -> &[usize] {
        match &self.place {
            Place::One(_, entry) => &entry.shape,
            Place::Merged(merged) => merged.shape(),
        }
    }

    /// Its file, or that of its first rank.
    pub(crate) fn file(&self) -> &Path {
        match &self.place {
            Place::One(file, _) => file.path(),
            Place::Merged(merged) => merged.file(),
        }
    }

    /// Bytes of its elements.
    pub(crate) fn bytes(&self) -> u64 {
        (self.shape().iter().product::<usize>() as u64).saturating_mul(self.element().bits()) / 8
    }

    /// Its values as floats of type `dtype`, with the shape in the file. Pages of the file leave the memory as they are read.
    ///
    /// `parts` are the rows of each component of a tensor that tensor-parallel ranks divide component by component
    /// (`[z, x, B, C, dt]` of a Mamba-2 input projection, `[gate, up]` of a gated MLP); other tensors take no notice of it.
    pub(crate) fn data(&self, dtype: DType, parts: Option<&[usize]>) -> Result<TensorData> {
        match &self.place {
            Place::One(file, entry) => file.read(entry, dtype),
            Place::Merged(merged) => merged.data(dtype, parts),
        }
    }

    /// Its bytes as stored, little endian, row by row; see [`Stored::data`].
    pub(crate) fn raw(&self, parts: Option<&[usize]>) -> Result<Cow<'a, [u8]>> {
        match &self.place {
            Place::One(file, entry) => Ok(file.bytes(entry)),
            Place::Merged(merged) => merged.raw(parts),
        }
    }

    /// Lets the file's pages leave the memory; whoever reads them again finds them on the disk.
    pub(crate) fn release(&self) {
        match &self.place {
            Place::One(file, entry) => file.release(entry, (entry.end - entry.begin) as usize),
            Place::Merged(merged) => merged.release(),
        }
    }

    /// The tensor as stored.
    pub(crate) fn tensor(&self) -> Result<TensorData> {
        match &self.place {
            Place::One(file, entry) => file.tensor(entry),
            Place::Merged(merged) => merged.tensor(),
        }
    }
}
