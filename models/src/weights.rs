//! Weight tables: which parameter is which part of which tensor of a checkpoint. Data, used for loading and for saving.

use crate::config::DecoderConfig;
use crate::families::{Part, Place};

/// Rows of a tensor that hold one parameter: `count` runs of `len` rows, `stride` apart, the first at `start`.
///
/// Fused projections are such runs: halves of a stacked one (`count` 1), heads of an interleaved one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// First row.
    pub start: usize,
    /// Rows of a run.
    pub len: usize,
    /// Rows from the start of a run to the start of the next.
    pub stride: usize,
    /// Runs.
    pub count: usize,
    /// Rows of the whole tensor.
    pub total: usize,
}

impl Rows {
    /// One run.
    pub fn run(start: usize, len: usize, total: usize) -> Self {
        Self { start, len, stride: len, count: 1, total }
    }

    /// Rows of the parameter.
    pub fn rows(&self) -> usize {
        self.len * self.count
    }

    /// First row of every run.
    pub fn starts(&self) -> impl Iterator<Item = usize> + use<> {
        let Self { start, stride, count, .. } = *self;
        (0..count).map(move |i| start + i * stride)
    }
}

/// One parameter and its place in a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightEntry {
    /// Path in the module.
    pub path: String,
    /// Key in the file.
    pub key: String,
    /// Other keys that files of the family use for it; never written.
    pub aliases: Vec<String>,
    /// Shape of the tensor in the file.
    pub shape: Vec<usize>,
    /// Which of the tensor's rows; all of them when absent. Elements are in the module's order.
    pub rows: Option<Rows>,
    /// Rows of each component of the tensor, where tensor-parallel training divides them one by one.
    pub parts: Option<Vec<usize>>,
}

impl WeightEntry {
    /// The key and its aliases.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.key.as_str()).chain(self.aliases.iter().map(String::as_str))
    }

    /// Elements of the parameter.
    pub fn len(&self) -> usize {
        let all = self.shape.iter().product();
        self.rows.map_or(all, |rows| all / rows.total * rows.rows())
    }

    /// True for a parameter without elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// All parameters of a model and their places in a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightTable {
    /// One entry per parameter, in the order of the model. Entries of one key cover its rows exactly once.
    pub entries: Vec<WeightEntry>,
    /// Entries that are written once more under another key: tied heads in layouts that store them.
    pub copies: Vec<WeightEntry>,
    /// Keys that a file may hold and that are not read (the second copy of a tied head).
    pub optional: Vec<String>,
    /// Endings of keys that files hold and no model needs (buffers).
    pub ignore: Vec<&'static str>,
}

impl WeightTable {
    pub(crate) fn new(config: &DecoderConfig) -> Self {
        let specs = config.specs();
        let mut entries = Vec::new();
        let mut push = |part: Part, prefix: String, name: &str, shape: &[usize]| {
            let Place { key, aliases, rows, parts } = config.family.place(config, part, name);
            // Depthwise convolutions are [channels, 1, k] in files.
            let mut shape = if name == "conv1d.weight" { vec![shape[0], 1, shape[1]] } else { shape.to_vec() };
            if let Some(rows) = &rows {
                debug_assert_eq!(rows.rows(), shape[0], "{prefix}{name}: rows of {key}");
                shape[0] = rows.total;
            }
            entries.push(WeightEntry { path: format!("{prefix}{name}"), key, aliases, shape, rows, parts });
        };
        for spec in &specs.embeddings {
            push(Part::Embeddings, "embeddings.".into(), &spec.path, &spec.shape);
        }
        for (i, layer) in specs.layers.iter().enumerate() {
            for spec in &layer.norm {
                push(Part::Norm(i), format!("layers.{i}.norm."), &spec.path, &spec.shape);
            }
            for spec in &layer.mixer {
                push(Part::Mixer(i), format!("layers.{i}.mixer."), &spec.path, &spec.shape);
            }
        }
        for spec in &specs.norm_f {
            push(Part::FinalNorm, "norm_f.".into(), &spec.path, &spec.shape);
        }
        for spec in &specs.lm_head {
            push(Part::Head, String::new(), &spec.path, &spec.shape);
        }
        let head = || config.family.place(config, Part::Head, "lm_head.weight");
        let optional = if config.tie_embeddings { vec![head().key] } else { vec![] };
        let copies = if config.tie_embeddings && config.family.stores_tied_head() {
            vec![WeightEntry { key: head().key, ..entries[0].clone() }]
        } else {
            vec![]
        };
        Self { entries, copies, optional, ignore: config.family.ignored().to_vec() }
    }

    /// The entry of a parameter.
    pub fn by_path(&self, path: &str) -> Option<&WeightEntry> {
        self.entries.iter().find(|entry| entry.path == path)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use serde_json::Map;

    use super::*;
    use crate::families::families;
    use crate::presets::presets;

    /// What holds for the table and the configuration of every model.
    pub(crate) fn check(config: &DecoderConfig) {
        check_table(config);
        let read_back = DecoderConfig::from_value(config.to_json()).unwrap();
        let settled = |config: &DecoderConfig| DecoderConfig { raw: Map::new(), ..config.clone() };
        assert_eq!(settled(&read_back), settled(config), "{}: read back from what it writes", config.family);
        assert_eq!(read_back.to_json(), config.to_json(), "{}: written twice", config.family);
    }

    fn check_table(config: &DecoderConfig) {
        let table = config.table();
        let mut tensors: BTreeMap<&str, Vec<&WeightEntry>> = BTreeMap::new();
        for entry in &table.entries {
            tensors.entry(&entry.key).or_default().push(entry);
        }
        for (key, entries) in &tensors {
            let mut readers = vec![0; entries[0].shape[0]];
            for entry in entries {
                assert_eq!(entry.shape, entries[0].shape, "{key}: shapes");
                assert!(entry.aliases.iter().all(|alias| !tensors.contains_key(alias.as_str())), "{key}: an alias is the key of another");
                let rows = entry.rows.unwrap_or(Rows::run(0, readers.len(), readers.len()));
                assert_eq!(rows.total, readers.len(), "{key}: rows of the tensor");
                rows.starts().flat_map(|start| start..start + rows.len).for_each(|row| readers[row] += 1);
                if let Some(parts) = &entry.parts {
                    assert_eq!(parts.iter().sum::<usize>(), readers.len(), "{key}: components");
                }
            }
            assert!(readers.iter().all(|readers| *readers == 1), "{key}: each row belongs to one parameter");
        }
        let paths: BTreeSet<&str> = table.entries.iter().map(|entry| entry.path.as_str()).collect();
        assert_eq!(paths.len(), table.entries.len(), "{}: paths", config.family);
        let specs = config.parameter_specs();
        assert!(specs.iter().map(|spec| spec.path.as_str()).eq(table.entries.iter().map(|entry| entry.path.as_str())));
        assert_eq!(table.entries.iter().map(WeightEntry::len).sum::<usize>(), config.parameters(), "{}", config.family);
        for other in table.copies.iter().map(|copy| &copy.key).chain(&table.optional) {
            assert!(!tensors.contains_key(other.as_str()), "{other} is a copy, and the key of a parameter");
        }
    }

    #[test]
    fn tables_of_all_presets_cover_every_row_once_in_every_layout_that_can_hold_them() {
        for preset in presets() {
            let config = preset.decoder().unwrap();
            for family in families() {
                if let Ok(config) = config.in_family(*family) {
                    check(&config);
                }
            }
        }
    }

    #[test]
    fn transformers_has_a_layout_for_all_presets_but_one() {
        for preset in presets() {
            let config = preset.decoder().unwrap();
            match config.in_transformers() {
                Ok(written) => {
                    assert!(written.family.in_transformers() && written.computes_as(&config), "{}", preset.name);
                    assert_eq!(written.parameters(), preset.parameters, "{}", preset.name);
                    assert_ne!(preset.name, "mamba2attn-2.7b");
                }
                // No class of transformers has Mamba-2 and attention with a convolution.
                Err(error) => assert_eq!(preset.name, "mamba2attn-2.7b", "{error}"),
            }
        }
    }

    #[test]
    fn layouts_of_authors_are_found_without_naming_them() {
        let native = |name: &str| crate::presets::preset(name).unwrap().decoder().unwrap().in_native().map(|config| config.family.name());
        assert_eq!(native("mamba2attn-2.7b").unwrap(), "mamba_ssm");
        assert_eq!(native("mamba2-130m-hf").unwrap(), "mamba_ssm");
        assert_eq!(native("mamba2-8b-3t-4k").unwrap(), "mamba_ssm");
        assert!(native("gpt3-8b-multi-3.5t-base").is_err());
    }

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
