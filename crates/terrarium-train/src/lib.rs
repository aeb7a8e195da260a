//! Training and fine-tuning on burn-train.
