//! Shapes of a checkpoint against its configuration: the shapes are right.

use crate::config::{DecoderConfig, MixerConfig};
use crate::weights::WeightTable;

type ShapeOf<'a> = &'a dyn Fn(&str) -> Option<Vec<usize>>;

/// Sizes that a configuration may have.
const MOST: usize = 1 << 31;

/// The shape of a parameter's tensor in the file, and the one the configuration asks for.
fn shapes(table: &WeightTable, path: &str, shape_of: ShapeOf) -> Option<(Vec<usize>, Vec<usize>)> {
    let entry = table.by_path(path)?;
    let found = entry.keys().find_map(shape_of)?;
    // A shape of another kind settles nothing: the comparison of all keys says what is wrong with it.
    let comparable = found.len() == entry.shape.len() && found.iter().all(|size| (1..MOST).contains(size));
    comparable.then(|| (found, entry.shape.clone()))
}

pub(crate) fn reconcile(config: &mut DecoderConfig, shape_of: ShapeOf) -> Vec<String> {
    let mut notes = Vec::new();
    let table = config.table();
    if let Some((found, wanted)) = shapes(&table, "embeddings.weight", shape_of)
        && found[0] != wanted[0]
    {
        notes.push(format!("the configuration says {} rows of vocabulary, the embedding has {}: using {}", wanted[0], found[0], found[0]));
        config.vocab_size = found[0];
    }
    if let Some(head) = table.by_path("lm_head.weight")
        && !head.keys().any(|key| shape_of(key).is_some())
    {
        notes.push(format!("the configuration says the head is not tied, but there is no {}: using the embedding", head.key));
        config.tie_embeddings = true;
    }
    for i in 0..config.layers.len() {
        let mut layer = config.layers[i].clone();
        for note in settle(&mut layer, i, &table, shape_of) {
            // The layers of a model agree, as a rule: once is enough.
            if !notes.contains(&note) {
                notes.push(note);
            }
        }
        config.layers[i] = layer;
    }
    notes
}

/// Settles one layer; returns what was changed.
fn settle(layer: &mut MixerConfig, i: usize, table: &WeightTable, shape_of: ShapeOf) -> Vec<String> {
    let find = |name: &str| shapes(table, &format!("layers.{i}.mixer.{name}"), shape_of);
    let mut notes = Vec::new();
    let mut set = |what: &str, value: &mut usize, found: usize| {
        if found != *value && found > 0 {
            notes.push(format!("the configuration says {what} {value}, the weights have {found}: using {found}"));
            *value = found;
        }
    };
    match layer {
        MixerConfig::Mlp(mlp) => {
            // Two projections may share one tensor of the file: its rows are in proportion.
            if let Some((found, wanted)) = find("up_proj.weight")
                && (mlp.intermediate * found[0]).is_multiple_of(wanted[0])
            {
                let found = mlp.intermediate * found[0] / wanted[0];
                set("an MLP width of", &mut mlp.intermediate, found);
            }
        }
        MixerConfig::Mamba(mamba) => {
            if let Some((found, _)) = find("dt_proj.weight") {
                set("a rank of step sizes of", &mut mamba.dt_rank, found[1]);
            }
            if let Some((found, _)) = find("a_log") {
                set("a state width of", &mut mamba.state, found[1]);
            }
        }
        MixerConfig::Mamba2(mamba) => {
            if let Some((found, _)) = find("conv1d.weight") {
                let shared = found[0].saturating_sub(mamba.inner()) / (2 * mamba.state);
                let whole = mamba.inner() + 2 * shared * mamba.state == found[0];
                if whole && shared > 0 && mamba.heads.is_multiple_of(shared) {
                    set("groups of", &mut mamba.groups, shared);
                }
            }
        }
        MixerConfig::Attention(attention) => {
            let entry = table.by_path(&format!("layers.{i}.mixer.k_proj.weight"));
            let alone = entry.is_some_and(|entry| entry.rows.is_none());
            if let Some((found, _)) = find("k_proj.weight").filter(|_| alone) {
                let heads = found[0] / attention.head_dim;
                if heads * attention.head_dim == found[0] && heads > 0 && attention.heads.is_multiple_of(heads) {
                    set("key/value heads of", &mut attention.kv_heads, heads);
                }
            }
        }
    }
    notes
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use crate::{DecoderConfig, MixerConfig};

    /// Reads `said` against the shapes of a checkpoint of `held`: afterwards both compute the same, and `expected` is said.
    fn settled(said: &str, held: &str, expected: &[&str]) -> DecoderConfig {
        let held = DecoderConfig::from_json(held).unwrap();
        let shapes: HashMap<String, Vec<usize>> = held.table().entries.into_iter().map(|e| (e.key, e.shape)).collect();
        let mut config = DecoderConfig::from_json(said).unwrap();
        let notes = config.reconcile(&|key| shapes.get(key).cloned());
        assert_eq!(notes.len(), expected.len(), "{notes:?}");
        for word in expected {
            assert!(notes.iter().any(|note| note.contains(word)), "{word}: {notes:?}");
        }
        assert!(config.computes_as(&held), "{config:?}");
        // What is written says so too.
        let written = DecoderConfig::from_value(config.to_json()).unwrap();
        assert!(written.computes_as(&held), "{written:?}");
        config
    }

    #[test]
    fn vocabulary_tied_head_and_mlp_width_are_the_weights() {
        let text = |vocab: usize, width: usize, tied: bool| {
            format!(
                r#"{{"model_type":"gpt_neox","vocab_size":{vocab},"hidden_size":8,"num_hidden_layers":2,"num_attention_heads":2,
                    "intermediate_size":{width},"rotary_pct":0.5,"tie_word_embeddings":{tied}}}"#
            )
        };
        settled(&text(10, 16, false), &text(12, 24, true), &["10 rows", "not tied", "MLP width of 16"]);
        assert!(settled(&text(12, 24, false), &text(12, 24, false), &[]).raw.get("intermediate_size").is_some());
    }

    #[test]
    fn halves_of_one_matrix_are_in_proportion() {
        let text = |width: usize| {
            format!(
                r#"{{"model_type":"granitemoehybrid","vocab_size":9,"hidden_size":8,"num_hidden_layers":2,"num_local_experts":0,
                    "layer_types":["mamba","attention"],"num_attention_heads":2,"shared_intermediate_size":{width},"mamba_n_heads":2,
                    "mamba_d_state":4}}"#
            )
        };
        settled(&text(16), &text(20), &["MLP width of 16, the weights have 20"]);
    }

    #[test]
    fn groups_ranks_states_and_key_value_heads_are_the_weights() {
        let mamba2 = |groups: usize| {
            format!(
                r#"{{"model_type":"mamba2","vocab_size":9,"hidden_size":16,"num_hidden_layers":1,"num_heads":4,"head_dim":8,
                    "state_size":4,"n_groups":{groups},"tie_word_embeddings":true}}"#
            )
        };
        settled(&mamba2(4), &mamba2(2), &["groups of 4, the weights have 2"]);
        let mamba = |rank: usize, state: usize| {
            format!(
                r#"{{"model_type":"mamba","vocab_size":9,"hidden_size":16,"num_hidden_layers":2,"time_step_rank":{rank},"state_size":{state}}}"#
            )
        };
        settled(&mamba(1, 16), &mamba(3, 5), &["rank of step sizes of 1", "state width of 16"]);
        let llama = |kv: usize| {
            format!(
                r#"{{"model_type":"llama","vocab_size":9,"hidden_size":16,"num_hidden_layers":1,"num_attention_heads":4,
                    "num_key_value_heads":{kv},"intermediate_size":8}}"#
            )
        };
        let config = settled(&llama(4), &llama(2), &["key/value heads of 4"]);
        assert!(matches!(&config.layers[0], MixerConfig::Attention(attention) if attention.kv_heads == 2));
    }

    #[test]
    fn shapes_of_another_kind_settle_nothing() {
        let text = r#"{"model_type":"mamba2","vocab_size":9,"hidden_size":16,"num_hidden_layers":1,"num_heads":4,"head_dim":8,
            "state_size":4,"n_groups":2,"tie_word_embeddings":true}"#;
        for shape in [vec![], vec![0, 1], vec![usize::MAX, 1, 4], vec![7], vec![1; 9]] {
            let mut config = DecoderConfig::from_json(text).unwrap();
            assert_eq!(config.reconcile(&|_| Some(shape.clone())), Vec::<String>::new(), "{shape:?}");
        }
    }

    #[test]
    fn a_key_that_changes_nothing_is_refused() {
        let text = r#"{"d_model":16,"n_layer":1,"vocab_size":16}"#;
        let with = |key: &str, value: usize| {
            let overrides = serde_json::Map::from_iter([(key.to_string(), value.into())]);
            DecoderConfig::from_json_with(text, &overrides)
        };
        assert_eq!(with("n_layer", 3).unwrap().layers.len(), 3);
        assert_eq!(with("n_layer", 1).unwrap().layers.len(), 1);
        assert_eq!(with("eos_token_id", 7).unwrap().eos, [7]);
        for key in ["n_layers", "nlayer"] {
            let error = with(key, 3).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains("a key that is read"), "{error}");
        }
    }

    #[test]
    fn what_is_not_computed_is_refused() {
        let refused = [
            (r#"{"model_type":"mamba","vocab_size":9,"hidden_size":8,"num_hidden_layers":1,"hidden_act":"gelu"}"#, "hidden_act"),
            (r#"{"model_type":"mamba","vocab_size":9,"hidden_size":8,"num_hidden_layers":1,"state_size":-1}"#, "state_size"),
            (r#"{"d_model":8,"n_layer":1,"vocab_size":9,"ssm_cfg":{"layer":"Mamba3"}}"#, "Mamba1 or Mamba2"),
            (r#"{"d_model":8,"n_layer":1,"vocab_size":9,"rms_norm":false}"#, "rms_norm"),
            (r#"{"d_model":64,"n_layer":1,"vocab_size":9,"ssm_cfg":{"layer":"Mamba2","norm_before_gate":true}}"#, "norm_before_gate"),
            (r#"{"d_model":8,"n_layer":2,"vocab_size":9,"attn_layer_idx":[2],"attn_cfg":{}}"#, "below 2"),
            (
                r#"{"d_model":8,"n_layer":1,"vocab_size":9,"attn_layer_idx":[0],"attn_cfg":{"num_heads":1,"head_dim":4,"mlp_dim":8}}"#,
                "mlp_dim",
            ),
            (r#"{"model_type":"granitemoehybrid","num_local_experts":8}"#, "mixtures of experts"),
            (r#"{"model_type":"nemotron_h","vocab_size":9,"hidden_size":8,"hybrid_override_pattern":"ME"}"#, "`E` at 1"),
            (r#"{"model_type":"mamba","vocab_size":9,"hidden_size":8,"num_hidden_layers":2000000000}"#, "at most 65536 layers"),
            (r#"{"model_type":"falcon_h1"}"#, "supported:"),
            (r#"{"vocab_size":9}"#, "no `model_type`"),
        ];
        for (text, word) in refused {
            let error = DecoderConfig::from_json(text).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
