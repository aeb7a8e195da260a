//! Generating text: batches of prompts of any length, each row exactly as it would be alone.

mod decoding;
mod row;
mod stop;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use terrarium_kernels::KernelBackend;
use terrarium_models::{Cache, Decoder, DecoderConfig};

use crate::Result;
use crate::error::InputError;
use crate::forward::{Reading, check_ids, host_logits, prefill_chunk, read_after, read_prompts};
use crate::sampling::Sampling;
use crate::snapshot::{Resumed, Snapshot};
use crate::tokenizer::Tokenizer;
pub use decoding::Decoding;
use row::RowState;

/// How to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// Most tokens a row gets.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Row `r` is sampled with the seed `seed + r`.
    pub seed: u64,
    /// One seed per row instead.
    pub seeds: Option<Vec<u64>>,
    /// Ids that end a row; usually [`crate::GenerationConfig::eos`]. The id is part of the row's ids, not of its text.
    pub eos: Vec<u32>,
    /// Strings that end a row and are not part of its text. They need a tokenizer.
    pub stop: Vec<String>,
    /// Prompt tokens per pass, all rows together: bounds the memory of long prompts. 0 takes them whole, `None` is
    /// [`crate::prefill_chunk`].
    pub prefill_chunk: Option<usize>,
    /// Rows generated together.
    pub batch: usize,
    /// Shows special tokens in the text.
    pub keep_special: bool,
    /// A state to go on from: as much of the prompt as it has read is not read again. For a single prompt.
    pub from: Option<Arc<Snapshot>>,
    /// Keeps the state after the prompt and all that was generated. For a single prompt.
    pub keep_state: bool,
}

impl GenerateOptions {
    /// Greedy, without an end but the number of tokens.
    pub fn new(max_new_tokens: usize) -> Self {
        Self {
            max_new_tokens,
            sampling: Sampling::default(),
            seed: 0,
            seeds: None,
            eos: vec![],
            stop: vec![],
            prefill_chunk: None,
            batch: 16,
            keep_special: false,
            from: None,
            keep_state: false,
        }
    }

    fn seed_of(&self, row: usize) -> u64 {
        let own = self.seeds.as_ref().and_then(|seeds| seeds.get(row));
        own.copied().unwrap_or(self.seed.wrapping_add(row as u64))
    }
}

/// Why a row ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finish {
    /// It has `max_new_tokens`.
    Length,
    /// This end-of-text id came.
    Eos(u32),
    /// This stop string came.
    Stop(String),
    /// The caller asked to stop.
    Cancelled,
}

/// One prompt's continuation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// New ids, an end-of-text id included.
    pub ids: Vec<u32>,
    /// New text up to a stop string; `None` without a tokenizer.
    pub text: Option<String>,
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that a state had read before.
    pub reused: usize,
}

/// Where the time went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// Reading the prompts, the first token included.
    pub prefill: Duration,
    /// All further tokens.
    pub decode: Duration,
    /// Tokens of all prompts that were read.
    pub prompt_tokens: usize,
    /// New tokens of all rows.
    pub new_tokens: usize,
    /// Those of them that came out of `decode`.
    pub decoded_tokens: usize,
}

impl Timings {
    /// Prompt tokens per second.
    pub fn prefill_rate(&self) -> f64 {
        self.prompt_tokens as f64 / self.prefill.as_secs_f64().max(1e-9)
    }

    /// New tokens per second after the first.
    pub fn decode_rate(&self) -> f64 {
        self.decoded_tokens as f64 / self.decode.as_secs_f64().max(1e-9)
    }
}

/// All continuations, in the order of the prompts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generated {
    /// One per prompt.
    pub rows: Vec<Row>,
    /// Where the time went.
    pub timings: Timings,
    /// Decisions worth printing.
    pub notes: Vec<String>,
    /// The state after all tokens, where it was to be kept.
    pub state: Option<Snapshot>,
}

/// A new token, as it comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece<'a> {
    /// Index of the prompt.
    pub row: usize,
    /// The token.
    pub id: u32,
    /// Text that is certain by now: empty while a character or a possible stop string is incomplete. What is held back
    /// at the end comes with the last token.
    pub text: &'a str,
}

/// Continues every prompt. `on_piece` sees each token as it comes; `Break` ends all rows with what they have.
pub fn generate<B: KernelBackend>(
    model: &Decoder<B>,
    config: &DecoderConfig,
    tokenizer: Option<&Tokenizer>,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
    device: &B::Device,
    on_piece: &mut dyn FnMut(Piece<'_>) -> ControlFlow<()>,
) -> Result<Generated> {
    let prompts = check(config, tokenizer, prompts, options)?;
    let mut run =
        Run { model, config, tokenizer, options, device, timings: Timings::default(), notes: Vec::new(), state: None, cancelled: false };
    let mut rows = Vec::with_capacity(prompts.len());
    for (batch, group) in prompts.chunks(options.batch.max(1)).enumerate() {
        rows.extend(run.group(batch * options.batch.max(1), group, on_piece)?);
    }
    let mut notes = length_note(config, &prompts, options);
    run.notes.sort();
    run.notes.dedup();
    notes.extend(run.notes);
    Ok(Generated { rows, timings: run.timings, notes, state: run.state })
}

/// Ids of a prompt as the tokenizer wants it; an empty text is a bos.
pub fn prompt_ids(tokenizer: &Tokenizer, config: &DecoderConfig, text: &str) -> Result<Vec<u32>> {
    let ids = tokenizer.encode(text, true)?;
    if !ids.is_empty() {
        return Ok(ids);
    }
    let start = tokenizer.bos().or(config.bos).or(tokenizer.eos()).ok_or(InputError::Empty { row: 0 })?;
    Ok(vec![start])
}

fn check(config: &DecoderConfig, tokenizer: Option<&Tokenizer>, prompts: &[Vec<u32>], options: &GenerateOptions) -> Result<Vec<Vec<u32>>> {
    options.sampling.check()?;
    if tokenizer.is_none() && !options.stop.is_empty() {
        return Err(InputError::Option("stop strings need a tokenizer, and this model has none: use eos ids".into()).into());
    }
    if (options.from.is_some() || options.keep_state) && prompts.len() != 1 {
        let reason = format!("a state is that of one prompt, and there are {}: give one", prompts.len());
        return Err(InputError::Option(reason).into());
    }
    if let Some(seeds) = &options.seeds
        && seeds.len() != prompts.len()
    {
        return Err(InputError::Option(format!("{} seeds for {} prompts: give one each", seeds.len(), prompts.len())).into());
    }
    let mut checked = Vec::with_capacity(prompts.len());
    for (row, ids) in prompts.iter().enumerate() {
        check_ids(row, ids, config)?;
        let start = tokenizer.and_then(Tokenizer::bos).or(config.bos);
        let ids = if ids.is_empty() { vec![start.ok_or(InputError::Empty { row })?] } else { ids.clone() };
        check_ids(row, &ids, config)?;
        checked.push(ids);
    }
    Ok(checked)
}

fn length_note(config: &DecoderConfig, prompts: &[Vec<u32>], options: &GenerateOptions) -> Vec<String> {
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0) + options.max_new_tokens;
    match config.max_positions {
        Some(most) if longest > most => vec![format!("up to {longest} tokens, and the model was made for {most}: text beyond may degrade")],
        _ => vec![],
    }
}

/// What does not change while generating.
struct Run<'a, B: KernelBackend> {
    model: &'a Decoder<B>,
    config: &'a DecoderConfig,
    tokenizer: Option<&'a Tokenizer>,
    options: &'a GenerateOptions,
    device: &'a B::Device,
    timings: Timings,
    notes: Vec<String>,
    state: Option<Snapshot>,
    cancelled: bool,
}

/// Prompts that were read.
struct Read<B: KernelBackend> {
    /// After each one's last token.
    logits: Vec<f32>,
    cache: Cache<B>,
    /// Tokens that a state had read before.
    reused: usize,
}

/// From what the tokens of a step are chosen.
enum Choice {
    /// They are chosen, one for each active row.
    Ids(Vec<u32>),
    /// Of each active row.
    Logits(Vec<f32>),
}

impl<B: KernelBackend> Run<'_, B> {
    /// Continues the prompts of one batch; `first` is the index of its first row.
    fn group(&mut self, first: usize, prompts: &[Vec<u32>], on_piece: &mut dyn FnMut(Piece<'_>) -> ControlFlow<()>) -> Result<Vec<Row>> {
        let mut states = Vec::with_capacity(prompts.len());
        for (i, prompt) in prompts.iter().enumerate() {
            let row = first + i;
            states.push(RowState::new(row, prompt, self.options.seed_of(row), self.options, self.tokenizer)?);
        }
        let nothing = self.options.max_new_tokens == 0;
        if (nothing && !self.options.keep_state) || self.cancelled {
            let finish = if self.cancelled { Finish::Cancelled } else { Finish::Length };
            return states.into_iter().map(|state| state.into_row(finish.clone())).collect();
        }
        let mut clock = Instant::now();
        let Read { logits, cache, reused } = self.read(prompts)?;
        self.timings.prompt_tokens += prompts.iter().map(Vec::len).sum::<usize>() - reused;
        if nothing {
            self.account(0, 0, &mut clock);
            self.state = Some(Snapshot::take(self.model, self.config, &cache, prompts[0].clone(), logits)?);
            return states.into_iter().map(|state| state.reusing(reused).into_row(Finish::Length)).collect();
        }
        let mut active: Vec<usize> = (0..states.len()).collect();
        let mut kept = self.choose(&mut states, &active, Choice::Logits(logits), 0, on_piece)?;
        self.account(0, active.len(), &mut clock);
        let mut decoding = Decoding::new(self.model, cache, self.known(), self.options.max_new_tokens, self.device);
        let draws = self.options.sampling.on_device().filter(|_| decoding.chooses());
        if let Some(options) = draws {
            decoding.draw(options, &active.iter().map(|&i| states[i].draws()).collect::<Vec<_>>());
        }
        let there = decoding.chooses() && (draws.is_some() || self.options.sampling.is_greedy());
        for step in 1.. {
            if kept.is_empty() {
                break;
            }
            if kept.len() < active.len() {
                decoding.keep(&kept);
                active = kept.iter().map(|&i| active[i]).collect();
            }
            if there && step > 1 && !decoding.forgot() {
                decoding.advance()?;
            } else {
                decoding.read(&active.iter().map(|&i| states[i].newest()).collect::<Vec<_>>())?;
            }
            let choice = if there { decoding.chosen()? } else { None };
            let choice = match choice {
                Some(ids) => {
                    active.iter().filter(|_| draws.is_some()).for_each(|&i| states[i].drawn());
                    Choice::Ids(ids)
                }
                None => Choice::Logits(decoding.logits()?),
            };
            kept = self.choose(&mut states, &active, choice, step, on_piece)?;
            self.account(step, active.len(), &mut clock);
        }
        self.notes.extend(decoding.note().map(str::to_string));
        if self.options.keep_state {
            // The newest token was chosen, not read.
            decoding.read(&[states[0].newest()])?;
            let logits = decoding.logits()?;
            let (context, tensors) = decoding.state()?;
            self.state = Some(Snapshot::of_parts(self.model, self.config, &context, tensors, states[0].seen().to_vec(), logits)?);
        }
        states.into_iter().map(|state| state.reusing(reused).into_row(Finish::Length)).collect()
    }

    /// Reads the prompts, but for what a state has read of them.
    fn read(&mut self, prompts: &[Vec<u32>]) -> Result<Read<B>> {
        let rows: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let (chunk, spare) = (self.options.prefill_chunk.unwrap_or_else(|| prefill_chunk::<B>(self.device)), self.spare(&rows));
        let resumed = match &self.options.from {
            Some(state) => self.resume(state, rows[0])?,
            None => None,
        };
        let Some(Resumed { cache, reused, logits }) = resumed else {
            let (hidden, cache) = read_prompts(self.model, &rows, chunk, spare, self.device)?;
            return Ok(Read { logits: host_logits(self.model, hidden)?, cache, reused: 0 });
        };
        if let Some(logits) = logits {
            return Ok(Read { logits, cache: cache.reserve(reused + spare), reused });
        }
        let reading = Reading { chunk, spare, cache: Some(cache) };
        let (hidden, cache) = read_after(self.model, &[&rows[0][reused..]], reading, self.device)?;
        Ok(Read { logits: host_logits(self.model, hidden)?, cache, reused })
    }

    /// Goes on from `state`, or takes note of why that cannot be.
    fn resume(&mut self, state: &Snapshot, prompt: &[u32]) -> Result<Option<Resumed<B>>> {
        let resumed = state.resume(self.model, self.config, prompt, self.device)?;
        if resumed.is_none() {
            let (common, all) = (state.common(prompt), state.tokens.len());
            self.notes.push(format!(
                "nothing of the state is reused: the prompt begins with {common} of its {all} tokens, and what this model carries cannot be taken back to there"
            ));
        }
        Ok(resumed)
    }

    /// Tokens that the cache has room for behind the prompts: those asked for, though no more than a cache twice as long has.
    fn spare(&self, rows: &[&[u32]]) -> usize {
        let longest = rows.iter().map(|row| row.len()).max().unwrap_or(0);
        self.options.max_new_tokens.min(longest.max(1024))
    }

    /// Columns of the logits that are tokens: rows of the embedding beyond the tokenizer's ids are padding, never text.
    fn known(&self) -> usize {
        let vocab = self.config.vocab_size;
        self.tokenizer.map_or(vocab, |t| t.vocab_size().min(vocab))
    }

    /// Chooses a token for each active row; returns which of them (as places in `active`) go on.
    fn choose(
        &mut self,
        states: &mut [RowState<'_>],
        active: &[usize],
        mut choice: Choice,
        step: usize,
        on_piece: &mut dyn FnMut(Piece<'_>) -> ControlFlow<()>,
    ) -> Result<Vec<usize>> {
        let (vocab, known) = (self.config.vocab_size, self.known());
        let mut kept = Vec::with_capacity(active.len());
        for (place, &i) in active.iter().enumerate() {
            let state = &mut states[i];
            let id = match &mut choice {
                Choice::Ids(ids) => ids[place],
                Choice::Logits(logits) => state.sample(&mut logits[place * vocab..][..known], step)?,
            };
            let text = state.take(id, self.options)?;
            self.timings.new_tokens += 1;
            if on_piece(Piece { row: state.row, id, text: &text }).is_break() {
                self.cancelled = true;
            }
            if !state.finished() {
                kept.push(place);
            }
        }
        if self.cancelled {
            for state in states.iter_mut().filter(|state| !state.finished()) {
                state.cancel()?;
            }
            kept.clear();
        }
        Ok(kept)
    }

    fn account(&mut self, step: usize, rows: usize, clock: &mut Instant) {
        let elapsed = clock.elapsed();
        *clock = Instant::now();
        if step == 0 {
            self.timings.prefill += elapsed;
        } else {
            self.timings.decode += elapsed;
            self.timings.decoded_tokens += rows;
        }
    }
}
