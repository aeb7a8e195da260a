//! Reading configuration keys, with their aliases, into checked values.

use serde_json::{Map, Value};

use crate::config::ConfigError;
use crate::layers::{RopeConfig, RopeScaling};
use crate::mixers::{Activation, AttentionConfig, Mamba2Config, MlpConfig};

/// Keys that transformers writes for every family.
pub const COMMON_KEYS: [&str; 24] = [
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "tie_word_embeddings",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "initializer_range",
    "use_cache",
    "max_position_embeddings",
    "_name_or_path",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "is_encoder_decoder",
    "problem_type",
    "auto_map",
];

/// Parses JSON in which `Infinity`, `-Infinity` and `NaN` may stand bare, as Python writes them.
///
/// # Errors
/// [`ConfigError::Json`] with the parser's message.
pub fn parse_lenient(text: &str) -> Result<Value, ConfigError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    serde_json::from_str(&quote_bare_numbers(text)).map_err(|error| ConfigError::Json(error.to_string()))
}

/// Replaces bare `Infinity`, `-Infinity`, `NaN` outside strings by the object that transformers 5 writes for them.
fn quote_bare_numbers(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut in_string = false;
    while let Some(c) = rest.chars().next() {
        let bare = ["-Infinity", "Infinity", "NaN"].into_iter().find(|word| !in_string && rest.starts_with(word));
        if let Some(word) = bare {
            out.push_str(&format!("{{\"__float__\":\"{word}\"}}"));
            rest = &rest[word.len()..];
            continue;
        }
        if in_string && c == '\\' {
            let taken = rest.char_indices().nth(2).map_or(rest.len(), |(at, _)| at);
            out.push_str(&rest[..taken]);
            rest = &rest[taken..];
            continue;
        }
        in_string ^= c == '"';
        out.push(c);
        rest = &rest[c.len_utf8()..];
    }
    out
}

/// The object in `value`.
///
/// # Errors
/// [`ConfigError::Json`] when it is something else.
pub fn object(value: Value) -> Result<Map<String, Value>, ConfigError> {
    match value {
        Value::Object(map) => Ok(map),
        other => Err(ConfigError::Json(format!("expected an object, found {}", kind(&other)))),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// A number, also in the forms for infinity.
fn number(value: &Value) -> Option<f64> {
    let spelled = value.as_object().and_then(|object| object.get("__float__")).and_then(Value::as_str);
    match spelled {
        Some("Infinity") => Some(f64::INFINITY),
        Some("-Infinity") => Some(f64::NEG_INFINITY),
        Some(_) => None,
        None => value.as_f64(),
    }
}

/// A pair of limits such as `time_step_limit`.
pub fn limits(value: &Value) -> Option<(f32, f32)> {
    match value.as_array()?.as_slice() {
        [low, high] => Some((number(low)? as f32, number(high)? as f32)),
        _ => None,
    }
}

/// Keys of one configuration. Every reader takes the key and its aliases, first match wins; `null` counts as absent.
pub struct Fields<'a> {
    family: &'static str,
    map: &'a Map<String, Value>,
}

/// Largest size that a configuration may ask for: beyond it, products of sizes could overflow.
const MAX_SIZE: u64 = 1 << 31;

/// Largest number of layers.
const MAX_LAYERS: usize = 1 << 16;

impl<'a> Fields<'a> {
    /// Reads keys of `map` for `family`.
    pub fn new(family: &'static str, map: &'a Map<String, Value>) -> Self {
        Self { family, map }
    }

    /// All keys.
    pub fn map(&self) -> &'a Map<String, Value> {
        self.map
    }

    /// The first of `keys` that is present and not null.
    pub fn get(&self, keys: &[&str]) -> Option<(String, &'a Value)> {
        keys.iter().find_map(|key| self.map.get(*key).filter(|value| !value.is_null()).map(|value| (key.to_string(), value)))
    }

    /// An error about a key's value.
    pub fn wrong(&self, key: impl Into<String>, expected: impl Into<String>, found: impl ToString) -> ConfigError {
        ConfigError::Value { family: self.family, key: key.into(), expected: expected.into(), found: found.to_string() }
    }

    /// An optional positive size.
    ///
    /// # Errors
    /// When it is present and no size.
    pub fn maybe_size(&self, keys: &[&str]) -> Result<Option<usize>, ConfigError> {
        let Some((key, value)) = self.get(keys) else { return Ok(None) };
        match value.as_u64() {
            Some(size @ 1..MAX_SIZE) => Ok(Some(size as usize)),
            _ => Err(self.wrong(key, format!("an integer in 1..{MAX_SIZE}"), value)),
        }
    }

    /// A size that may be zero, zero when it is absent.
    ///
    /// # Errors
    /// When it is present and no size.
    pub fn count(&self, keys: &[&str]) -> Result<usize, ConfigError> {
        match self.get(keys) {
            Some((_, value)) if value.as_u64() == Some(0) => Ok(0),
            _ => Ok(self.maybe_size(keys)?.unwrap_or(0)),
        }
    }

    /// A required positive size.
    ///
    /// # Errors
    /// When it is absent or no size.
    pub fn size(&self, keys: &[&'static str]) -> Result<usize, ConfigError> {
        self.maybe_size(keys)?.ok_or(ConfigError::Missing { family: self.family, key: keys[0] })
    }

    /// A required number of layers: what is larger than any model would take memory before anything else is looked at.
    ///
    /// # Errors
    /// When it is absent, no number, or absurd.
    pub fn layers(&self, keys: &[&'static str]) -> Result<usize, ConfigError> {
        let layers = self.size(keys)?;
        if layers > MAX_LAYERS {
            return Err(self.wrong(keys[0], format!("at most {MAX_LAYERS} layers"), layers));
        }
        Ok(layers)
    }

    /// A positive size with a default.
    ///
    /// # Errors
    /// When it is present and no size.
    pub fn size_or(&self, keys: &[&str], default: usize) -> Result<usize, ConfigError> {
        Ok(self.maybe_size(keys)?.unwrap_or(default))
    }

    /// A flag with a default.
    ///
    /// # Errors
    /// When it is present and no boolean.
    pub fn flag(&self, keys: &[&str], default: bool) -> Result<bool, ConfigError> {
        let Some((key, value)) = self.get(keys) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.wrong(key, "true or false", value))
    }

    /// A number with a default.
    ///
    /// # Errors
    /// When it is present and no number.
    pub fn float(&self, keys: &[&str], default: f64) -> Result<f64, ConfigError> {
        let Some((key, value)) = self.get(keys) else { return Ok(default) };
        number(value).ok_or_else(|| self.wrong(key, "a number", value))
    }

    /// A string.
    ///
    /// # Errors
    /// When it is present and no string.
    pub fn text(&self, keys: &[&str]) -> Result<Option<&'a str>, ConfigError> {
        let Some((key, value)) = self.get(keys) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(key, "a string", value))
    }

    /// A list of strings.
    ///
    /// # Errors
    /// When it is present and no list of strings.
    pub fn texts(&self, keys: &[&str]) -> Result<Option<Vec<&'a str>>, ConfigError> {
        let Some((key, value)) = self.get(keys) else { return Ok(None) };
        let texts = value.as_array().and_then(|items| items.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
        texts.map(Some).ok_or_else(|| self.wrong(key, "a list of strings", value))
    }

    /// A list of layer indices below `count`.
    ///
    /// # Errors
    /// When it is present and no such list.
    pub fn indices(&self, keys: &[&str], count: usize) -> Result<Vec<usize>, ConfigError> {
        let Some((key, value)) = self.get(keys) else { return Ok(vec![]) };
        let read = |item: &Value| item.as_u64().map(|i| i as usize).filter(|i| *i < count);
        let indices = value.as_array().and_then(|items| items.iter().map(read).collect::<Option<Vec<_>>>());
        indices.ok_or_else(|| self.wrong(key, format!("a list of integers below {count}"), value))
    }

    /// A token id, or a list of them.
    ///
    /// # Errors
    /// When it is present and neither.
    pub fn tokens(&self, key: &str) -> Result<Vec<u32>, ConfigError> {
        let Some((key, value)) = self.get(&[key]) else { return Ok(vec![]) };
        let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match value {
            Value::Array(items) => items.iter().map(one).collect(),
            Value::Number(number) if number.as_i64() == Some(-1) => Some(vec![]),
            value => one(value).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.wrong(key, "a token id or a list of them", value))
    }

    /// An activation by its Hugging Face name.
    ///
    /// # Errors
    /// When it is not known.
    pub fn activation(&self, keys: &[&str], default: Activation) -> Result<Activation, ConfigError> {
        let Some((key, value)) = self.get(keys) else { return Ok(default) };
        match value.as_str() {
            Some("gelu") => Ok(Activation::Gelu),
            Some("gelu_new" | "gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
            Some("relu2") => Ok(Activation::Relu2),
            Some("silu" | "swish") => Ok(Activation::Silu),
            _ => Err(self.wrong(key, "one of silu, gelu, gelu_new, gelu_pytorch_tanh, relu2", value)),
        }
    }

    /// Refuses an activation of the state-space mixers that is not computed: all of them have SiLU.
    ///
    /// # Errors
    /// When another one is named.
    pub fn silu_only(&self, keys: &[&str]) -> Result<(), ConfigError> {
        match self.activation(keys, Activation::Silu)? {
            Activation::Silu => Ok(()),
            _ => Err(self.wrong(keys[0], "silu: no other activation of these mixers is supported", "another one")),
        }
    }

    /// Limits on the step size.
    ///
    /// # Errors
    /// When they are present and no pair of numbers in order.
    pub fn dt_limit(&self, keys: &[&str]) -> Result<(f32, f32), ConfigError> {
        let Some((key, value)) = self.get(keys) else { return Ok((0.0, f32::INFINITY)) };
        limits(value).filter(|(low, high)| low <= high).ok_or_else(|| self.wrong(key, "two numbers in order", value))
    }

    /// Rotary positions in the style of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`), over
    /// `partial` of the head's `head_dim` channels unless the file says otherwise.
    ///
    /// # Errors
    /// When a value is wrong or the kind of scaling is not known.
    pub fn rope(&self, head_dim: usize, partial: f64, dim_keys: &[&str]) -> Result<RopeConfig, ConfigError> {
        let empty = Map::new();
        let nested = self.get(&["rope_parameters", "rope_scaling"]).and_then(|(_, value)| value.as_object()).unwrap_or(&empty);
        let inner = Fields { family: self.family, map: nested };
        let theta = inner.float(&["rope_theta"], self.float(&["rope_theta", "rotary_emb_base"], 10_000.0)?)?;
        let factor = inner.float(&["partial_rotary_factor"], self.float(&["partial_rotary_factor", "rotary_pct"], partial)?)?;
        let dim = self.size_or(dim_keys, (head_dim as f64 * factor) as usize)?;
        if dim % 2 != 0 || dim > head_dim || dim == 0 || theta <= 0.0 {
            return Err(self.wrong(
                "rotary dimensions",
                format!("an even number up to head_dim = {head_dim}, a positive rope_theta"),
                format!("{dim}, {theta}"),
            ));
        }
        let scaling = match inner.text(&["rope_type", "type"])?.unwrap_or("default") {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: inner.float(&["factor"], 1.0)? },
            "llama3" => RopeScaling::Llama3 {
                factor: inner.float(&["factor"], 8.0)?,
                low: inner.float(&["low_freq_factor"], 1.0)?,
                high: inner.float(&["high_freq_factor"], 4.0)?,
                original: inner.float(&["original_max_position_embeddings"], 8192.0)?,
            },
            other => return Err(self.wrong("rope_type", "default, linear or llama3", other)),
        };
        Ok(RopeConfig { theta, dim, scaling })
    }

    /// The Mamba-2 mixer of hybrids whose keys begin with `mamba_` (Bamba, Granite 4).
    ///
    /// # Errors
    /// When a value is wrong or sizes do not divide.
    pub fn mamba2(&self, hidden_size: usize, norm_eps: f32) -> Result<Mamba2Config, ConfigError> {
        let inner = self.size_or(&["mamba_expand"], 2)? * hidden_size;
        let heads = self.size_or(&["mamba_n_heads"], 128)?;
        self.divides("mamba_expand * hidden_size", inner, "mamba_n_heads", heads)?;
        let head_dim = match self.get(&["mamba_d_head"]) {
            Some((_, value)) if value.as_str() == Some("auto") => inner / heads,
            _ => self.size_or(&["mamba_d_head"], inner / heads)?,
        };
        let groups = self.size_or(&["mamba_n_groups"], 1)?;
        self.divides("mamba_n_heads", heads, "mamba_n_groups", groups)?;
        Ok(Mamba2Config {
            heads,
            head_dim,
            groups,
            state: self.size_or(&["mamba_d_state"], 256)?,
            conv_kernel: self.size_or(&["mamba_d_conv"], 4)?,
            conv_bias: self.flag(&["mamba_conv_bias"], true)?,
            proj_bias: self.flag(&["mamba_proj_bias"], false)?,
            dt_limit: self.dt_limit(&["time_step_limit", "mamba_dt_limit"])?,
            chunk: self.size_or(&["mamba_chunk_size"], 256)?,
            norm_eps,
        })
    }

    /// Heads, key/value heads and head width, which all families with attention spell alike.
    ///
    /// # Errors
    /// When a value is wrong or sizes do not divide.
    pub fn heads(&self, hidden_size: usize) -> Result<(usize, usize, usize), ConfigError> {
        let heads = self.size(&["num_attention_heads"])?;
        let kv_heads = self.size_or(&["num_key_value_heads"], heads)?;
        self.divides("num_attention_heads", heads, "num_key_value_heads", kv_heads)?;
        let head_dim = match self.maybe_size(&["head_dim"])? {
            Some(head_dim) => head_dim,
            None => {
                self.divides("hidden_size", hidden_size, "num_attention_heads", heads)?;
                hidden_size / heads
            }
        };
        Ok((heads, kv_heads, head_dim))
    }

    /// Attention whose projections all have biases or none (`attention_bias`), with the rotary positions that `rope` reads for
    /// the width of a head.
    ///
    /// # Errors
    /// When a value is wrong or sizes do not divide.
    pub fn attention(
        &self,
        hidden_size: usize,
        rope: impl FnOnce(&Self, usize) -> Result<Option<RopeConfig>, ConfigError>,
    ) -> Result<AttentionConfig, ConfigError> {
        let (heads, kv_heads, head_dim) = self.heads(hidden_size)?;
        let bias = self.flag(&["attention_bias"], false)?;
        let rope = rope(self, head_dim)?;
        Ok(AttentionConfig { heads, kv_heads, head_dim, rope, scale: None, qkv_bias: bias, out_bias: bias, conv_kernel: None })
    }

    /// An MLP of width `intermediate_size`, with `hidden_act` and `mlp_bias`.
    ///
    /// # Errors
    /// When a value is missing or wrong.
    pub fn mlp(&self, activation: Activation, gated: bool) -> Result<MlpConfig, ConfigError> {
        Ok(MlpConfig {
            intermediate: self.size(&["intermediate_size"])?,
            activation: self.activation(&["hidden_act"], activation)?,
            gated,
            bias: self.flag(&["mlp_bias"], false)?,
        })
    }

    /// Indices of the attention layers of a hybrid, from a list of layer types or of indices.
    ///
    /// # Errors
    /// When a list is wrong.
    pub fn attention_layers(&self, layers: usize) -> Result<Vec<usize>, ConfigError> {
        let Some(types) = self.texts(&["layer_types", "layers_block_type"])? else {
            return self.indices(&["attn_layer_indices"], layers);
        };
        if types.len() != layers {
            return Err(self.wrong("layer_types", format!("{layers} entries"), types.len()));
        }
        let mut attends = Vec::new();
        for (i, kind) in types.iter().enumerate() {
            match *kind {
                "attention" | "full_attention" => attends.push(i),
                "mamba" | "mamba2" | "linear_attention" => {}
                other => return Err(self.wrong("layer_types", "mamba, linear_attention, attention or full_attention", other)),
            }
        }
        Ok(attends)
    }

    /// Checks that `divisor` divides `value`.
    ///
    /// # Errors
    /// When it does not.
    pub fn divides(&self, what: &str, value: usize, by: &str, divisor: usize) -> Result<(), ConfigError> {
        if value.is_multiple_of(divisor) { Ok(()) } else { Err(self.wrong(what, format!("a multiple of {by} = {divisor}"), value)) }
    }
}
