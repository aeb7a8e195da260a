//! One row of a batch while it is being generated.

use super::stop::StopScanner;
use super::{Finish, GenerateOptions, Row};
use crate::Result;
use crate::sampling::Sampler;
use crate::tokenizer::{TextStream, Tokenizer};

/// Everything about a row but its cache. Nothing in it depends on the other rows.
pub(super) struct RowState<'a> {
    /// Index of the prompt.
    pub(super) row: usize,
    seen: Vec<u32>,
    prompt_tokens: usize,
    reused: usize,
    sampler: Sampler,
    stream: Option<TextStream<'a>>,
    scanner: StopScanner,
    text: String,
    finish: Option<Finish>,
}

impl<'a> RowState<'a> {
    pub(super) fn new(row: usize, prompt: &[u32], seed: u64, options: &GenerateOptions, tokenizer: Option<&'a Tokenizer>) -> Result<Self> {
        let stream = tokenizer.map(|t| if options.keep_special { t.stream_with_special() } else { t.stream() });
        Ok(Self {
            row,
            seen: prompt.to_vec(),
            prompt_tokens: prompt.len(),
            reused: 0,
            sampler: Sampler::new(options.sampling, seed)?,
            stream,
            scanner: StopScanner::new(&options.stop),
            text: String::new(),
            finish: None,
        })
    }

    /// Takes note that a state had read the first `tokens` of the prompt.
    pub(super) fn reusing(mut self, tokens: usize) -> Self {
        self.reused = tokens;
        self
    }

    /// The tokens so far, the prompt's included.
    pub(super) fn seen(&self) -> &[u32] {
        &self.seen
    }

    /// The token to be read next.
    pub(super) fn newest(&self) -> u32 {
        self.seen.last().copied().unwrap_or(0)
    }

    pub(super) fn finished(&self) -> bool {
        self.finish.is_some()
    }

    /// Seed and number of the next draw.
    pub(super) fn draws(&self) -> (u64, u32) {
        self.sampler.draws()
    }

    /// Takes note that the next token was drawn on the device.
    pub(super) fn drawn(&mut self) {
        self.sampler.skip();
    }

    /// Chooses the next token.
    pub(super) fn sample(&mut self, logits: &mut [f32], step: usize) -> Result<u32> {
        Ok(self.sampler.sample(logits, &self.seen, step)?)
    }

    /// Takes the next token; returns the text that is certain by now.
    pub(super) fn take(&mut self, id: u32, options: &GenerateOptions) -> Result<String> {
        self.seen.push(id);
        if options.eos.contains(&id) {
            self.finish = Some(Finish::Eos(id));
        }
        // The end of a text shows only where special tokens are shown.
        let mut text = String::new();
        if let Some(stream) = &mut self.stream {
            let new = if self.finish.is_none() || options.keep_special { stream.push(id)? } else { String::new() };
            text = self.scan(&new);
        }
        if self.finish.is_none() && self.seen.len() - self.prompt_tokens >= options.max_new_tokens {
            self.finish = Some(Finish::Length);
        }
        if self.finish.is_some() {
            text.push_str(&self.flush()?);
        }
        self.text.push_str(&text);
        Ok(text)
    }

    fn scan(&mut self, new: &str) -> String {
        let scanned = self.scanner.push(new);
        if let Some(stop) = scanned.stop {
            self.finish = Some(Finish::Stop(stop));
        }
        scanned.text
    }

    /// Text held back, which is certain now that no more comes; nothing follows a stop string.
    fn flush(&mut self) -> Result<String> {
        let stopped = matches!(self.finish, Some(Finish::Stop(_)));
        let Some(stream) = self.stream.as_mut().filter(|_| !stopped) else { return Ok(String::new()) };
        let rest = stream.finish()?;
        let text = self.scan(&rest);
        Ok(text + &self.scanner.finish())
    }

    /// Ends the row where it is.
    pub(super) fn cancel(&mut self) -> Result<()> {
        self.finish = Some(Finish::Cancelled);
        let rest = self.flush()?;
        self.text.push_str(&rest);
        Ok(())
    }

    /// The finished row; `otherwise` is its end if it had none.
    pub(super) fn into_row(self, otherwise: Finish) -> Result<Row> {
        Ok(Row {
            ids: self.seen[self.prompt_tokens..].to_vec(),
            text: self.stream.is_some().then_some(self.text),
            finish: self.finish.unwrap_or(otherwise),
            prompt_tokens: self.prompt_tokens,
            reused: self.reused,
        })
    }
}
