//! The README.md of a saved model: the card that the hub shows.

use std::path::Path;

use terrarium_models::DecoderConfig;

/// A model card with the YAML header the hub reads.
pub(super) fn card(dir: &Path, config: &DecoderConfig, base_model: Option<&str>) -> String {
    let name = dir.file_name().and_then(|n| n.to_str()).unwrap_or("model");
    let mut text = String::from("---\n");
    if config.family.in_transformers() {
        text.push_str("library_name: transformers\n");
    }
    text.push_str("pipeline_tag: text-generation\ntags:\n- terrarium\n");
    text.push_str(&format!("- {}\n", config.family));
    // Only a hub name may stand here: the hub refuses a card whose base model is a folder.
    let hub_name = base_model.map(|name| name.split('@').next().unwrap_or(name)).filter(|name| crate::hub::RepoId::parse(name).is_ok());
    if let Some(base) = hub_name {
        text.push_str(&format!("base_model: {base}\n"));
    }
    text.push_str(&format!("---\n\n# {name}\n\nWritten by terrarium."));
    if let Some(base) = base_model {
        text.push_str(&format!(" Made from `{base}`."));
    }
    text.push_str("\n\n| | |\n|---|---|\n");
    let rows = [
        ("family", config.family.to_string()),
        ("layers", format!("`{}`", config.pattern())),
        ("width", config.hidden_size.to_string()),
        ("vocabulary", config.vocab_size.to_string()),
        ("parameters", config.parameters().to_string()),
    ];
    for (key, value) in rows {
        text.push_str(&format!("| {key} | {value} |\n"));
    }
    text.push_str(&format!("\n```sh\nterrarium generate --model {name} --prompt \"Once upon a time\"\n```\n"));
    text
}
