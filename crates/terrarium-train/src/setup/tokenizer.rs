//! The tokenizer of a run: given, the base model's, or made from the training text.

use std::path::{Path, PathBuf};

use terrarium_runtime::Tokenizer;

use crate::TrainError;
use crate::config::RunConfig;
use crate::data::{DataError, Example, Source, read_sources};

/// Name of the end token of tokenizers made here.
const END: &str = "<|endoftext|>";

/// Opens or makes the tokenizer; also says which directory's tokenizer files belong to the result.
pub(super) fn open(
    config: &RunConfig,
    base_dir: Option<&Path>,
    out_dir: &Path,
    write: bool,
) -> Result<(Tokenizer, Option<PathBuf>), TrainError> {
    let Some(value) = &config.data.tokenizer else {
        let dir = base_dir.ok_or(DataError::NoTokenizer)?;
        return Ok((Tokenizer::from_dir(dir)?.ok_or(DataError::NoTokenizer)?, Some(dir.to_path_buf())));
    };
    let own = out_dir.join("tokenizer");
    if let Some(size) = value.strip_prefix("bpe:") {
        if let Some(made_before) = Tokenizer::from_dir(&own)? {
            return Ok((made_before, Some(own)));
        }
        let bad =
            || DataError::BadTokenizer { value: value.clone(), reason: "expected a number of at least 257, as in bpe:1024".to_string() };
        let size: usize = size.parse().ok().filter(|size| *size > 256).ok_or_else(bad)?;
        let tokenizer = Tokenizer::train_bpe(texts(config)?.into_iter(), size, &[END])?;
        return keep(tokenizer, own, write);
    }
    let path = Path::new(value);
    if path.is_dir() {
        let bad = || DataError::BadTokenizer { value: value.clone(), reason: "the directory holds no tokenizer.json".to_string() };
        return Ok((Tokenizer::from_dir(path)?.ok_or_else(bad)?, Some(path.to_path_buf())));
    }
    if !path.exists() {
        return Err(DataError::BadTokenizer { value: value.clone(), reason: "no such file or directory".to_string() }.into());
    }
    keep(Tokenizer::from_file(path)?, own, write)
}

fn keep(tokenizer: Tokenizer, dir: PathBuf, write: bool) -> Result<(Tokenizer, Option<PathBuf>), TrainError> {
    if write {
        tokenizer.save(&dir)?;
    }
    Ok((tokenizer, Some(dir)))
}

/// All text of the training data.
fn texts(config: &RunConfig) -> Result<Vec<String>, TrainError> {
    let mut texts = Vec::new();
    for source in read_sources(&config.data.train, &config.data)? {
        match source {
            Source::Text(parts) => texts.extend(parts),
            Source::Examples(_, examples) => examples.into_iter().for_each(|(_, example)| match example {
                Example::Text(text) => texts.push(text),
                Example::Pair(prompt, completion) => texts.extend([prompt, completion]),
                Example::Instruction { instruction, input, output } => texts.extend([instruction, input, output]),
                Example::Chat(messages) => texts.extend(messages.into_iter().map(|message| message.content)),
            }),
        }
    }
    Ok(texts)
}
