//! Chat templates: Jinja as transformers runs it.

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value as Template};
use minijinja::{Environment, ErrorKind, context};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Tokenizer, read_map};
use crate::error::TokenizerError;
use crate::{Error, Result};

/// One message of a chat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or what the template knows.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Tokenizer {
    /// Whether chats can be rendered.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// The chat template.
    pub fn chat_template(&self) -> Option<&str> {
        self.template.as_deref()
    }

    /// Sets the chat template, to be saved with the tokenizer.
    pub fn set_chat_template(&mut self, template: &str) {
        self.template = Some(template.into());
    }

    /// The text of a chat; with `add_generation_prompt`, up to where the model's answer begins. It holds its special
    /// tokens already: encode it without adding more.
    pub fn chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let template = self.template.as_deref().ok_or(TokenizerError::NoTemplate)?;
        let messages: Vec<Template> =
            messages.iter().map(|m| Template::from_pairs([("role", m.role.as_str()), ("content", m.content.as_str())])).collect();
        let text = |role: &Option<super::special::Role>| role.as_ref().map(|r| r.text.clone());
        let special = &self.special;
        let values = context! {
            messages => messages,
            add_generation_prompt => add_generation_prompt,
            bos_token => text(&special.bos).unwrap_or_default(),
            eos_token => text(&special.eos).unwrap_or_default(),
            pad_token => text(&special.pad).unwrap_or_default(),
            unk_token => text(&special.unk).unwrap_or_default(),
            tools => Template::from(()),
            documents => Template::from(()),
        };
        let rendered = environment().render_str(template, values);
        rendered.map_err(|e| TokenizerError::Template(explain(&e)).into())
    }
}

/// Jinja set up as transformers does: blocks take their line with them, Python's string methods work, JSON is not
/// escaped for HTML.
fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        env.set_syntax(syntax);
    }
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_filter("tojson", |value: Template, options: Kwargs| -> Result<Template, minijinja::Error> {
        let indent: Option<usize> = options.get("indent")?;
        let json = serde_json::to_value(&value)
            .and_then(|v| if indent.is_some() { serde_json::to_string_pretty(&v) } else { Ok(python_json(&v)) });
        json.map(Template::from_safe_string).map_err(|e| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string()))
    });
    env
}

/// JSON with the blanks of Python's `json.dumps`.
fn python_json(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("[{}]", items.iter().map(python_json).collect::<Vec<_>>().join(", ")),
        Value::Object(map) => {
            let pairs = map.iter().map(|(k, v)| format!("{}: {}", Value::from(k.as_str()), python_json(v)));
            format!("{{{}}}", pairs.collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}

/// The error with the causes that the template library keeps behind it.
fn explain(error: &minijinja::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

/// The template of a model directory: a file of its own, or inside tokenizer_config.json.
pub(super) fn find_template(dir: &Path, config: &Map<String, Value>) -> Result<Option<String>> {
    let file = dir.join("chat_template.jinja");
    if file.is_file() {
        return std::fs::read_to_string(&file).map(Some).map_err(Error::io("read", &file));
    }
    let other = read_map(&dir.join("chat_template.json"))?;
    Ok([config, &other].into_iter().find_map(|map| template_of(map.get("chat_template")?)))
}

/// A text, or a list of named ones of which `default` counts.
fn template_of(value: &Value) -> Option<String> {
    let Value::Array(named) = value else { return value.as_str().map(String::from) };
    let name = |t: &&Value| t.get("name").and_then(Value::as_str) == Some("default");
    let chosen = named.iter().find(name).or(named.first())?;
    chosen.get("template")?.as_str().map(String::from)
}
