//! Weight tables: which parameter is which tensor of a checkpoint. Data, used for loading and for saving.

use crate::config::DecoderConfig;
use crate::families::Family;

/// One parameter and its place in a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightEntry {
    /// Path in the module.
    pub path: String,
    /// Key in the file.
    pub key: String,
    /// Shape in the file: the same elements in the same order as in the module.
    pub shape: Vec<usize>,
}

/// All parameters of a model and their places in a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightTable {
    /// One entry per parameter.
    pub entries: Vec<WeightEntry>,
    /// Entries that are written once more under another key: tied heads of families for which transformers ties nothing.
    pub copies: Vec<WeightEntry>,
    /// Keys that a file may hold and that are not read (the second copy of a tied head).
    pub optional: Vec<String>,
    /// Endings of keys that files hold and no model needs (buffers).
    pub ignore: Vec<&'static str>,
}

/// Where a family puts one layer: the key of its norm, the prefix of its mixer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerKeys {
    /// Key of the norm, without `.weight`.
    pub norm: String,
    /// Prefix of the mixer's keys.
    pub mixer: String,
}

/// Names of mixer parameters that differ from the module's; the rest are the same everywhere.
const RENAMED: [(&str, &str); 2] = [("a_log", "A_log"), ("d", "D")];

impl WeightTable {
    pub(crate) fn new(config: &DecoderConfig, family: &dyn Family) -> Self {
        let specs = config.specs();
        let top = family.top_keys();
        let mut entries = Vec::new();
        let mut push = |path: String, key: String, shape: &[usize]| {
            // Depthwise convolutions are [channels, 1, k] in files.
            let shape = if key.ends_with("conv1d.weight") { vec![shape[0], 1, shape[1]] } else { shape.to_vec() };
            entries.push(WeightEntry { path, key, shape });
        };
        push("embeddings.weight".into(), format!("{}.weight", top.embeddings), &specs.embeddings[0].shape);
        for (i, (layer, keys)) in specs.layers.iter().zip(family.layer_keys(config)).enumerate() {
            push(format!("layers.{i}.norm.weight"), format!("{}.weight", keys.norm), &layer.norm[0].shape);
            for spec in &layer.mixer {
                let name = RENAMED.iter().find(|(ours, _)| *ours == spec.path).map_or(spec.path.as_str(), |(_, theirs)| theirs);
                push(format!("layers.{i}.mixer.{}", spec.path), format!("{}.{name}", keys.mixer), &spec.shape);
            }
        }
        push("norm_f.weight".into(), format!("{}.weight", top.norm_f), &specs.norm_f[0].shape);
        for head in &specs.lm_head {
            push(head.path.clone(), head.path.clone(), &head.shape);
        }
        let optional = if config.tie_embeddings { vec!["lm_head.weight".to_string()] } else { vec![] };
        let copies = if config.tie_embeddings && !family.transformers_ties() {
            vec![WeightEntry { key: "lm_head.weight".to_string(), ..entries[0].clone() }]
        } else {
            vec![]
        };
        Self { entries, copies, optional, ignore: vec!["rotary_emb.inv_freq"] }
    }

    /// The entry of a parameter.
    pub fn by_path(&self, path: &str) -> Option<&WeightEntry> {
        self.entries.iter().find(|entry| entry.path == path)
    }
}

#[cfg(test)]
mod tests {
    use crate::DecoderConfig;

    #[test]
    fn a_tied_head_is_copied_only_where_transformers_does_not_tie() {
        let tied = |text: &str| DecoderConfig::from_json(text).unwrap().table();
        let hybrid = tied(
            r#"{"model_type":"nemotron_h","vocab_size":9,"hidden_size":4,"hybrid_override_pattern":"-","intermediate_size":8,
                "tie_word_embeddings":true}"#,
        );
        assert_eq!(hybrid.copies.len(), 1);
        assert_eq!((hybrid.copies[0].path.as_str(), hybrid.copies[0].key.as_str()), ("embeddings.weight", "lm_head.weight"));
        assert_eq!(hybrid.copies[0].shape, [9, 4]);
        let llama = tied(
            r#"{"model_type":"llama","vocab_size":9,"hidden_size":4,"num_hidden_layers":1,"num_attention_heads":1,"intermediate_size":8,
                "tie_word_embeddings":true}"#,
        );
        assert!(llama.copies.is_empty());
        assert_eq!(llama.optional, ["lm_head.weight"]);
    }
}
