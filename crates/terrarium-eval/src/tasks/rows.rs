//! From files to rows: JSON lines and Parquet.

use std::path::Path;

use serde_json::Value;

use super::{TaskError, parquet};
use crate::EvalError;

/// The file as text.
pub(super) fn read(path: &Path) -> Result<String, EvalError> {
    std::fs::read_to_string(path).map_err(EvalError::io("read", path))
}

/// Gives `visit` every row of the files, in order, with its number in its file, from 1.
///
/// # Errors
/// Those of reading; [`TaskError::Document`] for a row that `visit` refuses with the field that is missing or wrong, and where there are no rows.
pub(super) fn each(paths: &[impl AsRef<Path>], mut visit: impl FnMut(&Value) -> Result<(), String>) -> Result<(), EvalError> {
    let mut found = 0;
    for path in paths.iter().map(AsRef::as_ref) {
        let mut row = |number: usize, value: Value| {
            found += 1;
            visit(&value).map_err(|reason| TaskError::Document { path: path.to_path_buf(), number, reason })
        };
        if path.extension().is_some_and(|ending| ending == "parquet") {
            parquet::each(path, &mut row)?;
        } else {
            lines(path, &mut row)?;
        }
    }
    match paths.first() {
        Some(first) if found == 0 => {
            Err(TaskError::Document { path: first.as_ref().to_path_buf(), number: 1, reason: "the file holds none".into() }.into())
        }
        _ => Ok(()),
    }
}

fn lines(path: &Path, visit: &mut dyn FnMut(usize, Value) -> Result<(), TaskError>) -> Result<(), EvalError> {
    for (i, line) in read(path)?.lines().filter(|line| !line.trim().is_empty()).enumerate() {
        let fail = |error: serde_json::Error| TaskError::Document { path: path.to_path_buf(), number: i + 1, reason: error.to_string() };
        visit(i + 1, serde_json::from_str(line).map_err(fail)?)?;
    }
    Ok(())
}

/// What to say of a row without a usable field.
pub(super) fn unusable(field: &str, row: &Value) -> String {
    let names: Vec<&str> = row.as_object().into_iter().flat_map(|fields| fields.keys()).map(String::as_str).collect();
    let found = if names.is_empty() { "it has none".to_string() } else { format!("its fields are {}", names.join(", ")) };
    format!("no usable `{field}`; {found}")
}
