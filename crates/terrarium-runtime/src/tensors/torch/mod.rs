//! Files of `torch.save`: a zip archive with a pickle, `data.pkl`, and one member per storage.
//!
//! Nothing is run: the pickle is read as data ([`crate::pickle`]) and a tensor is where its `_rebuild_tensor` record
//! points. Two keys may share a storage (tied weights), and a view may be transposed.

mod args;
mod rebuild;
#[cfg(test)]
mod tests;
mod zip;

use std::collections::HashSet;
use std::path::Path;

use memmap2::Mmap;

use super::header::{Entry, Header};
use crate::Result;
use crate::error::{CheckpointError, TorchError};
use crate::pickle::{Id, Node, Pickle, parse};

pub(super) use args::megatron_parts;
use rebuild::View;
use zip::Directory;

/// The pickle of the largest checkpoints has a few megabytes.
const MAX_PICKLE: usize = 512 << 20;

/// An archive whose pickle was read.
pub(crate) struct Archive<'a> {
    path: &'a Path,
    directory: Directory,
    /// The folder that all members are in, with its slash.
    folder: String,
    /// What was saved.
    pub pickle: Pickle<'a>,
}

/// What kind of file starts so, if it is of PyTorch but no archive: what it is, and what to do.
pub(super) fn other_format(head: &[u8]) -> Option<(&'static str, &'static str)> {
    const RESAVE: &str = "open it in Python and save it again with torch.save(state_dict, file), or as safetensors";
    if head.starts_with(b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19") {
        return Some(("a file of torch.save before PyTorch 1.6 (no zip archive)", RESAVE));
    }
    if head.len() >= 2 && head[0] == 0x80 && head[1] <= 5 {
        return Some(("a plain pickle, not an archive of torch.save", RESAVE));
    }
    if head.starts_with(b"GGUF") {
        return Some(("a GGUF file", "take the model's safetensors or PyTorch files"));
    }
    if head.starts_with(b"version https://git-lfs") {
        return Some(("a git-lfs pointer, not the file itself (is it a safetensors file?)", "fetch the file with `git lfs pull`"));
    }
    None
}

impl<'a> Archive<'a> {
    /// Reads directory and pickle; no tensor's data is touched.
    pub fn open(path: &'a Path, map: &'a Mmap) -> Result<Self> {
        let container = |problem: String| torch(TorchError::Container { file: path.to_path_buf(), problem });
        let directory = Directory::read(map).map_err(container)?;
        let folder = folder(&directory).map_err(container)?;
        if directory.names().any(|name| name.strip_prefix(&folder).is_some_and(|n| n.starts_with("code/") || n == "constants.pkl")) {
            let advice = "it holds a program: load it with torch.jit.load and save its state_dict() with torch.save";
            return Err(torch(TorchError::Format { file: path.to_path_buf(), found: "a TorchScript archive", advice }));
        }
        if let Some(problem) = directory.compressed.clone() {
            return Err(container(problem));
        }
        if let Some(order) = directory.get(&format!("{folder}byteorder"))
            && &map[order.clone()] != b"little"
        {
            return Err(container("its byteorder is not `little`: save it again on a little-endian machine".into()));
        }
        let member = format!("{folder}data.pkl");
        let range = directory.get(&member).unwrap_or(0..0);
        if range.len() > MAX_PICKLE {
            return Err(container(format!("{member} has {} bytes, more than {MAX_PICKLE}: refused", range.len())));
        }
        let pickle = parse(&map[range]).map_err(|source| torch(TorchError::Pickle { file: path.to_path_buf(), member, source }))?;
        Ok(Self { path, directory, folder, pickle })
    }

    /// The tensors of a dictionary. What is no tensor is stepped over if it holds no weights and is an error otherwise.
    pub fn tensors(&self, dict: Id) -> Result<Header> {
        let Some(pairs) = self.pickle.pairs(dict) else {
            let problem = format!("it holds {} where a dict of tensors is expected", self.pickle.describe(dict));
            return Err(torch(TorchError::Container { file: self.path.to_path_buf(), problem }));
        };
        // Not sized by the pairs, which may be one key over and over.
        let (mut header, mut seen) = (Header::default(), HashSet::new());
        for (key, value) in pairs {
            let Some(key) = self.pickle.str(key) else {
                let problem = format!("a key of its dict is {}", self.pickle.describe(key));
                return Err(torch(TorchError::Container { file: self.path.to_path_buf(), problem }));
            };
            if !seen.insert(key) {
                return Err(self.entry_error(key, "is there twice".into()));
            }
            let entry = match rebuild::view(&self.pickle, value) {
                Ok(Some(view)) => self.place(key, view),
                Ok(None) if self.is_extra(value) => continue,
                Ok(None) => Err(self.not_a_tensor(value)),
                Err(problem) => Err(problem),
            };
            let entry = entry.map_err(|problem| self.entry_error(key, problem))?;
            header.data_bytes = header.data_bytes.saturating_add(entry.bytes());
            header.entries.push(entry);
        }
        Ok(header)
    }

    /// An error about one key.
    pub fn entry_error(&self, key: &str, problem: String) -> crate::Error {
        torch(TorchError::Entry { file: self.path.to_path_buf(), key: key.to_string(), problem })
    }

    /// None, bytes and in-memory files: extra states that layers keep beside their weights.
    fn is_extra(&self, value: Id) -> bool {
        match self.pickle.get(value) {
            Node::None | Node::Bytes => true,
            _ => matches!(self.pickle.object(value), Some(("_io" | "io", "BytesIO", _) | ("_codecs", "encode", _))),
        }
    }

    fn not_a_tensor(&self, value: Id) -> String {
        let what = self.pickle.describe(value);
        let tensors =
            self.pickle.pairs(value).is_some_and(|p| p.iter().any(|&(_, v)| matches!(rebuild::view(&self.pickle, v), Ok(Some(_)))));
        let advice = if tensors { ": this is a training checkpoint; save that dict alone with torch.save" } else { "" };
        format!("is {what}, not a tensor{advice}")
    }

    /// A view, checked against the member that holds its storage.
    fn place(&self, key: &str, view: View) -> Result<Entry, String> {
        let View { storage, storage_bytes, element, offset, shape, strides } = view;
        let member = format!("{}data/{storage}", self.folder);
        let range = self.directory.get(&member).ok_or_else(|| format!("refers to `{}`, which is not there", member.escape_default()))?;
        if range.len() as u64 != storage_bytes {
            return Err(format!("claims {storage_bytes} bytes in `{member}`, which has {}", range.len()));
        }
        let width = element.bits() / 8;
        let available = range.len() as u64 / width;
        let absurd = || format!("has the absurd shape {shape:?} (strides {strides:?}): its storage has {available} elements");
        let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64)).filter(|&n| n <= available).ok_or_else(absurd)?;
        // The last element, counted from the first.
        let reach = |sum: u64, (&d, &s): (&usize, &usize)| (d as u64 - 1).checked_mul(s as u64)?.checked_add(sum);
        let span = match elements {
            0 => 0,
            _ => shape.iter().zip(&strides).try_fold(0u64, reach).and_then(|last| last.checked_add(1)).ok_or_else(absurd)?,
        };
        if offset.checked_add(span).is_none_or(|to| to > available) {
            return Err(format!("{shape:?} with strides {strides:?} from {offset} leaves its storage of {available} elements"));
        }
        let begin = range.start as u64 + offset * width;
        let strides = (!is_contiguous(&shape, &strides)).then_some(strides);
        Ok(Entry { key: key.to_string(), element, shape, begin, end: begin + span * width, strides })
    }
}

fn torch(error: TorchError) -> crate::Error {
    CheckpointError::from(error).into()
}

/// The one folder that holds data.pkl.
fn folder(directory: &Directory) -> Result<String, String> {
    let mut folders: Vec<_> = directory.names().filter_map(|name| name.strip_suffix("data.pkl")).filter(|f| f.ends_with('/')).collect();
    folders.sort_unstable();
    match folders[..] {
        [folder] => Ok(folder.to_string()),
        [] => Err("it holds no data.pkl: this zip archive was not written by torch.save".into()),
        [a, b, ..] => Err(format!("both `{a}data.pkl` and `{b}data.pkl` are there: refused")),
    }
}

/// Whether elements follow one another in row-major order. Strides of dimensions of one element say nothing.
fn is_contiguous(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1usize;
    let dense = shape.iter().zip(strides).rev().all(|(&d, &s)| {
        let fits = d == 1 || s == expected;
        expected = expected.saturating_mul(d);
        fits
    });
    dense || shape.contains(&0)
}
