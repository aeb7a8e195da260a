//! Megatron's `torch` checkpoints: `release/` or `iter_NNNNNNN/` with a folder for each rank.
//!
//! The files of all ranks are opened and compared; a tensor is merged when it is read. Keys are those of the whole model:
//! layers are counted on over pipeline stages.

mod layout;
mod merge;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use serde_json::{Map, Value};

pub(crate) use merge::Merged;

use super::Stored;
use crate::Result;
use crate::error::{CheckpointError, MegatronError};
use crate::tensors::{Entry, MappedFile};
use layout::{iteration, layout_error, rank_files};
use merge::{Rule, merged_shape};

/// A Megatron checkpoint whose ranks were opened and agree.
pub(crate) struct MegatronFolder {
    /// The plain values among the arguments of the run, from the first rank.
    pub(crate) args: Map<String, Value>,
    /// Files by pipeline stage and tensor-parallel rank.
    stages: Vec<Vec<MappedFile>>,
    tensors: Vec<Tensor>,
    place: HashMap<String, usize>,
}

/// One tensor of the whole model.
struct Tensor {
    key: String,
    stage: usize,
    /// Its entry in the file of each rank.
    entries: Vec<usize>,
    rule: Rule,
    shape: Vec<usize>,
}

/// Whether a directory is a Megatron folder, or that of one of its iterations.
pub(crate) fn is_megatron(dir: &Path) -> bool {
    !matches!(iteration(dir), Ok(None))
}

/// Opens a Megatron folder, or that of one of its iterations; `None` if it is neither.
pub(crate) fn open_megatron(dir: &Path) -> Result<Option<MegatronFolder>> {
    let Some(folder) = iteration(dir)? else { return Ok(None) };
    let mut args = None;
    let mut stages = Vec::new();
    for files in rank_files(&folder)? {
        let mut ranks = Vec::with_capacity(files.len());
        for path in files {
            let (file, of_rank) = MappedFile::open_megatron(&path)?;
            args.get_or_insert(of_rank);
            ranks.push(file);
        }
        stages.push(ranks);
    }
    let mut whole = MegatronFolder { args: args.unwrap_or_default(), stages, tensors: Vec::new(), place: HashMap::new() };
    whole.check_sizes(&folder)?;
    let mut first_layer = 0;
    for stage in 0..whole.stages.len() {
        first_layer += whole.add_stage(stage, first_layer)?;
    }
    Ok(Some(whole))
}

impl MegatronFolder {
    /// The tensor of a key.
    pub(crate) fn find(&self, key: &str) -> Option<Stored<'_>> {
        self.place.get(key).map(|&i| self.stored(&self.tensors[i]))
    }

    /// Every key with its tensor, stage by stage.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&str, Stored<'_>)> {
        self.tensors.iter().map(|tensor| (tensor.key.as_str(), self.stored(tensor)))
    }

    fn stored<'a>(&'a self, tensor: &'a Tensor) -> Stored<'a> {
        let files = self.stages[tensor.stage].iter().zip(&tensor.entries);
        let shards = files.map(|(file, &entry)| (file, &file.header.entries[entry])).collect();
        Stored::merged(Merged { shards, rule: tensor.rule, shape: &tensor.shape })
    }

    /// Compares the number of rank folders with that of the run.
    fn check_sizes(&self, folder: &Path) -> Result<()> {
        let found = [self.stages[0].len(), self.stages.len()];
        for (name, found) in ["tensor_model_parallel_size", "pipeline_model_parallel_size"].into_iter().zip(found) {
            let expected = self.args.get(name).and_then(Value::as_u64).unwrap_or(found as u64);
            if expected != found as u64 {
                let problem = format!("the run had a {name} of {expected}, the rank folders here make {found}: some are missing");
                return Err(layout_error(folder, problem));
            }
        }
        // A group of B and C (or of keys and values) that several ranks share is stored by each of them.
        let tp = found[0] as u64;
        let grouped = self.args.get("group_query_attention").and_then(Value::as_bool) == Some(true);
        let groups = [("mamba_num_groups", true), ("num_query_groups", grouped)];
        for (name, _) in groups.into_iter().filter(|(_, used)| *used) {
            if let Some(groups) = self.args.get(name).and_then(Value::as_u64).filter(|groups| groups % tp != 0) {
                let problem =
                    format!("{name} is {groups}, which {tp} tensor-parallel ranks do not divide evenly: merge it with Megatron first");
                return Err(layout_error(folder, problem));
            }
        }
        Ok(())
    }

    /// Adds the tensors of a stage and returns how many layers it has.
    fn add_stage(&mut self, stage: usize, first_layer: usize) -> Result<usize> {
        let ranks = &self.stages[stage];
        let mut layers = BTreeSet::new();
        let mut new = Vec::new();
        let places: Vec<HashMap<&str, usize>> = ranks.iter().map(|file| by_key(file)).collect();
        for (rank, file) in ranks.iter().enumerate().skip(1) {
            if let Some(extra) = file.header.entries.iter().find(|e| !places[0].contains_key(e.key.as_str())) {
                return Err(key_error(&ranks[rank], &extra.key, format!("is not in {}", ranks[0].path().display())));
            }
        }
        for entry in &ranks[0].header.entries {
            let entries = same_everywhere(ranks, &places, entry)?;
            let rule = rule(entry, ranks.len()).map_err(|problem| key_error(&ranks[0], &entry.key, problem))?;
            let shape = merged_shape(&entry.shape, rule, ranks.len())
                .ok_or_else(|| key_error(&ranks[0], &entry.key, format!("{:?} cannot be a shard of {} ranks", entry.shape, ranks.len())))?;
            let (key, layer) = shift(&entry.key, first_layer).map_err(|problem| key_error(&ranks[0], &entry.key, problem))?;
            layers.extend(layer);
            new.push(Tensor { key, stage, entries, rule, shape });
        }
        let count = layers.len();
        if layers.last().is_some_and(|&last| last + 1 != count) {
            let missing = (0..).find(|i| !layers.contains(i)).unwrap_or(0);
            return Err(key_error(&ranks[0], &format!("decoder.layers.{missing}"), "is missing, and later layers are there".into()));
        }
        for tensor in new {
            self.add(tensor)?;
        }
        Ok(count)
    }

    /// Adds a tensor; a copy of one that an earlier stage holds (tied embeddings) has to be one.
    fn add(&mut self, tensor: Tensor) -> Result<()> {
        if let Some(&earlier) = self.place.get(&tensor.key) {
            let (copy, first) = (self.stored(&tensor), self.stored(&self.tensors[earlier]));
            let same = copy.element() == first.element() && copy.shape() == first.shape() && copy.raw(None)? == first.raw(None)?;
            if same {
                return Ok(());
            }
            let file = &self.stages[tensor.stage][0];
            return Err(key_error(file, &tensor.key, format!("differs from that in {}", first.file().display())));
        }
        self.place.insert(tensor.key.clone(), self.tensors.len());
        self.tensors.push(tensor);
        Ok(())
    }
}

fn by_key(file: &MappedFile) -> HashMap<&str, usize> {
    file.header.entries.iter().enumerate().map(|(i, entry)| (entry.key.as_str(), i)).collect()
}

fn key_error(file: &MappedFile, key: &str, problem: String) -> crate::Error {
    let error = MegatronError::Key { file: file.path().to_path_buf(), key: key.to_string(), problem };
    CheckpointError::from(error).into()
}

/// The entry of each rank, all of one type and shape.
fn same_everywhere(ranks: &[MappedFile], places: &[HashMap<&str, usize>], entry: &Entry) -> Result<Vec<usize>> {
    let mut entries = Vec::with_capacity(ranks.len());
    for (file, place) in ranks.iter().zip(places) {
        let Some(&at) = place.get(entry.key.as_str()) else {
            return Err(key_error(file, &entry.key, format!("is missing, {} has it", ranks[0].path().display())));
        };
        let there = &file.header.entries[at];
        if there.element != entry.element || there.shape != entry.shape {
            let problem = format!(
                "is {} {:?}, in {} it is {} {:?}",
                there.element.name(),
                there.shape,
                ranks[0].path().display(),
                entry.element.name(),
                entry.shape
            );
            return Err(key_error(file, &entry.key, problem));
        }
        entries.push(at);
    }
    Ok(entries)
}

/// The rule of a tensor; with one rank there is nothing to merge.
fn rule(entry: &Entry, tp: usize) -> Result<Rule, String> {
    let split = [".z", ".x", ".B", ".C", ".dt"].iter().filter_map(|part| entry.key.strip_suffix(part));
    let of_mixer = |key: &str| key.contains("in_proj") || key.contains("conv1d");
    if split.into_iter().any(of_mixer) {
        return Err(
            "is one component of a tensor, which only the torch_dist format has: convert it with Megatron's --ckpt-convert-format torch"
                .into(),
        );
    }
    match Rule::of(&entry.key) {
        Some(rule) => Ok(if tp == 1 { Rule::Same } else { rule }),
        None if tp == 1 => Ok(Rule::Same),
        None => Err(format!("is divided over {tp} ranks in a way that is not known here: merge the ranks with Megatron first")),
    }
}

/// The key of the whole model, and the number of the layer within the stage.
fn shift(key: &str, first_layer: usize) -> Result<(String, Option<usize>), String> {
    const LAYERS: &str = "decoder.layers.";
    let Some((number, rest)) = key.strip_prefix(LAYERS).and_then(|key| key.split_once('.')) else { return Ok((key.to_string(), None)) };
    let layer =
        number.parse::<u32>().map_err(|_| format!("has `{}` where the number of a layer should be", number.escape_debug()))? as usize;
    Ok((format!("{LAYERS}{}.{rest}", first_layer + layer), Some(layer)))
}
