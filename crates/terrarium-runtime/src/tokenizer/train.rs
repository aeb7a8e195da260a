//! Training a byte-level BPE tokenizer (GPT-2's kind): every text has ids, and decoding gives the text back exactly.

use std::collections::HashSet;

use tokenizers::AddedToken;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::Tokenizer;
use super::special::Special;
use crate::Result;
use crate::error::TokenizerError;

impl Tokenizer {
    /// Learns `vocab_size` tokens from `texts`: the special ones first, then 256 bytes, then merges. Fewer come out of
    /// a text with too few repetitions. The first special token is bos, eos and padding.
    pub fn train_bpe(texts: impl Iterator<Item = String> + Send, vocab_size: usize, special: &[&str]) -> Result<Self> {
        let least = 256 + special.len();
        if vocab_size < least {
            return Err(TokenizerError::Train(format!(
                "a vocabulary of {vocab_size} is too small: 256 bytes and {} special tokens need {least}",
                special.len()
            ))
            .into());
        }
        let failed = |e: tokenizers::Error| TokenizerError::Train(e.to_string());
        let mut inner = tokenizers::Tokenizer::new(BPE::default());
        let bytes = ByteLevel::new(false, false, true);
        inner.with_pre_tokenizer(Some(bytes)).with_decoder(Some(bytes));
        let trainer = BpeTrainer::builder()
            .vocab_size(vocab_size)
            .min_frequency(2)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect::<HashSet<_>>())
            .special_tokens(special.iter().map(|token| AddedToken::from(token.to_string(), true)).collect())
            .build();
        inner.train(&mut TrainerWrapper::from(trainer), texts).map_err(failed)?;
        let mut tokenizer = Self::wrap(inner).map_err(failed)?;
        if let Some(first) = special.first() {
            let role = Special::role(&tokenizer, first);
            tokenizer.special = Special { bos: role.clone(), eos: role.clone(), pad: role, unk: None };
        }
        Ok(tokenizer)
    }
}
