//! `terrarium score`

use std::path::{Path, PathBuf};

use clap::Args;
use terrarium::kernels::TrainBackend;
use terrarium::kernels::backend::{BackendTask, with_backend};
use terrarium::runtime::{self, InputError, Loaded, ScoreInput, ScoreOptions};

use crate::args::{ComputeArgs, DtypeArgs, TokenizerArgs};
use crate::console::Console;
use crate::failure::Failure;
use crate::model::{self, ModelArgs, Source};
use crate::{interrupt, output, progress};

/// Log-probabilities of given tokens.
///
/// Natural logarithms, float32. Each line of the input is {"ids": [..]}, whose tokens after the first are scored, or {"context": "..",
/// "continuation": ".."}, tokenised together, whose continuation is scored. Each line of the output is {"tokens": [..],
/// "logprobs": [..], "greedy": [..], "sum": x}, in the order of the input. Ids need no tokenizer.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  echo '{\"context\": \"The capital of France is\", \"continuation\": \" Paris\"}' > q.jsonl\n  \
    terrarium score --model HuggingFaceTB/SmolLM2-135M --input q.jsonl --top 3")]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    tokenizer: TokenizerArgs,
    /// A .jsonl file; - is standard input.
    #[arg(short, long, value_name = "F.jsonl")]
    input: PathBuf,
    /// Add the K best tokens of each position.
    #[arg(long, default_value_t = 0, value_name = "K")]
    top: usize,
    /// Tokens computed at once; more is faster and takes more memory.
    #[arg(long, value_name = "N")]
    batch_tokens: Option<usize>,
    #[command(flatten)]
    dtype: DtypeArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Accepted for symmetry: the output is JSON in any case.
    #[arg(long)]
    json: bool,
}

/// Lines scored between two outputs.
const GROUP: usize = 256;

/// Scores, prints.
pub fn run(arguments: &Arguments, console: &Console) -> Result<(), Failure> {
    interrupt::immediate();
    model::prepare(&arguments.compute)?;
    let (lines, inputs) = inputs(&arguments.input)?;
    let source = arguments.model.source(&arguments.tokenizer, console)?;
    with_backend(&arguments.compute.device, Task { arguments, console, lines, inputs, source: &source })?
}

fn inputs(file: &Path) -> Result<(Vec<usize>, Vec<ScoreInput>), Failure> {
    let text = super::read_input(file)?;
    let mut parsed = (Vec::new(), Vec::new());
    for (line, text) in super::lines(&text) {
        let input = serde_json::from_str(text).map_err(|error| Failure::Line {
            file: file.display().to_string(),
            line,
            reason: format!("expected {{\"ids\": [..]}} or {{\"context\": \"..\", \"continuation\": \"..\"}}: {error}"),
        })?;
        parsed.0.push(line);
        parsed.1.push(input);
    }
    if parsed.0.is_empty() {
        return Err(Failure::usage(format!("{} holds nothing to score", file.display())));
    }
    Ok(parsed)
}

struct Task<'a> {
    arguments: &'a Arguments,
    console: &'a Console,
    /// Line of each input.
    lines: Vec<usize>,
    inputs: Vec<ScoreInput>,
    source: &'a Source,
}

impl BackendTask for Task<'_> {
    type Output = Result<(), Failure>;

    fn run<B: TrainBackend>(self, device: &B::Device) -> Self::Output {
        let Self { arguments, console, lines, inputs, source } = self;
        let loaded = model::load::<B::InnerBackend>(source, arguments.dtype.dtype.into(), &arguments.model.hub, console, device)?;
        let Loaded { model, config, tokenizer, .. } = &loaded;
        model::require_fused::<B::InnerBackend>(config, loaded.dtype)?;
        let mut options = ScoreOptions { top: arguments.top, ..ScoreOptions::default() };
        options.batch_tokens = arguments.batch_tokens.unwrap_or(options.batch_tokens);
        let bar = progress::items(console, "scored", inputs.len());
        for (lines, inputs) in lines.chunks(GROUP).zip(inputs.chunks(GROUP)) {
            let scores = runtime::score(model, config, tokenizer.as_ref(), inputs, &options, device)
                .map_err(|error| name_line(error, &arguments.input, lines))?;
            for score in &scores {
                output::json(score)?;
            }
            bar.inc(scores.len() as u64);
        }
        bar.finish_and_clear();
        Ok(())
    }
}

/// Errors of one input name its line.
fn name_line(error: runtime::Error, file: &Path, lines: &[usize]) -> Failure {
    let row = match &error {
        runtime::Error::Input(InputError::IdRange { row, .. } | InputError::Empty { row } | InputError::NoTokenizer { row }) => *row,
        _ => return error.into(),
    };
    let Some(&line) = lines.get(row) else { return error.into() };
    // The library counts inputs, the user counts lines.
    let text = error.to_string();
    let reason = text.strip_prefix(&format!("input {row}")).map_or(text.clone(), |rest| rest.trim_start_matches([':', ' ']).to_string());
    Failure::Line { file: file.display().to_string(), line, reason }
}
