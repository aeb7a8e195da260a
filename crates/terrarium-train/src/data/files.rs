//! Finding and reading data files.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::DataError;
use super::examples::{Example, parse_example};
use crate::config::{DataConfig, Format};

/// The content of one file.
#[derive(Debug)]
pub enum Source {
    /// Documents of plain text.
    Text(Vec<String>),
    /// Examples with the place each came from (`line 7`).
    Examples(PathBuf, Vec<(String, Example)>),
}

/// Reads every file that `paths` name, directories included, in order.
///
/// # Errors
/// [`DataError`] names the file, and the line of an example that does not parse.
pub fn read_sources(paths: &[PathBuf], config: &DataConfig) -> Result<Vec<Source>, DataError> {
    let mut files = Vec::new();
    for path in paths {
        collect(path, &mut files)?;
    }
    files.iter().map(|file| read(file, config)).collect()
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> Result<(), DataError> {
    let unreadable = |source| DataError::Read { path: path.to_path_buf(), source };
    if !std::fs::metadata(path).map_err(unreadable)?.is_dir() {
        files.push(path.to_path_buf());
        return Ok(());
    }
    let found = files.len();
    walk(path, files).map_err(unreadable)?;
    if files.len() == found { Err(DataError::NoFiles { path: path.to_path_buf() }) } else { Ok(()) }
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    let mut entries = std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
    entries.sort();
    for entry in entries {
        let ending = entry.extension().and_then(|ending| ending.to_str()).unwrap_or("");
        if entry.is_dir() {
            walk(&entry, files)?;
        } else if matches!(ending, "txt" | "md" | "jsonl" | "json") {
            files.push(entry);
        }
    }
    Ok(())
}

fn read(path: &Path, config: &DataConfig) -> Result<Source, DataError> {
    let bytes = std::fs::read(path).map_err(|source| DataError::Read { path: path.to_path_buf(), source })?;
    let text = String::from_utf8(bytes)
        .map_err(|error| DataError::NotText { path: path.to_path_buf(), offset: error.utf8_error().valid_up_to() })?;
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or("");
    match (config.format, ending) {
        (Format::Jsonl, _) | (Format::Auto, "jsonl") => Ok(Source::Examples(path.to_path_buf(), lines(path, &text)?)),
        (Format::Json, _) | (Format::Auto, "json") => Ok(Source::Examples(path.to_path_buf(), items(path, &text)?)),
        _ => Ok(Source::Text(documents(text, config.separator.as_deref()))),
    }
}

fn documents(text: String, separator: Option<&str>) -> Vec<String> {
    let parts: Vec<String> = match separator.filter(|separator| !separator.is_empty()) {
        Some(separator) => text.split(separator).map(|part| part.trim().to_string()).collect(),
        None => vec![text],
    };
    parts.into_iter().filter(|part| !part.trim().is_empty()).collect()
}

fn lines(path: &Path, text: &str) -> Result<Vec<(String, Example)>, DataError> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(index, line)| {
            let place = format!("line {}", index + 1);
            let value: Result<Value, _> = serde_json::from_str(line);
            let parsed = value.map_err(|error| format!("not JSON: {}", without_line(&error))).and_then(|value| parse_example(&value));
            match parsed {
                Ok(example) => Ok((place, example)),
                Err(reason) => Err(DataError::Example { path: path.to_path_buf(), place, reason }),
            }
        })
        .collect()
}

/// Every line is parsed alone, so that the parser's own "line 1" would only confuse.
fn without_line(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let end = text.rfind(" at line ").unwrap_or(text.len());
    format!("{} at column {}", &text[..end], error.column())
}

fn items(path: &Path, text: &str) -> Result<Vec<(String, Example)>, DataError> {
    let fail = |place: String, reason: String| DataError::Example { path: path.to_path_buf(), place, reason };
    let value: Value = serde_json::from_str(text).map_err(|error| fail(format!("line {}", error.line()), format!("not JSON: {error}")))?;
    let Value::Array(items) = value else {
        return Err(fail("line 1".into(), "expected an array of examples; for one example per line, name the file .jsonl".into()));
    };
    let numbered = items.iter().enumerate();
    numbered
        .map(|(index, item)| {
            let place = format!("item {}", index + 1);
            parse_example(item).map(|example| (place.clone(), example)).map_err(|reason| fail(place, reason))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(name: &str, text: &str) -> Result<Source, DataError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        read_sources(&[path], &DataConfig::default()).map(|mut sources| sources.remove(0))
    }

    #[test]
    fn a_broken_line_is_named() {
        let good = r#"{"prompt": "a", "completion": "b"}"#;
        let error = read_text("x.jsonl", &format!("{good}\n\n{{\"prompt\": \n{good}\n")).unwrap_err().to_string();
        assert!(error.contains("x.jsonl line 3: not JSON"), "{error}");
        let error = read_text("x.jsonl", &format!("{good}\n{{\"question\": \"a\"}}\n")).unwrap_err().to_string();
        assert!(error.contains("x.jsonl line 2") && error.contains("question"), "{error}");
        let error = read_text("x.json", &format!("[{good}, 3]")).unwrap_err().to_string();
        assert!(error.contains("x.json item 2"), "{error}");
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let error = read_sources(&[PathBuf::from("/no/such/file.txt")], &DataConfig::default()).unwrap_err().to_string();
        assert!(error.contains("/no/such/file.txt"), "{error}");
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("picture.png"), "x").unwrap();
        let error = read_sources(&[dir.path().to_path_buf()], &DataConfig::default()).unwrap_err().to_string();
        assert!(error.contains("holds no .txt"), "{error}");
        let path = dir.path().join("latin1.txt");
        std::fs::write(&path, [b'a', 0xe9, b'b']).unwrap();
        assert!(read_sources(&[path], &DataConfig::default()).unwrap_err().to_string().contains("byte 1"));
    }

    #[test]
    fn directories_are_read_in_order_and_below() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("sub/empty")).unwrap();
        for (name, text) in [("b.txt", "two"), ("a.txt", "one"), ("sub/c.md", "three")] {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let sources = read_sources(&[dir.path().to_path_buf()], &DataConfig::default()).unwrap();
        let texts: Vec<String> = sources
            .iter()
            .flat_map(|source| match source {
                Source::Text(parts) => parts.clone(),
                Source::Examples(..) => Vec::new(),
            })
            .collect();
        assert_eq!(texts, ["one", "two", "three"]);
    }

    #[test]
    fn separators_split_documents() {
        assert_eq!(documents("a<|end|> b <|end|> <|end|>".into(), Some("<|end|>")), ["a", "b"]);
    }
}
