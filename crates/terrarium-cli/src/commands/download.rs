//! `terrarium download`

use clap::Args;
use serde_json::json;
use terrarium::runtime::Files;

use crate::args::HubArgs;
use crate::console::Console;
use crate::failure::Failure;
use crate::{interrupt, model, output};

/// Fetch a model into the Hugging Face cache.
///
/// Files go where Python's huggingface_hub keeps them (HF_HOME, HF_HUB_CACHE) and are shared with it. A download that
/// was cut off goes on where it stopped. Prints the directory.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  terrarium download HuggingFaceTB/SmolLM2-135M")]
pub struct Arguments {
    /// Model on the hub, with an optional branch, tag or commit.
    #[arg(value_name = "ORG/NAME[@REV]", required_unless_present = "model")]
    name: Option<String>,
    /// The same as a flag.
    #[arg(short, long, value_name = "ORG/NAME[@REV]", conflicts_with = "name")]
    model: Option<String>,
    /// Configuration and tokenizer only.
    #[arg(long)]
    metadata: bool,
    #[command(flatten)]
    hub: HubArgs,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Fetches, prints where.
pub fn run(arguments: &Arguments, console: &Console) -> Result<(), Failure> {
    interrupt::immediate();
    let name = arguments.name.as_deref().or(arguments.model.as_deref());
    let files = if arguments.metadata { Files::Metadata } else { Files::All };
    let resolved = model::resolve(name, files, &arguments.hub, console)?;
    if arguments.json {
        return output::json(&json!({
            "dir": resolved.dir,
            "repo": resolved.repo.as_ref().map(|repo| &repo.id),
            "revision": resolved.repo.as_ref().map(|repo| &repo.revision),
            "commit": resolved.commit,
            "downloaded": resolved.downloaded,
        }));
    }
    if resolved.downloaded.is_empty() {
        console.note("nothing to fetch: all files are there");
    }
    output::line(resolved.dir.display())
}
