//! A few greedy continuations, to show what a run changed.

use terrarium::kernels::TrainBackend;
use terrarium::kernels::backend::{BackendTask, with_backend};
use terrarium::runtime::tokenizer::Message;
use terrarium::runtime::{self, GenerateOptions, Loaded, Precision, Tokenizer};
use terrarium::train::DataConfig;
use terrarium::train::data::{Example, Source, read_sources};

use crate::commands::train::LaunchArgs;
use crate::console::Console;
use crate::failure::Failure;
use crate::model::Source as ModelSource;
use crate::{model, output};

/// Longest continuation, in tokens.
const LENGTH: usize = 96;

/// Something to continue.
#[derive(Debug, Clone)]
pub enum Prompt {
    /// As it is.
    Text(String),
    /// By the tokenizer's chat template.
    Chat(Vec<Message>),
}

impl Prompt {
    /// The text that a user would type.
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            Self::Chat(messages) => messages.last().map(|message| message.content.as_str()),
        }
    }

    fn encode(&self, tokenizer: &Tokenizer, config: &terrarium::models::DecoderConfig) -> Result<Vec<u32>, Failure> {
        Ok(match self {
            Self::Text(text) => runtime::prompt_ids(tokenizer, config, text)?,
            Self::Chat(messages) => tokenizer.encode(&tokenizer.chat(messages, true)?, false)?,
        })
    }
}

/// Prompts from the data, evenly spread. Data that cannot be read are the run's to complain about.
pub fn from_data(config: &DataConfig, n: usize) -> Vec<Prompt> {
    let paths = if config.valid.is_empty() { &config.train } else { &config.valid };
    let Ok(sources) = read_sources(paths, config) else { return Vec::new() };
    let mut prompts = Vec::new();
    for source in sources {
        if let Source::Examples(_, examples) = source {
            prompts.extend(examples.into_iter().filter_map(|(_, example)| prompt(example)));
        }
    }
    let every = prompts.len().div_ceil(n.max(1)).max(1);
    prompts.into_iter().step_by(every).take(n).collect()
}

fn prompt(example: Example) -> Option<Prompt> {
    match example {
        Example::Pair(prompt, _) => Some(Prompt::Text(prompt)),
        Example::Chat(mut messages) => {
            let answer = messages.iter().position(|message| message.role == "assistant")?;
            messages.truncate(answer);
            (!messages.is_empty()).then_some(Prompt::Chat(messages))
        }
        Example::Text(_) | Example::Instruction { .. } => None,
    }
}

/// Prompts and how to run them.
#[derive(Clone, Copy)]
pub struct Sampling<'a> {
    /// `before` or `after`.
    pub title: &'a str,
    /// What to continue.
    pub prompts: &'a [Prompt],
    /// Device and hub.
    pub launch: &'a LaunchArgs,
    /// For notes.
    pub console: &'a Console,
}

impl Sampling<'_> {
    /// Continues every prompt with the model of `source` and prints the result.
    pub fn print(&self, source: &ModelSource) -> Result<(), Failure> {
        let answers = with_backend(&self.launch.compute.device, Task { sampling: self, source })??;
        output::line(format_args!("-- {} --", self.title))?;
        for (prompt, answer) in self.prompts.iter().zip(answers) {
            output::line(format_args!("> {}\n  {}", one_line(prompt.as_text().unwrap_or_default()), one_line(&answer)))?;
        }
        output::line("")
    }
}

/// Keeps a sample on the line it was given.
fn one_line(text: &str) -> String {
    text.trim().replace('\n', " / ")
}

struct Task<'a> {
    sampling: &'a Sampling<'a>,
    source: &'a ModelSource,
}

impl BackendTask for Task<'_> {
    type Output = Result<Vec<String>, Failure>;

    fn run<B: TrainBackend>(self, device: &B::Device) -> Self::Output {
        let Sampling { prompts, launch, console, .. } = *self.sampling;
        let loaded = model::load::<B::InnerBackend>(self.source, Precision::Auto, &launch.hub, console, device)?;
        let Loaded { model, config, tokenizer: Some(tokenizer), generation, .. } = &loaded else { return Ok(Vec::new()) };
        let ids = prompts.iter().map(|prompt| prompt.encode(tokenizer, config)).collect::<Result<Vec<_>, Failure>>()?;
        let mut options = GenerateOptions::new(LENGTH);
        options.eos = generation.eos.clone();
        let generated =
            runtime::generate(model, config, Some(tokenizer), &ids, &options, device, &mut |_| std::ops::ControlFlow::Continue(()))?;
        Ok(generated.rows.into_iter().map(|row| row.text.unwrap_or_default()).collect())
    }
}
