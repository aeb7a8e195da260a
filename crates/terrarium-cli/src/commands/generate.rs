//! `terrarium generate`

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use clap::{ArgGroup, Args};
use serde::{Deserialize, Serialize};
use terrarium::kernels::TrainBackend;
use terrarium::kernels::backend::{BackendTask, with_backend};
use terrarium::models::DecoderConfig;
use terrarium::runtime::tokenizer::Message;
use terrarium::runtime::{self, Finish, GenerateOptions, Generated, GenerationConfig, Loaded, Piece, Row, Sampling, Snapshot, Tokenizer};
use terrarium::train::StopFlag;

use crate::args::{ComputeArgs, DtypeArgs, TokenizerArgs};
use crate::console::Console;
use crate::failure::Failure;
use crate::model::{self, ModelArgs, Source};
use crate::{interrupt, output};

/// Continue a prompt.
///
/// New text goes to standard output as it comes, timings go to standard error. Several prompts run as one batch; each gives what it gives alone. Without --temperature the model's own
/// generation_config.json decides, and without one the likeliest token is taken.
#[derive(Debug, Args)]
#[command(
    group(ArgGroup::new("input").required(true).multiple(true).args(["prompt", "ids", "file", "load_state"])),
    after_help = "Examples:\n  terrarium generate --prompt 'Once upon a time' --max-new-tokens 100\n  \
        terrarium generate --model HuggingFaceTB/SmolLM2-135M -p 'The capital of France is' -n 8 --temperature 0 --json\n  \
        terrarium generate --file book.txt -n 0 --save-state book.state && terrarium generate --load-state book.state -n 50"
)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    tokenizer: TokenizerArgs,
    /// Text to continue; may be given several times.
    #[arg(short, long, value_name = "TEXT")]
    prompt: Vec<String>,
    /// Token ids to continue, separated by commas; may be given several times.
    #[arg(long, value_name = "5,17,3", value_parser = parse_ids)]
    ids: Vec<Ids>,
    /// A file with one prompt, or a .jsonl file with {"prompt": ..} or {"ids": [..]} on each line; - is standard input.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Treat each prompt as a user's message of the model's chat template.
    #[arg(long)]
    chat: bool,
    /// System message in front of each prompt.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// Most tokens to add [default: the model's own, else 128].
    #[arg(short = 'n', long, value_name = "N")]
    max_new_tokens: Option<usize>,
    /// 0 takes the likeliest token; higher is more random.
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Sample among the K likeliest tokens; 0 for all.
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Sample among the likeliest tokens that together have probability P.
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Divide the score of tokens seen before; 1 for off.
    #[arg(long, value_name = "R")]
    repetition_penalty: Option<f32>,
    /// Stop at this text, which is not printed; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on after the end-of-text token.
    #[arg(long)]
    ignore_eos: bool,
    /// Seed of sampling.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Read prompts in pieces of so many tokens, all prompts of a batch together; 0 reads them at once, which takes memory for all their
    /// tokens [default: 8192, on a CPU 2048].
    #[arg(long, value_name = "N")]
    prefill_chunk: Option<usize>,
    /// Save the model's state after the prompt and what was generated.
    #[arg(long, value_name = "FILE")]
    save_state: Option<PathBuf>,
    /// Go on from a saved state: a prompt that begins with its text is read from there on, and without a prompt its text is continued. The
    /// state of a Transformer serves up to where prompt and text part; that of any other model serves whole or not at all.
    #[arg(long, value_name = "FILE")]
    load_state: Option<PathBuf>,
    #[command(flatten)]
    dtype: DtypeArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Print {"ids": [new ids], "text": ".."} for each prompt; text is null without a tokenizer. With --load-state also {"reused": N}, the
    /// tokens of the prompt that were not read again.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone)]
struct Ids(Vec<u32>);

fn parse_ids(text: &str) -> Result<Ids, String> {
    let ids = text.split(',').map(|id| id.trim().parse().map_err(|_| format!("`{}` is not a token id", id.trim())));
    ids.collect::<Result<_, _>>().map(Ids)
}

/// One prompt, also as a line of a .jsonl file.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text { prompt: String },
    Ids { ids: Vec<u32> },
}

/// A line of `--json`.
#[derive(Debug, Serialize)]
struct Answer<'a> {
    ids: &'a [u32],
    text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reused: Option<usize>,
}

/// Generates, prints.
pub fn run(arguments: &Arguments, console: &Console) -> Result<(), Failure> {
    model::prepare(&arguments.compute)?;
    let prompts = prompts(arguments)?;
    let state = state(arguments, prompts.len())?;
    let source = arguments.model.source(&arguments.tokenizer, console)?;
    let stop = interrupt::graceful()?;
    with_backend(&arguments.compute.device, Task { arguments, console, prompts, state, source: &source, stop })?
}

/// The state to go on from.
fn state(arguments: &Arguments, prompts: usize) -> Result<Option<Arc<Snapshot>>, Failure> {
    let Arguments { save_state, load_state, .. } = arguments;
    if prompts > 1 && (save_state.is_some() || load_state.is_some()) {
        return Err(Failure::usage(format!("--save-state and --load-state go with one prompt, and there are {prompts}")));
    }
    if let Some(file) = save_state.as_ref().filter(|file| file.is_dir()) {
        return Err(Failure::usage(format!("--save-state {}: is a directory; name a file", file.display())));
    }
    Ok(load_state.as_deref().map(Snapshot::load).transpose()?.map(Arc::new))
}

fn prompts(arguments: &Arguments) -> Result<Vec<Prompt>, Failure> {
    let mut prompts: Vec<Prompt> = arguments.prompt.iter().map(|prompt| Prompt::Text { prompt: prompt.clone() }).collect();
    prompts.extend(arguments.ids.iter().map(|Ids(ids)| Prompt::Ids { ids: ids.clone() }));
    let Some(file) = &arguments.file else { return Ok(prompts) };
    let text = super::read_input(file)?;
    if file.extension().is_none_or(|extension| extension != "jsonl") {
        prompts.push(Prompt::Text { prompt: text });
        return Ok(prompts);
    }
    for (line, text) in super::lines(&text) {
        let prompt = serde_json::from_str(text).map_err(|error| Failure::Line {
            file: file.display().to_string(),
            line,
            reason: format!("expected {{\"prompt\": \"..\"}} or {{\"ids\": [..]}}: {error}"),
        })?;
        prompts.push(prompt);
    }
    if prompts.is_empty() {
        return Err(Failure::usage(format!("{} holds no prompt", file.display())));
    }
    Ok(prompts)
}

struct Task<'a> {
    arguments: &'a Arguments,
    console: &'a Console,
    prompts: Vec<Prompt>,
    state: Option<Arc<Snapshot>>,
    source: &'a Source,
    stop: StopFlag,
}

impl BackendTask for Task<'_> {
    type Output = Result<(), Failure>;

    fn run<B: TrainBackend>(self, device: &B::Device) -> Self::Output {
        let Self { arguments, console, prompts, state, source, stop } = self;
        let loaded = model::load::<B::InnerBackend>(source, arguments.dtype.dtype.into(), &arguments.model.hub, console, device)?;
        model::require_fused::<B::InnerBackend>(&loaded.config, loaded.dtype)?;
        let ids = prompts.iter().map(|prompt| encode(prompt, arguments, loaded.tokenizer.as_ref(), &loaded.config));
        let mut ids = ids.collect::<Result<Vec<_>, Failure>>()?;
        if ids.is_empty() {
            ids.extend(state.iter().map(|state| state.tokens.clone()));
        }
        let mut options = options(arguments, &loaded.generation);
        options.keep_state = arguments.save_state.is_some();
        options.from = state;
        let mut stream = Stream::new(!arguments.json && ids.len() == 1, loaded.tokenizer.is_some());
        let Loaded { model, config, tokenizer, .. } = &loaded;
        let generated = runtime::generate(model, config, tokenizer.as_ref(), &ids, &options, device, &mut |piece| {
            if stop.requested() { ControlFlow::Break(()) } else { stream.push(&piece) }
        })?;
        stream.finish()?;
        generated.notes.iter().for_each(|note| console.note(format_args!("note: {note}")));
        if !stream.live {
            print(&generated, arguments)?;
        }
        timings(&generated, console);
        if let (Some(file), Some(state)) = (&arguments.save_state, &generated.state) {
            state.save(file)?;
            let (tokens, size) = (state.tokens.len(), state.bytes() as f64 / 1e6);
            console.note(format_args!("state after {tokens} tokens ({size:.1} MB): {}", file.display()));
        }
        if generated.rows.iter().any(|row| matches!(row.finish, Finish::Cancelled)) { Err(Failure::Interrupted) } else { Ok(()) }
    }
}

fn encode(prompt: &Prompt, arguments: &Arguments, tokenizer: Option<&Tokenizer>, config: &DecoderConfig) -> Result<Vec<u32>, Failure> {
    let prompt = match prompt {
        Prompt::Ids { ids } => return Ok(ids.clone()),
        Prompt::Text { prompt } => prompt,
    };
    let tokenizer = tokenizer.ok_or(runtime::Error::Tokenizer(runtime::TokenizerError::None))?;
    if !arguments.chat {
        return Ok(runtime::prompt_ids(tokenizer, config, prompt)?);
    }
    let message = |role: &str, content: &str| Message { role: role.to_string(), content: content.to_string() };
    let mut messages: Vec<Message> = arguments.system.iter().map(|system| message("system", system)).collect();
    messages.push(message("user", prompt));
    Ok(tokenizer.encode(&tokenizer.chat(&messages, true)?, false)?)
}

/// Flags first, then generation_config.json, then greedy.
fn options(arguments: &Arguments, file: &GenerationConfig) -> GenerateOptions {
    let random = arguments.temperature.map_or(
        // Asking for a kind of sampling is asking for sampling.
        file.do_sample == Some(true) || arguments.top_k.is_some() || arguments.top_p.is_some(),
        |temperature| temperature != 0.0,
    );
    let temperature = if random { arguments.temperature.or(file.temperature).unwrap_or(1.0) } else { 0.0 };
    let mut options = GenerateOptions::new(arguments.max_new_tokens.or(file.max_new_tokens).unwrap_or(128));
    options.sampling = Sampling {
        temperature,
        top_k: arguments.top_k.or(file.top_k.filter(|_| random)).unwrap_or(0),
        top_p: arguments.top_p.or(file.top_p.filter(|_| random)).unwrap_or(1.0),
        repetition_penalty: arguments.repetition_penalty.or(file.repetition_penalty).unwrap_or(1.0),
    };
    options.seed = arguments.seed;
    options.stop = arguments.stop.clone();
    if !arguments.ignore_eos {
        options.eos = file.eos.clone();
    }
    options.prefill_chunk = arguments.prefill_chunk;
    options
}

/// One prompt's text as it comes; ids where there is no tokenizer.
struct Stream {
    live: bool,
    text: bool,
    any: bool,
    failure: Option<Failure>,
}

impl Stream {
    fn new(live: bool, text: bool) -> Self {
        Self { live, text, any: false, failure: None }
    }

    fn push(&mut self, piece: &Piece<'_>) -> ControlFlow<()> {
        if !self.live {
            return ControlFlow::Continue(());
        }
        let written = match (self.text, self.any) {
            (true, _) => output::text(piece.text),
            (false, false) => output::text(&piece.id.to_string()),
            (false, true) => output::text(&format!(",{}", piece.id)),
        };
        self.any = true;
        match written {
            Ok(()) => ControlFlow::Continue(()),
            Err(failure) => {
                self.failure = Some(failure);
                ControlFlow::Break(())
            }
        }
    }

    fn finish(&mut self) -> Result<(), Failure> {
        match self.failure.take() {
            Some(failure) => Err(failure),
            None if self.live => output::text("\n"),
            None => Ok(()),
        }
    }
}

fn print(generated: &Generated, arguments: &Arguments) -> Result<(), Failure> {
    let rows = generated.rows.len();
    for (i, Row { ids, text, reused, .. }) in generated.rows.iter().enumerate() {
        if arguments.json {
            let reused = arguments.load_state.as_ref().map(|_| *reused);
            output::json(&Answer { ids, text: text.as_deref(), reused })?;
        } else {
            let text = text.clone().unwrap_or_else(|| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(","));
            output::line(format_args!("[{}/{rows}] {text}", i + 1))?;
        }
    }
    Ok(())
}

fn timings(generated: &Generated, console: &Console) {
    let timings = &generated.timings;
    let reused: usize = generated.rows.iter().map(|row| row.reused).sum();
    if reused > 0 {
        console.note(format_args!("{reused} tokens of the prompt were in the state"));
    }
    console.note(format_args!(
        "prompt: {} tokens in {:.2} s ({:.1} tokens/s); new: {} tokens in {:.2} s ({:.1} tokens/s)",
        timings.prompt_tokens,
        timings.prefill.as_secs_f64(),
        timings.prefill_rate(),
        timings.new_tokens,
        timings.decode.as_secs_f64(),
        timings.decode_rate(),
    ));
}
