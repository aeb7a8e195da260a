//! The family that `models/README.md` adds step by step, written outside the crate through its public interface alone.
//! The text between the two markers is the code of that page; in the crate its paths begin with `crate`.

// The example begins.
use serde_json::{Map, Value, json};

use terrarium::models::config::{ConfigError, DecoderConfig, MixerConfig};
use terrarium::models::families::fields::{COMMON_KEYS, Fields};
use terrarium::models::families::{Family, Part, Place, express};
use terrarium::models::init::Init;
use terrarium::models::layers::{NormConfig, NormKind};
use terrarium::models::mixers::{Activation, AttentionConfig, MlpConfig};
use terrarium::models::pattern::LayerKind;
use terrarium::models::presets::Preset;

/// `model_type: qwen2`.
pub struct Qwen2;

const KEYS: [&str; 16] = [
    "model_type",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "attention_dropout",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
    "use_mrope",
];

fn read(family: &'static Qwen2, raw: &Map<String, Value>) -> Result<DecoderConfig, ConfigError> {
    let f = Fields::new(family.name(), raw);
    if f.flag(&["use_sliding_window"], false)? {
        return Err(f.wrong("use_sliding_window", "false: attention over a window is not supported", true));
    }
    let (heads, kv_heads, head_dim) = f.heads(f.size(&["hidden_size"])?)?;
    let attention = AttentionConfig {
        heads,
        kv_heads,
        head_dim,
        rope: Some(f.rope(head_dim, 1.0, &[])?),
        scale: None,
        qkv_bias: true,
        out_bias: false,
        conv_kernel: None,
    };
    let mlp = MlpConfig {
        intermediate: f.size(&["intermediate_size"])?,
        activation: f.activation(&["hidden_act"], Activation::Silu)?,
        gated: true,
        bias: false,
    };
    let blocks = f.layers(&["num_hidden_layers"])?;
    let layers = (0..blocks).flat_map(|_| [MixerConfig::Attention(attention.clone()), MixerConfig::Mlp(mlp.clone())]).collect();
    Ok(DecoderConfig {
        norm: NormConfig::rms(f.float(&["rms_norm_eps"], 1e-6)? as f32),
        max_positions: f.maybe_size(&["max_position_embeddings"])?,
        init: Init::Megatron { std: f.float(&["initializer_range"], 0.02)? as f32 },
        ..DecoderConfig::new(family, &f, layers)?
    })
}

fn place(config: &DecoderConfig, part: Part, name: &str) -> Place {
    let mlp = |i: usize| config.layers[i].kind() == LayerKind::Mlp;
    match part {
        Part::Embeddings => Place::at(format!("model.embed_tokens.{name}")),
        Part::Norm(i) => {
            let norm = if mlp(i) { "post_attention_layernorm" } else { "input_layernorm" };
            Place::at(format!("model.layers.{}.{norm}.{name}", i / 2))
        }
        Part::Mixer(i) => Place::at(format!("model.layers.{}.{}.{name}", i / 2, if mlp(i) { "mlp" } else { "self_attn" })),
        Part::FinalNorm => Place::at(format!("model.norm.{name}")),
        Part::Head => Place::at("lm_head.weight"),
    }
}

fn keys_of(config: &DecoderConfig) -> Option<Map<String, Value>> {
    let (attention, mlp) = (express::attention(config)?, express::mlp(config)?);
    let rope = attention.rope.as_ref()?;
    if config.norm.kind != NormKind::Rms || rope.dim != attention.head_dim {
        return None;
    }
    let mut keys = express::common(config);
    keys.extend(express::heads(attention));
    keys.extend(express::rope(rope, attention.head_dim));
    keys.extend(express::map([
        ("num_hidden_layers", Some(json!(config.layers.len() / 2))),
        ("intermediate_size", Some(json!(mlp.intermediate))),
        ("hidden_act", Some(express::activation(mlp.activation))),
        ("rms_norm_eps", Some(express::float(config.norm.eps))),
    ]));
    Some(keys)
}

fn published() -> Vec<Preset> {
    let config = json!({
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "intermediate_size": 4864, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "use_sliding_window": false, "tie_word_embeddings": true, "max_position_embeddings": 32768, "bos_token_id": 151643,
        "eos_token_id": 151643,
    });
    vec![Preset::new("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", 494_032_768, config)]
}

impl Family for Qwen2 {
    fn name(&self) -> &'static str {
        "qwen2"
    }

    fn architecture(&self) -> &'static str {
        "Qwen2ForCausalLM"
    }

    fn keys(&self) -> Vec<&'static str> {
        KEYS.into_iter().chain(COMMON_KEYS).collect()
    }

    fn read(&'static self, raw: &Map<String, Value>) -> Result<DecoderConfig, ConfigError> {
        read(self, raw)
    }

    fn express(&self, config: &DecoderConfig) -> Option<Map<String, Value>> {
        keys_of(config)
    }

    fn place(&self, config: &DecoderConfig, part: Part, name: &str) -> Place {
        place(config, part, name)
    }

    fn blocks(&self, config: &DecoderConfig) -> usize {
        config.layers.len() / 2
    }

    fn presets(&self) -> Vec<Preset> {
        published()
    }
}

use terrarium::models::weights::Rows;

/// Rows of `[q; k; v]`, stacked.
fn stacked(attention: &AttentionConfig, module: &str) -> Rows {
    let (q, kv) = (attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim);
    match module {
        "q_proj" => Rows::run(0, q, q + 2 * kv),
        "k_proj" => Rows::run(q, kv, q + 2 * kv),
        _ => Rows::run(q + kv, kv, q + 2 * kv),
    }
}

/// Rows of `[q.. k v]` once per key/value head.
fn interleaved(attention: &AttentionConfig, module: &str) -> Rows {
    let (p, groups) = (attention.head_dim, attention.kv_heads);
    let queries = attention.heads / groups * p;
    let stride = queries + 2 * p;
    let (start, len) = match module {
        "q_proj" => (0, queries),
        "k_proj" => (queries, p),
        _ => (queries + p, p),
    };
    Rows { start, len, stride, count: groups, total: groups * stride }
}
// The example ends.

use std::collections::BTreeMap;

use terrarium::burn::tensor::{DType, TensorData};
use terrarium::models::{Decoder, Layout, ParamSource, ParamSpec};

use crate::common::*;

static QWEN2: Qwen2 = Qwen2;

const SIZES: &str = r#""vocab_size":61,"hidden_size":24,"num_hidden_layers":2,"num_attention_heads":6,"num_key_value_heads":2,
    "intermediate_size":40,"rms_norm_eps":1e-6,"rope_theta":1e4,"tie_word_embeddings":true}"#;

fn keys(model_type: &str) -> Map<String, Value> {
    serde_json::from_str(&format!(r#"{{"model_type":"{model_type}",{SIZES}"#)).unwrap()
}

/// The same model in files that hold queries, keys and values in one tensor.
struct Fused(fn(&AttentionConfig, &str) -> Rows);

static STACKED: Fused = Fused(stacked);
static INTERLEAVED: Fused = Fused(interleaved);

impl Family for Fused {
    fn name(&self) -> &'static str {
        "fused"
    }

    fn architecture(&self) -> &'static str {
        QWEN2.architecture()
    }

    fn keys(&self) -> Vec<&'static str> {
        QWEN2.keys()
    }

    fn read(&'static self, raw: &Map<String, Value>) -> Result<DecoderConfig, ConfigError> {
        Ok(DecoderConfig { family: self, ..QWEN2.read(raw)? })
    }

    fn place(&self, config: &DecoderConfig, part: Part, name: &str) -> Place {
        let (module, leaf) = name.split_once('.').unwrap_or((name, ""));
        match part {
            Part::Mixer(i) => match &config.layers[i] {
                MixerConfig::Attention(attention) if module != "o_proj" => {
                    Place::at(format!("model.layers.{}.self_attn.qkv_proj.{leaf}", i / 2)).rows((self.0)(attention, module))
                }
                _ => place(config, part, name),
            },
            _ => place(config, part, name),
        }
    }
}

/// The tensors of a file, from the parameters of a model.
fn file(config: &DecoderConfig, model: &Decoder<B>) -> BTreeMap<String, Vec<f32>> {
    let parameters: BTreeMap<String, TensorData> = model.tensors().into_iter().collect();
    let mut tensors = BTreeMap::new();
    for entry in config.table().entries {
        let count: usize = entry.shape.iter().product();
        let tensor: &mut Vec<f32> = tensors.entry(entry.key).or_insert_with(|| vec![f32::NAN; count]);
        let total = entry.shape[0];
        let (rows, width) = (entry.rows.unwrap_or(Rows::run(0, total, total)), count / total);
        let values: Vec<f32> = parameters[&entry.path].iter::<f32>().collect();
        for (start, run) in rows.starts().zip(values.chunks(rows.len * width)) {
            tensor[start * width..][..run.len()].copy_from_slice(run);
        }
    }
    tensors
}

/// Reads parameters from those tensors, by the table.
struct FromFile<'a>(&'a DecoderConfig, BTreeMap<String, Vec<f32>>);

impl ParamSource for FromFile<'_> {
    fn param(&mut self, spec: &ParamSpec) -> TensorData {
        let table = self.0.table();
        let entry = table.by_path(&spec.path).unwrap();
        let (tensor, total) = (&self.1[&entry.key], entry.shape[0]);
        let (rows, width) = (entry.rows.unwrap_or(Rows::run(0, total, total)), tensor.len() / total);
        let values: Vec<f32> = rows.starts().flat_map(|start| tensor[start * width..(start + rows.len) * width].to_vec()).collect();
        TensorData::new(values, spec.shape.clone())
    }
}

/// The parameters of a model, and zeros for those that it lacks.
struct OrZeros(BTreeMap<String, TensorData>, usize);

impl ParamSource for OrZeros {
    fn param(&mut self, spec: &ParamSpec) -> TensorData {
        let zeros = TensorData::new(vec![0f32; spec.len()], spec.shape.clone());
        self.0.remove(&spec.path).unwrap_or_else(|| {
            self.1 += 1;
            zeros
        })
    }
}

fn logits(model: &Decoder<B>) -> Vec<f32> {
    let ids = ids(7, 2 * 9, 61);
    floats(model.forward(tensor(&ids, [2, 9], &device()), None, &Layout::full(2, 9)).0)
}

#[test]
fn the_page_and_the_example_are_the_same_text() {
    let own = include_str!("add_a_family.rs");
    let example = own.split_once("// The example begins.\n").unwrap().1.split_once("// The example ends.\n").unwrap().0;
    let page = include_str!("../models/README.md");
    let blocks = page.split("```rust\n").skip(1).map(|rest| rest.split_once("```").unwrap().0);
    let lines = |text: &str| text.lines().filter(|line| !line.is_empty()).map(str::to_string).collect::<Vec<_>>();
    let page = lines(&blocks.collect::<String>());
    let example = lines(&example.replace("terrarium::models::", "crate::"));
    for (page, example) in page.iter().zip(&example) {
        assert_eq!(page, example, "models/README.md differs from tests/add_a_family.rs");
    }
    assert_eq!(page.len(), example.len());
}

#[test]
fn its_configuration_reads_and_writes() {
    let config = QWEN2.read(&keys("qwen2")).unwrap();
    assert_eq!((config.pattern().as_str(), config.tie_embeddings), ("*-*-", true));
    let Value::Object(json) = config.to_json() else { panic!("an object") };
    assert_eq!(json["architectures"], json!(["Qwen2ForCausalLM"]));
    assert!(QWEN2.read(&json).unwrap().computes_as(&config));
    assert!(json.keys().all(|key| QWEN2.keys().contains(&key.as_str())));
    let windowed = json!({ "use_sliding_window": true });
    let message = QWEN2.read(windowed.as_object().unwrap()).unwrap_err().to_string();
    assert!(message.contains("use_sliding_window"), "{message}");
    for preset in QWEN2.presets() {
        let config = QWEN2.read(preset.config.as_object().unwrap()).unwrap();
        assert_eq!(config.parameters(), preset.parameters, "{}", preset.name);
    }
}

#[test]
fn its_tables_cover_every_row_once_and_carry_weights_both_ways() {
    for family in [&QWEN2 as &'static dyn Family, &STACKED, &INTERLEAVED] {
        let config = family.read(&keys("qwen2")).unwrap();
        let model = model::<B>(&config, 3, &device());
        let tensors = file(&config, &model);
        let (cells, wrong): (usize, usize) = tensors.values().flatten().fold((0, 0), |(n, bad), v| (n + 1, bad + usize::from(v.is_nan())));
        assert_eq!((cells, wrong), (config.parameters(), 0), "{family}: each cell of the file belongs to one parameter");
        let again: Decoder<B> = Decoder::build(&config, &mut FromFile(&config, tensors), DType::F32, &device());
        assert_eq!(model.tensors(), again.tensors(), "{family}");
    }
}

#[test]
fn without_biases_it_computes_what_a_llama_does() {
    let llama = DecoderConfig::from_value(Value::Object(keys("llama"))).unwrap();
    let config = QWEN2.read(&keys("qwen2")).unwrap();
    assert!(!config.computes_as(&llama));
    let reference = model::<B>(&llama, 5, &device());
    let mut source = OrZeros(reference.tensors().into_iter().collect(), 0);
    let same: Decoder<B> = Decoder::build(&config, &mut source, DType::F32, &device());
    assert_eq!(source.1, 2 * 3, "three biases per layer");
    assert!(source.0.is_empty(), "every weight of the Llama has its place");
    assert_close("logits", &logits(&same), &logits(&reference), 1e-6);
    // A model with biases is another model: no layout without them can say what it is.
    assert!(config.in_family(llama.family).is_err());
}
