//! Rows of Parquet files as JSON, as `to_json` of Python's datasets writes them.

use std::cell::Cell;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::panic::{self, AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Once;

use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::metadata::ParquetMetaData;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::{Map, Value};

use super::TaskError;
use crate::EvalError;

/// What the ends of every file are.
const MAGIC: &[u8] = b"PAR1";

/// What a clone without Git LFS has in the place of large files.
const LFS: &[u8] = b"version https://git-lfs";

/// Gives `visit` every row with its number, from 1, until it fails.
///
/// # Errors
/// [`TaskError::Parquet`] for what is no Parquet file, cut short or damaged, or has columns of a kind that the reader does not know;
/// [`TaskError::Codec`] for a compression that is not built in; what `visit` returned.
pub(super) fn each(path: &Path, visit: &mut dyn FnMut(usize, Value) -> Result<(), TaskError>) -> Result<(), EvalError> {
    let file = File::open(path).map_err(EvalError::io("read", path))?;
    // Of the cache the file itself: a link alone would not bring it again once it is gone.
    let real = || path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let fail = |reason: String| TaskError::Parquet { path: real(), reason };
    let reader = guarded(|| SerializedFileReader::new(file)).map_err(|reason| fail(unreadable(path, &reason)))?;
    codecs(reader.metadata(), path)?;
    let mut rows = guarded(|| reader.get_row_iter(None)).map_err(&fail)?;
    let mut number = 0;
    while let Some(row) = guarded(|| rows.next().transpose()).map_err(|reason| fail(format!("row {}: {reason}", number + 1)))? {
        number += 1;
        visit(number, object(&row))?;
    }
    let promised = reader.metadata().file_metadata().num_rows();
    if i64::try_from(number).ok() != Some(promised) {
        return Err(fail(format!("it promises {promised} rows and holds {number}")).into());
    }
    Ok(())
}

thread_local! {
    /// Whether a panic of this thread is caught and told as an error.
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// What the reader returns, or in words why it could not. Of what is in a file it checks much by assertions, of schemas, levels and lengths:
/// its panics are errors here, and what would be printed about them is held back.
fn guarded<T>(read: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !CAUGHT.get() {
                usual(info);
            }
        }));
    });
    CAUGHT.set(true);
    let result = catch_unwind(AssertUnwindSafe(read));
    CAUGHT.set(false);
    match result {
        Ok(read) => read.map_err(|error| error.to_string()),
        Err(payload) => {
            let text = payload.downcast_ref::<&str>().map(|text| text.to_string());
            Err(text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "something is not as it should be".into()))
        }
    }
}

/// Why a file could not be opened, in words for someone who does not know the format.
fn unreadable(path: &Path, reason: &str) -> String {
    let ends = ends(path).unwrap_or_default();
    let bytes = ends.bytes;
    match ends {
        Ends { first, .. } if first.starts_with(LFS) => {
            "it is a pointer of Git LFS and not the file it stands for, which `git lfs pull` brings".into()
        }
        Ends { first, .. } if !first.starts_with(MAGIC) => format!("its {bytes} bytes do not begin with PAR1, as Parquet does"),
        Ends { last, .. } if last != MAGIC => format!("its {bytes} bytes begin as Parquet and end without a footer: it was cut short"),
        _ => format!("its footer is damaged ({reason})"),
    }
}

/// Beginning and end of a file.
#[derive(Default)]
struct Ends {
    bytes: u64,
    first: Vec<u8>,
    last: Vec<u8>,
}

fn ends(path: &Path) -> std::io::Result<Ends> {
    let mut file = File::open(path)?;
    let bytes = file.metadata()?.len();
    let (mut first, mut last) = (Vec::new(), Vec::new());
    Read::by_ref(&mut file).take(LFS.len() as u64).read_to_end(&mut first)?;
    file.seek(SeekFrom::Start(bytes.saturating_sub(MAGIC.len() as u64)))?;
    file.read_to_end(&mut last)?;
    Ok(Ends { bytes, first, last })
}

/// Compressions that are built in; the others are said by their name before anything is read.
fn codecs(metadata: &ParquetMetaData, path: &Path) -> Result<(), TaskError> {
    let columns = metadata.row_groups().iter().flat_map(|group| group.columns());
    let unread = columns
        .map(|column| (column.column_path().string(), column.compression()))
        .find(|(_, codec)| !matches!(codec, Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::GZIP(_) | Compression::ZSTD(_)));
    match unread {
        Some((column, codec)) => Err(TaskError::Codec { path: path.to_path_buf(), column, codec: name(codec) }),
        None => Ok(()),
    }
}

/// Without its level.
fn name(codec: Compression) -> String {
    let text = format!("{codec:?}");
    text.split('(').next().unwrap_or_default().to_string()
}

fn object(row: &Row) -> Value {
    Value::Object(row.get_column_iter().map(|(name, field)| (name.clone(), json(field))).collect())
}

/// A value as JSON has it. What JSON has not (infinite numbers, times, bytes) is null or what Parquet's own text of it is: no task
/// reads such a field.
fn json(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(value) => Value::from(*value),
        Field::Byte(value) => Value::from(*value),
        Field::Short(value) => Value::from(*value),
        Field::Int(value) => Value::from(*value),
        Field::Long(value) => Value::from(*value),
        Field::UByte(value) => Value::from(*value),
        Field::UShort(value) => Value::from(*value),
        Field::UInt(value) => Value::from(*value),
        Field::ULong(value) => Value::from(*value),
        Field::Float16(value) => Value::from(value.to_f64()),
        Field::Float(value) => Value::from(*value),
        Field::Double(value) => Value::from(*value),
        Field::Str(value) => Value::from(value.as_str()),
        Field::Group(row) => object(row),
        Field::ListInternal(list) => list.elements().iter().map(json).collect(),
        Field::MapInternal(map) => {
            let key = |field: &Field| if let Field::Str(text) = field { text.clone() } else { json(field).to_string() };
            Value::Object(map.entries().iter().map(|(name, value)| (key(name), json(value))).collect::<Map<_, _>>())
        }
        Field::TimeMillis(value) => Value::from(*value),
        Field::TimeMicros(value) | Field::TimestampMillis(value) | Field::TimestampMicros(value) => Value::from(*value),
        Field::Date(value) => Value::from(*value),
        Field::Decimal(_) | Field::Bytes(_) => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/datasets").join(name)
    }

    fn rows(path: &Path) -> Result<Vec<Value>, EvalError> {
        let mut found = Vec::new();
        each(path, &mut |_, row| {
            found.push(row);
            Ok(())
        })?;
        Ok(found)
    }

    fn lines(path: &Path) -> Vec<Value> {
        std::fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn reason(path: &Path) -> String {
        match rows(path) {
            Err(EvalError::Task(TaskError::Parquet { reason, .. })) => reason,
            other => panic!("{}: {other:?}", path.display()),
        }
    }

    #[test]
    fn every_type_comes_out_as_json() {
        let wanted = lines(&fixture("odd/types.jsonl"));
        for name in ["odd/types.parquet", "odd/encodings.parquet"] {
            let found = rows(&fixture(name)).unwrap();
            assert_eq!(found.len(), wanted.len());
            for (found, wanted) in found.iter().zip(&wanted) {
                for (field, value) in wanted.as_object().unwrap() {
                    assert_eq!(&found[field], value, "{name}, {field}");
                }
            }
            // No number of JSON's.
            assert_eq!((&found[2]["f32"], &found[3]["f32"]), (&Value::Null, &Value::Null));
        }
    }

    #[test]
    fn compressions_that_are_not_built_in_are_named() {
        for (name, codec) in [("brotli", "BROTLI"), ("lz4", "LZ4_RAW")] {
            let error = rows(&fixture(&format!("odd/{name}.parquet"))).unwrap_err();
            assert!(matches!(&error, EvalError::Task(TaskError::Codec { codec: found, .. }) if found == codec), "{error}");
            assert!(error.to_string().contains("Snappy, gzip, Zstandard"), "{error}");
        }
    }

    #[test]
    fn types_the_reader_does_not_know_are_an_error_or_a_number() {
        // Units that Parquet's older type names have not.
        assert_eq!(rows(&fixture("odd/nanoseconds.parquet")).unwrap(), [serde_json::json!({"question": "Why?", "duration": 1, "time": 1})]);
    }

    #[test]
    fn what_is_no_parquet_is_said_to_be_what_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.parquet");
        for (bytes, word) in [
            (&b""[..], "0 bytes do not begin"),
            (b"<html>sign in</html>", "do not begin with PAR1"),
            (b"PAR1PAR1", "footer"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            assert!(reason(&path).contains(word), "{}", reason(&path));
        }
        assert!(matches!(rows(&dir.path().join("absent.parquet")), Err(EvalError::Io { .. })));
    }

    #[test]
    fn files_cut_short_are_refused_wherever_they_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.parquet");
        let bytes = std::fs::read(fixture("hub/allenai/ai2_arc/ARC-Easy/test/0001.parquet")).unwrap();
        for length in 8..bytes.len() {
            std::fs::write(&path, &bytes[..length]).unwrap();
            assert!(reason(&path).contains("cut short"), "{length}: {}", reason(&path));
        }
    }

    #[test]
    fn damaged_bytes_give_rows_or_an_error_and_never_a_panic() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.parquet");
        let mut caught = 0;
        for (name, step) in [("odd/types.parquet", 11), ("odd/encodings.parquet", 7), ("hub/Rowan/hellaswag/default/train/0000.parquet", 3)]
        {
            let bytes = std::fs::read(fixture(name)).unwrap();
            for at in (0..bytes.len()).step_by(step) {
                for bits in [1, 0x80, 0xff] {
                    let mut damaged = bytes.clone();
                    damaged[at] ^= bits;
                    std::fs::write(&path, &damaged).unwrap();
                    match rows(&path) {
                        Ok(_) => {}
                        Err(EvalError::Task(TaskError::Parquet { .. } | TaskError::Codec { .. })) => caught += 1,
                        Err(error) => panic!("{name}, byte {at}: {error}"),
                    }
                }
            }
        }
        assert!(caught > 1000, "{caught}");
        assert!(!CAUGHT.get());
    }
}
