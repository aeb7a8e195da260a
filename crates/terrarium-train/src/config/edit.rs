//! Reading, overriding, writing and comparing configurations.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::RunConfig;

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not TOML, or a key or value that is not known.
    #[error("configuration: {0}")]
    Toml(String),
    /// An override without `=` or with an impossible key.
    #[error("override `{0}`: expected KEY=VALUE, as in train.lr=1e-3")]
    Override(String),
    /// A value that breaks a rule.
    #[error("configuration key {key}: {reason}")]
    Value {
        /// The key.
        key: String,
        /// The rule.
        reason: String,
    },
}

/// Keys that change nothing about the numbers of a run.
const FREE: [&str; 7] =
    ["train.gradient_checkpointing", "train.keep", "train.save_every", "train.log_every", "train.epochs", "output.weights", "output.dtype"];

impl RunConfig {
    /// Reads TOML text, then applies `overrides` (`train.lr=1e-3`).
    ///
    /// # Errors
    /// [`ConfigError`] names the key or the line.
    pub fn from_toml(text: &str, overrides: &[String]) -> Result<Self, ConfigError> {
        let mut table: toml::Table = text.parse().map_err(|error: toml::de::Error| ConfigError::Toml(error.to_string()))?;
        for assignment in overrides {
            assign(&mut table, assignment)?;
        }
        Self::from_table(table)
    }

    /// Reads a file; relative paths in it are relative to its folder.
    ///
    /// # Errors
    /// [`ConfigError`] names the key or the line.
    pub fn from_file(path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })?;
        // Paths in the file belong to the file's folder, those in overrides to the shell's.
        let mut config = Self::from_toml(&text, &[])?;
        config.anchor(path.parent().unwrap_or(Path::new("")));
        for assignment in overrides {
            config.set(assignment)?;
        }
        Ok(config)
    }

    /// Applies one `KEY=VALUE`. The value is TOML; what is not TOML is taken as a string.
    ///
    /// # Errors
    /// [`ConfigError`] for an unknown key or a value of the wrong kind.
    pub fn set(&mut self, assignment: &str) -> Result<(), ConfigError> {
        let mut table = toml::Table::try_from(&*self).map_err(|error| ConfigError::Toml(error.to_string()))?;
        assign(&mut table, assignment)?;
        *self = Self::from_table(table)?;
        Ok(())
    }

    fn from_table(table: toml::Table) -> Result<Self, ConfigError> {
        table.try_into().map_err(|error: toml::de::Error| ConfigError::Toml(error.to_string().trim().to_string()))
    }

    /// TOML text with every default filled in.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("a configuration is always expressible in TOML")
    }

    /// The same as JSON, for comparison.
    pub fn to_json(&self) -> Value {
        serde_json::to_value(self).expect("a configuration is always expressible in JSON")
    }
}

/// Puts `a.b=value` into a table, making sections as needed.
fn assign(table: &mut toml::Table, assignment: &str) -> Result<(), ConfigError> {
    let bad = || ConfigError::Override(assignment.to_string());
    let (key, value) = assignment.split_once('=').ok_or_else(bad)?;
    let mut parts: Vec<&str> = key.trim().split('.').collect();
    let last = parts.pop().filter(|last| !last.is_empty()).ok_or_else(bad)?;
    let mut section = table;
    for part in parts {
        let entry = section.entry(part.to_string()).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        section = entry.as_table_mut().ok_or_else(bad)?;
    }
    let parsed = format!("value = {}", value.trim()).parse::<toml::Table>().ok().and_then(|mut parsed| parsed.remove("value"));
    let mut value = parsed.unwrap_or_else(|| toml::Value::String(value.trim().to_string()));
    // A single path where a list is expected is a list of one.
    if matches!(last, "train" | "valid") && key.trim().starts_with("data.") && value.is_str() {
        value = toml::Value::Array(vec![value]);
    }
    section.insert(last.to_string(), value);
    Ok(())
}

/// Keys in which `new` differs from `old` in a way that forbids resuming, with both values.
pub fn changed_keys(old: &Value, new: &Value) -> Vec<String> {
    let mut changed = Vec::new();
    compare("", old, new, &mut changed);
    changed
}

fn compare(key: &str, old: &Value, new: &Value, changed: &mut Vec<String>) {
    if let (Value::Object(a), Value::Object(b)) = (old, new) {
        let missing = b.keys().filter(|name| !a.contains_key(*name));
        for name in a.keys().chain(missing) {
            let child = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
            compare(&child, a.get(name).unwrap_or(&Value::Null), b.get(name).unwrap_or(&Value::Null), changed);
        }
        return;
    }
    let raised = key == "train.steps" && new.as_u64() >= old.as_u64();
    // 1 and 1.0 are the same number.
    let same = old == new || (old.is_number() && old.as_f64() == new.as_f64());
    if !same && !raised && !FREE.contains(&key) {
        changed.push(format!("{key} ({old} then, {new} now)"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "[base]\nmodel = \"org/name\"\n[data]\ntrain = [\"a.jsonl\"]\n[lora]\nrank = 4\n";

    #[test]
    fn overrides_reach_every_section_and_fill_in_defaults() {
        let config = RunConfig::from_toml(TEXT, &["train.lr=1e-3".into(), "lora.targets=ssm".into(), "data.train=b.txt".into()]).unwrap();
        assert_eq!(config.train.lr, 1e-3);
        assert_eq!(config.lora.as_ref().unwrap().targets, "ssm");
        assert_eq!(config.data.train, vec![PathBuf::from("b.txt")]);
        assert_eq!(RunConfig::from_toml(&config.to_toml(), &[]).unwrap(), config);
    }

    #[test]
    fn unknown_keys_and_broken_overrides_are_named() {
        let unknown = RunConfig::from_toml(TEXT, &["train.lrr=1".into()]).unwrap_err().to_string();
        assert!(unknown.contains("lrr"), "{unknown}");
        assert!(RunConfig::from_toml(TEXT, &["train.lr".into()]).unwrap_err().to_string().contains("train.lr"));
        let wrong = RunConfig::from_toml(TEXT, &["train.steps=many".into()]).unwrap_err().to_string();
        assert!(wrong.contains("steps"), "{wrong}");
    }

    #[test]
    fn rules_name_their_key() {
        let mut config = RunConfig::from_toml(TEXT, &["train.batch=0".into()]).unwrap();
        assert!(config.check().unwrap_err().to_string().contains("train.batch"));
        config.train.batch = 1;
        config.check().unwrap();
        config.base = None;
        assert!(config.check().is_err());
    }

    #[test]
    fn only_steps_may_grow_between_runs() {
        let old = RunConfig::from_toml(TEXT, &[]).unwrap();
        let mut new = old.clone();
        new.train.steps += 10;
        new.train.keep = 9;
        assert!(changed_keys(&old.to_json(), &new.to_json()).is_empty());
        new.train.lr = 1.0;
        new.train.steps = 1;
        let keys = changed_keys(&old.to_json(), &new.to_json());
        assert_eq!(keys.len(), 2, "{keys:?}");
        assert!(keys.iter().any(|key| key.starts_with("train.lr (0.0003 then, 1.0 now)")), "{keys:?}");
    }
}
