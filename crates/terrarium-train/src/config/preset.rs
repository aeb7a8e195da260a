//! `[model]`: a new model by its keys, or by the name of a published one with some keys replaced.

use serde_json::{Map, Value};
use terrarium_models::presets::{Preset, preset, presets};
use terrarium_models::{ConfigError as ModelError, DecoderConfig};

use super::ConfigError;
use crate::TrainError;

const KEY: &str = "preset";

/// The preset that a `[model]` section names.
///
/// # Errors
/// When there is none of that name: the error lists the nearest.
pub(super) fn named(section: &Map<String, Value>) -> Result<Option<Preset>, ConfigError> {
    let Some(value) = section.get(KEY) else { return Ok(None) };
    let fail = |reason: String| ConfigError::Value { key: format!("model.{KEY}"), reason };
    let name = value.as_str().ok_or_else(|| fail(format!("expected the name of a preset, found {value}")))?;
    let found = preset(name).ok_or_else(|| fail(format!("there is no `{name}`; near it: {}", near_presets(name).join(", "))))?;
    Ok(Some(found))
}

/// The model of a `[model]` section. `tokens` are keys that the tokenizer knows (`vocab_size`, `eos_token_id`, ..): they
/// fill what the section leaves open; those of a preset's own tokenizer give way, its `vocab_size` stays.
///
/// # Errors
/// An unknown preset or key, or a value that makes no model.
pub fn new_model(section: &Map<String, Value>, tokens: &Map<String, Value>) -> Result<DecoderConfig, TrainError> {
    let Some(preset) = named(section)? else {
        let mut table = tokens.clone();
        table.extend(section.clone());
        return Ok(DecoderConfig::from_value_strict(Value::Object(table))?);
    };
    let family = preset.decoder()?.family;
    let own: Map<String, Value> = section.iter().filter(|(key, _)| *key != KEY).map(|(key, value)| (key.clone(), value.clone())).collect();
    let known = family.keys();
    let strange: Vec<&str> = own.keys().map(String::as_str).filter(|key| !known.contains(key)).collect();
    if !strange.is_empty() {
        return Err(ModelError::UnknownKeys { family: family.name(), keys: strange.join(", "), known: known.join(", ") }.into());
    }
    let Value::Object(mut table) = preset.config else { return Err(ModelError::Json(format!("{KEY} {}", preset.name)).into()) };
    table.extend(tokens.iter().filter(|(key, _)| *key != "vocab_size").map(|(key, value)| (key.clone(), value.clone())));
    // Some keys have a second name, and the preset's would win without a word.
    let read = |table: &Map<String, Value>| {
        let config = DecoderConfig::from_value(Value::Object(table.clone()))?;
        Ok::<_, ModelError>(DecoderConfig { raw: Map::new(), ..config })
    };
    for (key, value) in own.iter().filter(|(key, _)| !table.contains_key(*key)) {
        let mut with = table.clone();
        with.insert(key.clone(), value.clone());
        if read(&with).is_ok_and(|with| read(&table).is_ok_and(|without| with == without)) {
            let reason = format!("changes nothing in the preset {}, whose keys are {}", preset.name, join(&table));
            return Err(ConfigError::Value { key: format!("model.{key}"), reason }.into());
        }
    }
    table.extend(own);
    Ok(DecoderConfig::from_value(Value::Object(table))?)
}

fn join(table: &Map<String, Value>) -> String {
    table.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
}

/// Names of the presets that are spelt most like `name`.
pub fn near_presets(name: &str) -> Vec<&'static str> {
    let name = name.to_lowercase();
    let mut names: Vec<(usize, &str)> = presets().iter().map(|preset| (distance(&name, preset.name), preset.name)).collect();
    names.sort();
    names.into_iter().take(4).map(|(_, name)| name).collect()
}

/// Insertions, deletions and substitutions (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn a_preset_is_completed_by_the_section_and_by_the_tokenizer() {
        let tokens = section(serde_json::json!({ "vocab_size": 300, "eos_token_id": 299 }));
        let whole = new_model(&section(serde_json::json!({ "preset": "mamba2-130m" })), &tokens).unwrap();
        assert_eq!((whole.parameters(), &whole.eos), (128_989_632, &vec![299]));
        let small = section(serde_json::json!({ "preset": "mamba2-130m-hf", "vocab_size": 304, "num_hidden_layers": 2 }));
        let small = new_model(&small, &tokens).unwrap();
        assert_eq!((small.vocab_size, small.pattern().as_str(), small.hidden_size), (304, "MM", 768));
        let plain = section(
            serde_json::json!({ "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8 }),
        );
        assert_eq!(new_model(&plain, &tokens).unwrap().vocab_size, 300);
    }

    #[test]
    fn unknown_presets_and_keys_are_named() {
        let said = |value: Value| new_model(&section(value), &Map::new()).unwrap_err().to_string();
        let near = said(serde_json::json!({ "preset": "mamba2-130" }));
        assert!(near.contains("mamba2-130m") && near.contains("model.preset"), "{near}");
        assert!(said(serde_json::json!({ "preset": 3 })).contains("model.preset"));
        assert!(said(serde_json::json!({ "preset": "mamba2-130m", "num_layers": 3 })).contains("num_layers"));
        let alias = said(serde_json::json!({ "preset": "mamba2-130m", "n_layers": 3 }));
        assert!(alias.contains("n_layers: changes nothing") && alias.contains("n_layer,"), "{alias}");
    }

    #[test]
    fn distances_are_those_of_levenshtein() {
        assert_eq!((distance("", "abc"), distance("kitten", "sitting"), distance("same", "same")), (3, 3, 0));
    }
}
