//! Text of ids that arrive one by one.

use super::Tokenizer;
use crate::Result;

/// What a decoder gives for bytes that are no character, or not yet.
const INCOMPLETE: char = '\u{FFFD}';

/// Turns ids into text as they come. A character of several bytes may span tokens: it is held back until it is whole,
/// so every piece is valid text and all pieces together are the text of all ids.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    ids: Vec<u32>,
    /// Where decoding starts: the tokens before the new ones give them their context (a leading space, say).
    context: usize,
    /// Ids up to here have been given out.
    done: usize,
}

impl<'a> TextStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, ids: Vec::new(), context: 0, done: 0 }
    }

    /// Takes an id and returns the text that is certain by now, which may be empty.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        self.take(false)
    }

    /// The rest: bytes that never became a character, shown as the replacement character.
    pub fn finish(&mut self) -> Result<String> {
        self.take(true)
    }

    fn take(&mut self, last: bool) -> Result<String> {
        let decode = |ids: &[u32]| self.tokenizer.decode(ids, self.skip_special);
        let before = decode(&self.ids[self.context..self.done])?;
        let with = decode(&self.ids[self.context..])?;
        if !last && with.ends_with(INCOMPLETE) {
            return Ok(String::new());
        }
        let new = with.strip_prefix(before.as_str()).unwrap_or_else(|| tail(&with, &before)).to_string();
        // Ids without text (special tokens) give no context, and neither do blanks, which some decoders drop at the
        // beginning: keep what there is until text comes.
        if !new.trim_matches(' ').is_empty() {
            self.context = self.done;
        }
        self.done = self.ids.len();
        if self.context > 256 {
            self.ids.drain(..self.context);
            self.done -= self.context;
            self.context = 0;
        }
        Ok(new)
    }
}

/// What stands after the characters that both texts begin with. Decoders that rewrite text across tokens need it.
fn tail<'t>(with: &'t str, before: &str) -> &'t str {
    let same: usize = with.chars().zip(before.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
    &with[same..]
}
