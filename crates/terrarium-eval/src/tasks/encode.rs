//! From text to ids as the harness does it (`TemplateLM._encode_pair`, `HFLM.tok_encode`).

use terrarium_models::DecoderConfig;
use terrarium_runtime::{ScoreInput, Tokenizer};

use super::TaskError;
use crate::EvalError;

/// Longest answer that is written, in tokens: the harness's.
pub(crate) const ANSWER: usize = 256;

/// Encodes prompts and continuations.
#[derive(Clone, Copy)]
pub(crate) struct Encoder<'a> {
    pub tokenizer: &'a Tokenizer,
    pub config: &'a DecoderConfig,
    /// Whether a beginning of text stands before every prompt; by default what the tokenizer does by itself.
    pub add_bos: Option<bool>,
    /// Longest prompt and answer; by default what the model was made for.
    pub max_length: Option<usize>,
}

impl Encoder<'_> {
    /// Longest prompt and answer.
    fn most(&self) -> usize {
        self.max_length.or(self.config.max_positions).unwrap_or(2048)
    }

    /// Ids of a text as the harness encodes one: it gets no second beginning.
    fn tokens(&self, text: &str) -> Result<Vec<u32>, EvalError> {
        let start = self.tokenizer.bos().or(self.tokenizer.eos()).and_then(|id| self.tokenizer.token(id));
        let brings = start.is_some_and(|start| text.starts_with(&start));
        let add = self.add_bos.unwrap_or(true) && !brings;
        Ok(self.tokenizer.encode(text, add)?)
    }

    /// What stands for an empty context.
    fn prefix(&self, task: &str) -> Result<u32, TaskError> {
        let prefix = self.tokenizer.bos().or(self.tokenizer.eos()).or(self.config.eos.first().copied());
        prefix.ok_or_else(|| TaskError::NoPrefix { task: task.to_string() })
    }

    /// Ids of a prompt, cut off at the start so that there is room for an answer.
    pub fn prompt(&self, task: &str, context: &str) -> Result<Vec<u32>, EvalError> {
        let most = self.most();
        let room = most.checked_sub(ANSWER).filter(|room| *room > 0);
        let room = room.ok_or_else(|| TaskError::NoRoom { task: task.to_string(), answer: ANSWER, most })?;
        let mut ids = self.tokens(context)?;
        ids.drain(..ids.len().saturating_sub(room));
        if ids.is_empty() {
            ids.push(self.prefix(task)?);
        }
        Ok(ids)
    }

    /// Context and continuation are tokenised together; blanks at the end of the context belong to the continuation, whose tokens are
    /// those of the whole after as many as the context alone has. What is too long is cut off at the start.
    pub fn encode(&self, task: &str, context: &str, continuation: &str) -> Result<ScoreInput, EvalError> {
        let bare = context.trim_end();
        let mut ids = self.tokens(bare)?;
        let rest = if context.is_empty() {
            self.tokenizer.encode(continuation, false)?
        } else {
            // Where the two meet, tokens of the whole may differ from those of the context alone, which then stand.
            let whole = self.tokens(&format!("{context}{continuation}"))?;
            whole.get(ids.len()..).map_or(Vec::new(), <[u32]>::to_vec)
        };
        if context.is_empty() || ids.is_empty() {
            let prefix = self.prefix(task)?;
            ids = if rest.first() == Some(&prefix) { Vec::new() } else { vec![prefix] };
        }
        let from = ids.len();
        ids.extend(rest);
        let cut = ids.len().saturating_sub(self.most() + 1);
        ids.drain(..cut);
        // The first token has nothing before it that could predict it.
        let from = from.saturating_sub(cut).clamp(1, ids.len().max(1));
        Ok(ScoreInput::Ids { ids, from: Some(from) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 24, "rms_norm_eps": 1e-5, "max_position_embeddings": 300}"#;

    /// Ids: `<s>` 0, a 1, b 2, c 3, blank 4, ab 5. It begins texts with `<s>`, and blanks are tokens of their own.
    fn tokenizer(dir: &std::path::Path) -> Tokenizer {
        let json = r#"{"version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null, "decoder": null,
            "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
            "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
                "fuse_unk": false, "byte_fallback": false, "vocab": {"<s>": 0, "a": 1, "b": 2, "c": 3, " ": 4, "ab": 5}, "merges": [["a", "b"]]}}"#;
        std::fs::write(dir.join("tokenizer.json"), json).unwrap();
        std::fs::write(dir.join("tokenizer_config.json"), r#"{"bos_token": "<s>"}"#).unwrap();
        Tokenizer::from_dir(dir).unwrap().unwrap()
    }

    #[test]
    fn context_and_continuation_meet_as_in_the_harness() {
        let dir = tempfile::tempdir().unwrap();
        let (tokenizer, config) = (tokenizer(dir.path()), DecoderConfig::from_json(CONFIG).unwrap());
        let plain = Encoder { tokenizer: &tokenizer, config: &config, add_bos: Some(false), max_length: None };
        let as_is = Encoder { add_bos: None, ..plain };
        let pair = |encoder: Encoder<'_>, context: &str, continuation: &str| match encoder.encode("task", context, continuation).unwrap() {
            ScoreInput::Ids { ids, from } => (ids, from.unwrap()),
            text => panic!("{text:?}"),
        };
        assert_eq!(pair(plain, "ca", " b"), (vec![3, 1, 4, 2], 2));
        // Blanks at the end of the context are scored.
        assert_eq!(pair(plain, "ca  ", "b"), (vec![3, 1, 4, 4, 2], 2));
        // The whole is [c, ab, c]: the context keeps its own tokens, and of the whole what comes after as many is scored.
        assert_eq!(pair(plain, "ca", "bc"), (vec![3, 1, 3], 2));
        // The tokenizer's own beginning, which a text that brings it does not get twice.
        assert_eq!(pair(as_is, "ca", " b"), (vec![0, 3, 1, 4, 2], 3));
        assert_eq!(pair(as_is, "<s>ca", " b"), (vec![0, 3, 1, 4, 2], 3));
        // Nothing to start from: a beginning of text stands there, unless the continuation is one.
        assert_eq!(pair(plain, "", " b"), (vec![0, 4, 2], 1));
        assert_eq!(pair(as_is, "", "<s>b"), (vec![0, 2], 1));
        // As many tokens as fit are read, and one more is scored.
        let short = Encoder { max_length: Some(2), ..plain };
        assert_eq!(pair(short, "cac", " b"), (vec![3, 4, 2], 1));
    }

    #[test]
    fn prompts_leave_room_for_an_answer() {
        let dir = tempfile::tempdir().unwrap();
        let (tokenizer, config) = (tokenizer(dir.path()), DecoderConfig::from_json(CONFIG).unwrap());
        let encoder = Encoder { tokenizer: &tokenizer, config: &config, add_bos: None, max_length: None };
        assert_eq!(encoder.prompt("task", "ca").unwrap(), [0, 3, 1]);
        assert_eq!(encoder.prompt("task", &"c".repeat(100)).unwrap(), [3; 300 - ANSWER]);
        let short = Encoder { max_length: Some(ANSWER), ..encoder };
        let error = short.prompt("task", "ca").unwrap_err().to_string();
        assert!(error.contains("256 tokens do not fit into 256"), "{error}");
    }
}
