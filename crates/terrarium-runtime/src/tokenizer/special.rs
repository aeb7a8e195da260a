//! Special tokens as tokenizer_config.json and special_tokens_map.json name them.

use serde_json::{Map, Value};

use super::Tokenizer;

/// A token with a role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Role {
    pub(super) text: String,
    pub(super) id: u32,
}

/// The tokens with a role.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Special {
    pub(super) bos: Option<Role>,
    pub(super) eos: Option<Role>,
    pub(super) pad: Option<Role>,
    pub(super) unk: Option<Role>,
}

impl Special {
    /// The first configuration that names a token decides. A name that the vocabulary lacks is as good as none.
    pub(super) fn from_configs(tokenizer: &Tokenizer, configs: &[&Map<String, Value>]) -> Self {
        let role = |key: &str| {
            let text = configs.iter().find_map(|map| text_of(map.get(key)?))?;
            Self::role(tokenizer, &text)
        };
        Self { bos: role("bos_token"), eos: role("eos_token"), pad: role("pad_token"), unk: role("unk_token") }
    }

    /// These tokens, and those of `other` where there is none.
    pub(super) fn or(self, other: Self) -> Self {
        Self { bos: self.bos.or(other.bos), eos: self.eos.or(other.eos), pad: self.pad.or(other.pad), unk: self.unk.or(other.unk) }
    }

    pub(super) fn role(tokenizer: &Tokenizer, text: &str) -> Option<Role> {
        tokenizer.id(text).map(|id| Role { text: text.to_string(), id })
    }

    pub(super) fn to_map(&self) -> Map<String, Value> {
        let roles = [("bos_token", &self.bos), ("eos_token", &self.eos), ("pad_token", &self.pad), ("unk_token", &self.unk)];
        roles.into_iter().filter_map(|(key, role)| Some((key.to_string(), Value::from(role.as_ref()?.text.clone())))).collect()
    }
}

/// Written as the text itself, or as an object with the text as `content`.
fn text_of(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(String::from)
}
