//! The folders of a Megatron checkpoint: which iteration, which ranks.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::{CheckpointError, MegatronError};
use crate::{Error, Result};

const LATEST: &str = "latest_checkpointed_iteration.txt";
const FILE: &str = "model_optim_rng.pt";

/// More ranks than any run has.
const MAX_RANKS: usize = 1 << 14;

pub(super) fn layout_error(path: &Path, problem: impl Into<String>) -> Error {
    CheckpointError::from(MegatronError::Layout { path: path.to_path_buf(), problem: problem.into() }).into()
}

/// The folder of the iteration to read; `None` if `dir` is no Megatron folder.
pub(super) fn iteration(dir: &Path) -> Result<Option<PathBuf>> {
    let latest = dir.join(LATEST);
    if !latest.is_file() {
        let ranks = std::fs::read_dir(dir).into_iter().flatten().flatten();
        let is_one = ranks.filter_map(|e| e.file_name().into_string().ok()).any(|name| name.starts_with("mp_rank_"));
        return Ok(is_one.then(|| dir.to_path_buf()));
    }
    let text = std::fs::read_to_string(&latest).map_err(Error::io("read", &latest))?;
    let name = match text.trim() {
        "release" => "release".to_string(),
        number => match number.parse::<u64>() {
            Ok(n) if number.bytes().all(|b| b.is_ascii_digit()) => format!("iter_{n:07}"),
            _ => {
                let problem = format!("says `{}`, which is neither `release` nor an iteration", number.escape_debug());
                return Err(layout_error(&latest, problem));
            }
        },
    };
    let folder = dir.join(&name);
    if !folder.is_dir() {
        return Err(layout_error(&latest, format!("names the folder {name}, which is not there")));
    }
    Ok(Some(folder))
}

/// The files of all ranks, by pipeline stage and then by tensor-parallel rank.
pub(super) fn rank_files(folder: &Path) -> Result<Vec<Vec<PathBuf>>> {
    let listing = std::fs::read_dir(folder).map_err(Error::io("list", folder))?;
    let mut found: BTreeMap<(usize, usize), PathBuf> = BTreeMap::new();
    let mut distributed = false;
    for entry in listing {
        let entry = entry.map_err(Error::io("list", folder))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        distributed |= name.ends_with(".distcp") || name == ".metadata";
        let Some(numbers) = name.strip_prefix("mp_rank_") else { continue };
        let rank = rank(numbers).map_err(|problem| layout_error(&entry.path(), problem))?;
        if let Some(other) = found.insert(rank, entry.path()) {
            return Err(layout_error(&entry.path(), format!("is the same rank as {}", other.display())));
        }
    }
    if found.is_empty() {
        let problem = if distributed {
            "a checkpoint of the torch_dist format, which is not read: convert it with Megatron's --ckpt-convert-format torch"
        } else {
            "no mp_rank_* folder here"
        };
        return Err(layout_error(folder, problem));
    }
    let stages = found.keys().map(|&(stage, _)| stage).max().unwrap_or(0) + 1;
    let tensors = found.keys().map(|&(_, tensor)| tensor).max().unwrap_or(0) + 1;
    if stages.saturating_mul(tensors) != found.len() {
        let missing = (0..stages).flat_map(|p| (0..tensors).map(move |t| (p, t))).find(|rank| !found.contains_key(rank));
        let (p, t) = missing.unwrap_or_default();
        let problem =
            format!("tensor rank {t} of pipeline stage {p} is missing: {} of {tensors} x {stages} rank folders are here", found.len());
        return Err(layout_error(folder, problem));
    }
    let mut files = vec![Vec::with_capacity(tensors); stages];
    for ((stage, _), path) in found {
        let file = path.join(FILE);
        if !file.is_file() {
            return Err(layout_error(&path, format!("holds no {FILE}")));
        }
        files[stage].push(file);
    }
    Ok(files)
}

/// Pipeline stage and tensor-parallel rank of `TT` or `TT_PPP`.
fn rank(numbers: &str) -> Result<(usize, usize), String> {
    let parse = |n: &str| n.parse::<usize>().ok().filter(|&n| n < MAX_RANKS);
    let ranks: Option<Vec<usize>> = numbers.split('_').map(parse).collect();
    match ranks.as_deref() {
        Some(&[tensor]) => Ok((0, tensor)),
        Some(&[tensor, stage]) => Ok((stage, tensor)),
        Some([_, _, _]) => Err("a rank of an expert-parallel run, which is not read".into()),
        _ => Err("its name is not mp_rank_TT or mp_rank_TT_PPP".into()),
    }
}
