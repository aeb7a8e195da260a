//! Shapes of a checkpoint against its configuration: the shapes are right.

use crate::config::{DecoderConfig, MixerConfig};
use crate::weights::WeightTable;

type ShapeOf<'a> = &'a dyn Fn(&str) -> Option<Vec<usize>>;

/// The shape of a parameter's tensor in the file, and the one the configuration asks for.
fn shapes(table: &WeightTable, path: &str, shape_of: ShapeOf) -> Option<(Vec<usize>, Vec<usize>)> {
    let entry = table.by_path(path)?;
    Some((entry.keys().find_map(shape_of)?, entry.shape.clone()))
}

pub(crate) fn reconcile(config: &mut DecoderConfig, shape_of: ShapeOf) -> Vec<String> {
    let mut notes = Vec::new();
    let table = config.table();
    if let Some((found, wanted)) = shapes(&table, "embeddings.weight", shape_of)
        && found.len() == 2
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
            if let Some((found, _)) = find("dt_proj.weight").filter(|(found, _)| found.len() == 2) {
                set("a rank of step sizes of", &mut mamba.dt_rank, found[1]);
            }
            if let Some((found, _)) = find("a_log").filter(|(found, _)| found.len() == 2) {
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
