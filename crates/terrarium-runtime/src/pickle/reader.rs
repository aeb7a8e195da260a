//! Bytes of a pickle, taken from the front.

use crate::error::PickleError;

/// A cursor that never reads past the end and never allocates.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    /// Bytes read so far.
    pub at: usize,
}

type Result<T> = std::result::Result<T, PickleError>;

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The next `count` bytes, whatever a damaged file claims `count` to be.
    pub fn take(&mut self, count: u64) -> Result<&'a [u8]> {
        let left = self.left();
        match usize::try_from(count) {
            Ok(n) if n <= left => {
                let taken = &self.bytes[self.at..self.at + n];
                self.at += n;
                Ok(taken)
            }
            _ => Err(PickleError::Truncated { at: self.at, needed: count, left }),
        }
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64)?);
        Ok(array)
    }

    pub fn u8(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    pub fn u16(&mut self) -> Result<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn i32(&mut self) -> Result<i32> {
        self.array().map(i32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// Up to the next line end, which is taken and not returned.
    pub fn line(&mut self) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let Some(length) = rest.iter().position(|&b| b == b'\n') else {
            return Err(PickleError::Truncated { at: self.at, needed: rest.len() as u64 + 1, left: rest.len() });
        };
        self.at += length + 1;
        Ok(&rest[..length])
    }

    /// A line of ASCII or UTF-8 text.
    pub fn text(&mut self) -> Result<&'a str> {
        let at = self.at;
        std::str::from_utf8(self.line()?).map_err(|_| PickleError::Malformed { at, problem: "a name or number that is not UTF-8".into() })
    }
}

/// The bytes of a Python 2 string literal, its quotes and escapes undone.
pub(super) fn unquote(literal: &[u8]) -> Option<Vec<u8>> {
    let (&quote, rest) = literal.split_first()?;
    let (&last, inner) = rest.split_last()?;
    if !matches!(quote, b'\'' | b'"') || last != quote {
        return None;
    }
    let mut out = Vec::with_capacity(inner.len());
    let mut bytes = inner.iter().copied();
    while let Some(byte) = bytes.next() {
        if byte != b'\\' {
            out.push(byte);
            continue;
        }
        match bytes.next()? {
            b'n' => out.push(b'\n'),
            b't' => out.push(b'\t'),
            b'r' => out.push(b'\r'),
            b'x' => out.push(hex(&mut bytes, 2)? as u8),
            other @ (b'\\' | b'\'' | b'"') => out.push(other),
            _ => return None,
        }
    }
    Some(out)
}

/// Text of protocol 0: Latin-1 with `\u` and `\U` escapes.
pub(super) fn unescape(line: &[u8]) -> Option<String> {
    let mut out = String::with_capacity(line.len());
    let mut bytes = line.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match (byte, bytes.peek()) {
            (b'\\', Some(&kind @ (b'u' | b'U'))) => {
                bytes.next();
                out.push(char::from_u32(hex(&mut bytes, if kind == b'u' { 4 } else { 8 })?)?);
            }
            _ => out.push(char::from(byte)),
        }
    }
    Some(out)
}

fn hex(bytes: &mut impl Iterator<Item = u8>, digits: usize) -> Option<u32> {
    (0..digits).try_fold(0u32, |value, _| Some(value << 4 | char::from(bytes.next()?).to_digit(16)?))
}
