//! `generation_config.json`: how a model's authors mean it to be sampled, and where it stops.

use std::path::Path;

use serde_json::{Map, Value};
use terrarium_models::DecoderConfig;

use crate::{Error, Result};

/// The defaults of generation that come with a model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// Ids that end a text, from generation_config.json and config.json.
    pub eos: Vec<u32>,
    /// Beginning of a text.
    pub bos: Option<u32>,
    /// Padding.
    pub pad: Option<u32>,
    /// Whether to sample; `Some(false)` is greedy whatever the temperature.
    pub do_sample: Option<bool>,
    /// Divides the logits.
    pub temperature: Option<f32>,
    /// Keeps the best so many.
    pub top_k: Option<usize>,
    /// Keeps the best up to this probability.
    pub top_p: Option<f32>,
    /// Divides or multiplies the logits of tokens already seen.
    pub repetition_penalty: Option<f32>,
    /// Length of a generated text.
    pub max_new_tokens: Option<usize>,
    /// The file as it was; empty where there is none.
    pub raw: Map<String, Value>,
}

pub(crate) const GENERATION: &str = "generation_config.json";

impl GenerationConfig {
    /// Reads the file of a model directory where there is one; what it lacks comes from config.json.
    pub fn open(dir: &Path, config: &DecoderConfig) -> Result<Self> {
        let path = dir.join(GENERATION);
        let raw = match std::fs::read_to_string(&path) {
            Ok(text) => serde_json::from_str(&text).map_err(|source| Error::Json { file: path, source })?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Map::new(),
            Err(e) => return Err(Error::io("read", &path)(e)),
        };
        Ok(Self::from_map(raw, config))
    }

    fn from_map(raw: Map<String, Value>, config: &DecoderConfig) -> Self {
        let float = |key: &str| raw.get(key).and_then(Value::as_f64).map(|x| x as f32);
        let whole = |key: &str| raw.get(key).and_then(Value::as_u64).and_then(|x| usize::try_from(x).ok());
        let mut eos = raw.get("eos_token_id").map(ids).unwrap_or_default();
        eos.extend(config.eos.iter().copied().filter(|id| !eos.contains(id)).collect::<Vec<_>>());
        let first = |key: &str| raw.get(key).and_then(|v| ids(v).first().copied());
        Self {
            eos,
            bos: first("bos_token_id").or(config.bos),
            pad: first("pad_token_id").or(config.pad),
            do_sample: raw.get("do_sample").and_then(Value::as_bool),
            temperature: float("temperature"),
            top_k: whole("top_k"),
            top_p: float("top_p"),
            repetition_penalty: float("repetition_penalty"),
            max_new_tokens: whole("max_new_tokens"),
            raw,
        }
    }

    /// What to write for a model that came without the file.
    pub(crate) fn minimal(config: &DecoderConfig) -> Value {
        let mut map = Map::new();
        map.insert("_from_model_config".into(), true.into());
        if let Some(bos) = config.bos {
            map.insert("bos_token_id".into(), bos.into());
        }
        match config.eos.as_slice() {
            [] => {}
            [one] => drop(map.insert("eos_token_id".into(), (*one).into())),
            many => drop(map.insert("eos_token_id".into(), many.to_vec().into())),
        }
        if let Some(pad) = config.pad {
            map.insert("pad_token_id".into(), pad.into());
        }
        Value::Object(map)
    }
}

/// One id or a list of them.
fn ids(value: &Value) -> Vec<u32> {
    let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(list) => list.iter().filter_map(one).collect(),
        other => one(other).into_iter().collect(),
    }
}
