//! Log-probabilities of given text, as lm-evaluation-harness asks for them.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use terrarium_kernels::KernelBackend;
use terrarium_models::{Decoder, DecoderConfig};

use crate::Result;
use crate::error::{InputError, SamplingError};
use crate::forward::{Reading, Slice, check_ids, host_logits, prefill};
use crate::sampling::argmax;
use crate::tokenizer::Tokenizer;

/// What is to be scored; one line of the JSONL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ScoreInput {
    /// Ids; all but the first are scored, or those from a place on.
    Ids {
        /// The ids.
        ids: Vec<u32>,
        /// Place of the first one that is scored; 0 counts as 1.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<usize>,
    },
    /// Text after text; the tokens of `continuation` are scored.
    Text {
        /// What stands before.
        context: String,
        /// What is scored.
        continuation: String,
    },
}

/// How to score.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScoreOptions {
    /// The best so many tokens are listed for each position.
    pub top: usize,
    /// Tokens per pass, padding included: bounds the memory.
    pub batch_tokens: usize,
}

impl Default for ScoreOptions {
    fn default() -> Self {
        Self { top: 0, batch_tokens: 2048 }
    }
}

/// Scores of one input: natural logarithms of a float32 softmax.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Score {
    /// The tokens that were scored.
    pub tokens: Vec<u32>,
    /// Log-probability of each.
    pub logprobs: Vec<f32>,
    /// Whether each was the most likely one (the lowest id among equals).
    pub greedy: Vec<bool>,
    /// Sum of the log-probabilities.
    pub sum: f64,
    /// The best tokens of each position and their log-probabilities, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top: Option<Vec<Vec<(u32, f32)>>>,
}

/// Logits on the host at once: keeps large vocabularies from taking gigabytes.
const SLICE_ELEMENTS: usize = 1 << 24;

/// Scores inputs, in their order. Inputs of like length share a pass; none sees another. Those that differ in their last token alone, as
/// choices of one token do, are read once.
pub fn score<B: KernelBackend>(
    model: &Decoder<B>,
    config: &DecoderConfig,
    tokenizer: Option<&Tokenizer>,
    inputs: &[ScoreInput],
    options: &ScoreOptions,
    device: &B::Device,
) -> Result<Vec<Score>> {
    let mut jobs = Vec::with_capacity(inputs.len());
    for (row, input) in inputs.iter().enumerate() {
        let (ids, first) = prepare(row, input, config, tokenizer)?;
        check_ids(row, &ids, config)?;
        jobs.push(Job { ids, first });
    }
    let mut order: Vec<usize> = (0..jobs.len()).collect();
    order.sort_by(|&a, &b| jobs[b].ids.len().cmp(&jobs[a].ids.len()).then_with(|| jobs[a].read().cmp(jobs[b].read())));
    let readings: Vec<&[usize]> = order.chunk_by(|&a, &b| jobs[a].read() == jobs[b].read()).collect();
    let empty = Score { top: (options.top > 0).then(Vec::new), ..Score::default() };
    let mut scores = vec![empty; jobs.len()];
    let budget = options.batch_tokens.max(1);
    let mut rest = readings.as_slice();
    while let Some(longest) = rest.first() {
        let rows = (budget / jobs[longest[0]].ids.len().max(1)).clamp(1, rest.len());
        let (batch, later) = rest.split_at(rows);
        rest = later;
        score_batch(model, config, &jobs, batch, budget, options, device, &mut scores)?;
    }
    for score in &mut scores {
        score.sum = score.logprobs.iter().map(|x| f64::from(*x)).sum();
    }
    Ok(scores)
}

/// Ids, and the place of the first one that is scored.
struct Job {
    ids: Vec<u32>,
    first: usize,
}

impl Job {
    /// The last token is scored, never read.
    fn read(&self) -> &[u32] {
        &self.ids[..self.ids.len() - 1]
    }
}

fn prepare(row: usize, input: &ScoreInput, config: &DecoderConfig, tokenizer: Option<&Tokenizer>) -> Result<(Vec<u32>, usize)> {
    match input {
        ScoreInput::Ids { ids, .. } if ids.is_empty() => Err(InputError::Empty { row }.into()),
        ScoreInput::Ids { ids, from } => Ok((ids.clone(), from.unwrap_or(1).clamp(1, ids.len()))),
        ScoreInput::Text { context, continuation } => {
            let tokenizer = tokenizer.ok_or(InputError::NoTokenizer { row })?;
            prepare_text(row, context, continuation, config, tokenizer)
        }
    }
}

/// Context and continuation are tokenised together: blanks at the end of the context belong to the continuation, whose
/// tokens are those of the whole after as many as the context alone has.
fn prepare_text(row: usize, context: &str, continuation: &str, config: &DecoderConfig, tokenizer: &Tokenizer) -> Result<(Vec<u32>, usize)> {
    let bare = context.trim_end();
    let continuation = format!("{}{continuation}", &context[bare.len()..]);
    let prefix = tokenizer.bos().or(tokenizer.eos()).or(config.bos).or(config.eos.first().copied());
    if bare.is_empty() {
        let ids = tokenizer.encode(&continuation, false)?;
        let prefix = prefix.ok_or(InputError::Empty { row })?;
        if ids.first() == Some(&prefix) {
            return Ok((ids, 1));
        }
        return Ok(([vec![prefix], ids].concat(), 1));
    }
    // A text that brings its bos gets no second one.
    let bos = tokenizer.bos().and_then(|id| tokenizer.token(id));
    let add_special = !bos.is_some_and(|bos| bare.starts_with(&bos));
    let before = tokenizer.encode(bare, add_special)?.len();
    let whole = tokenizer.encode(&format!("{bare}{continuation}"), add_special)?;
    if before == 0 {
        // A context without tokens: the model needs something to start from all the same.
        let prefix = prefix.ok_or(InputError::Empty { row })?;
        return Ok(([vec![prefix], whole].concat(), 1));
    }
    let first = before.min(whole.len());
    Ok((whole, first))
}

/// Reads a batch, each reading on behalf of one or more jobs.
#[expect(clippy::too_many_arguments, reason = "what is read, how, and where the scores go")]
fn score_batch<B: KernelBackend>(
    model: &Decoder<B>,
    config: &DecoderConfig,
    jobs: &[Job],
    readings: &[&[usize]],
    budget: usize,
    options: &ScoreOptions,
    device: &B::Device,
    scores: &mut [Score],
) -> Result<()> {
    let rows: Vec<&[u32]> = readings.iter().map(|reading| jobs[reading[0]].read()).collect();
    let reading = Reading { chunk: budget, spare: 0, cache: None };
    let visit = &mut |slice| score_slice(model, config, jobs, readings, &slice, options, scores);
    prefill(model, &rows, reading, device, visit)?;
    Ok(())
}

/// Scores what the states of one slice predict.
fn score_slice<B: KernelBackend>(
    model: &Decoder<B>,
    config: &DecoderConfig,
    jobs: &[Job],
    readings: &[&[usize]],
    slice: &Slice<B>,
    options: &ScoreOptions,
    scores: &mut [Score],
) -> Result<()> {
    let end = slice.start + slice.hidden.dims()[1];
    let mut places = Vec::new();
    for (row, reading) in readings.iter().enumerate() {
        let first = reading.iter().map(|&job| jobs[job].first - 1).min().unwrap_or(end);
        let last = jobs[reading[0]].read().len().min(end);
        places.extend((first.max(slice.start)..last).map(|position| (row, position)));
    }
    let vocab = config.vocab_size;
    for part in places.chunks((SLICE_ELEMENTS / vocab.max(1)).max(1)) {
        let logits = host_logits(model, slice.pick(part))?;
        let found: Result<Vec<Vec<(usize, Scored)>>, SamplingError> = part
            .par_iter()
            .zip(logits.par_chunks(vocab))
            .map(|(&(row, position), logits)| {
                let asked = readings[row].iter().filter(|&&job| jobs[job].first <= position + 1);
                asked.map(|&job| Ok((job, score_one(logits, jobs[job].ids[position + 1], position, options.top)?))).collect()
            })
            .collect();
        for (&(_, position), found) in part.iter().zip(found?) {
            for (job, one) in found {
                let score = &mut scores[job];
                score.tokens.push(jobs[job].ids[position + 1]);
                score.logprobs.push(one.logprob);
                score.greedy.push(one.greedy);
                if let Some(top) = &mut score.top {
                    top.push(one.top);
                }
            }
        }
    }
    Ok(())
}

struct Scored {
    logprob: f32,
    greedy: bool,
    top: Vec<(u32, f32)>,
}

fn score_one(logits: &[f32], target: u32, position: usize, top: usize) -> Result<Scored, SamplingError> {
    let bad = |x: &f32| x.is_nan() || *x == f32::INFINITY;
    if let Some(id) = logits.iter().position(bad) {
        let count = logits.iter().filter(|x| bad(x)).count();
        return Err(SamplingError::NotFinite { step: position, count, total: logits.len(), id });
    }
    let best = argmax(logits);
    let max = logits[best as usize];
    // The sum of tens of thousands of float32 terms is taken in float64; the result is float32.
    let sum: f64 = logits.iter().map(|x| f64::from((x - max).exp())).sum();
    let shift = sum.ln() as f32;
    let logprob = |id: u32| logits[id as usize] - max - shift;
    let mut ids: Vec<u32> = Vec::new();
    if top > 0 {
        ids = (0..logits.len() as u32).collect();
        let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if top < ids.len() {
            ids.select_nth_unstable_by(top - 1, by_logit);
            ids.truncate(top);
        }
        ids.sort_by(by_logit);
    }
    Ok(Scored { logprob: logprob(target), greedy: best == target, top: ids.into_iter().map(|id| (id, logprob(id))).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_softmax_of_one_row() {
        let logits: Vec<f32> = [0.1f32, 0.6, 0.3].iter().map(|p| p.ln() + 5.0).collect();
        let scored = score_one(&logits, 2, 0, 2).expect("finite");
        assert!((scored.logprob - 0.3f32.ln()).abs() < 1e-6);
        assert!(!scored.greedy);
        assert_eq!(scored.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 2]);
        assert!(score_one(&logits, 1, 0, 0).expect("finite").greedy);
    }

    #[test]
    fn lines_parse_to_either_kind() {
        let ids: ScoreInput = serde_json::from_str(r#"{"ids": [1, 2]}"#).expect("ids");
        assert_eq!(ids, ScoreInput::Ids { ids: vec![1, 2], from: None });
        let text: ScoreInput = serde_json::from_str(r#"{"context": "a", "continuation": "b"}"#).expect("text");
        assert_eq!(text, ScoreInput::Text { context: "a".into(), continuation: "b".into() });
    }
}
