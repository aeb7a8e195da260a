//! Checkpoints, the Hugging Face hub, tokenizers, sampling and generation.
