//! Decoder language models, their configurations and weight tables.
