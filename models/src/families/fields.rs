//! Reading configuration keys, with their aliases, into checked values.

use serde_json::{Map, Value};

use crate::config::ConfigError;
use crate::layers::{RopeConfig, RopeScaling};
use crate::mixers::Activation;

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

impl<'a> Fields<'a> {
    /// Reads keys of `map` for `family`.
    pub fn new(family: &'static str, map: &'a Map<String, Value>) -> Self {
        Self { family, map }
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

    /// A required positive size.
    ///
    /// # Errors
    /// When it is absent or no size.
    pub fn size(&self, keys: &[&'static str]) -> Result<usize, ConfigError> {
        self.maybe_size(keys)?.ok_or(ConfigError::Missing { family: self.family, key: keys[0] })
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

    /// An activation by name.
    ///
    /// # Errors
    /// When it is not known.
    pub fn activation(&self, keys: &[&str], default: Activation) -> Result<Activation, ConfigError> {
        let Some((key, value)) = self.get(keys) else { return Ok(default) };
        let known = value.as_str().and_then(Activation::from_name);
        known.ok_or_else(|| self.wrong(key, "one of silu, gelu, gelu_new, gelu_pytorch_tanh, relu2", value))
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
        let theta = inner.float(&["rope_theta"], self.float(&["rope_theta"], 10_000.0)?)?;
        let factor = inner.float(&["partial_rotary_factor"], self.float(&["partial_rotary_factor"], partial)?)?;
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

    /// Checks that `divisor` divides `value`.
    ///
    /// # Errors
    /// When it does not.
    pub fn divides(&self, what: &str, value: usize, by: &str, divisor: usize) -> Result<(), ConfigError> {
        if value.is_multiple_of(divisor) { Ok(()) } else { Err(self.wrong(what, format!("a multiple of {by} = {divisor}"), value)) }
    }
}
