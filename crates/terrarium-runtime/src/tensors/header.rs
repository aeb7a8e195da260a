//! Reading and checking a safetensors header.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use burn::tensor::DType;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

/// The format's own limit; also keeps a damaged length from asking for memory that is not there.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Element types of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ElementType {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    I16,
    I8,
    U64,
    U32,
    U16,
    U8,
    Bool,
    /// Eight-bit floats, complex numbers and other known types that no operation here takes: name and bits.
    Other(&'static str, u64),
}

/// Types that a file may hold without being damaged, and that are never loaded.
const OTHERS: [(&str, u64); 11] = [
    ("F4", 4),
    ("F6_E2M3", 6),
    ("F6_E3M2", 6),
    ("F8_E4M3", 8),
    ("F8_E5M2", 8),
    ("F8_E8M0", 8),
    ("F8_E4M3FNUZ", 8),
    ("F8_E5M2FNUZ", 8),
    ("C64", 64),
    ("C128", 128),
    ("F128", 128),
];

const NAMES: [(&str, ElementType, u64); 13] = [
    ("F64", ElementType::F64, 64),
    ("F32", ElementType::F32, 32),
    ("F16", ElementType::F16, 16),
    ("BF16", ElementType::BF16, 16),
    ("I64", ElementType::I64, 64),
    ("I32", ElementType::I32, 32),
    ("I16", ElementType::I16, 16),
    ("I8", ElementType::I8, 8),
    ("U64", ElementType::U64, 64),
    ("U32", ElementType::U32, 32),
    ("U16", ElementType::U16, 16),
    ("U8", ElementType::U8, 8),
    ("BOOL", ElementType::Bool, 8),
];

impl ElementType {
    fn parse(name: &str) -> Option<Self> {
        let plain = NAMES.iter().find(|(n, ..)| *n == name).map(|(_, t, _)| *t);
        plain.or_else(|| OTHERS.iter().find(|(n, _)| *n == name).map(|(n, bits)| Self::Other(n, *bits)))
    }

    /// The format's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Other(name, _) => name,
            _ => NAMES.iter().find(|(_, t, _)| *t == self).map_or("?", |(n, ..)| n),
        }
    }

    /// Bits of one element.
    pub fn bits(self) -> u64 {
        match self {
            Self::Other(_, bits) => bits,
            _ => NAMES.iter().find(|(_, t, _)| *t == self).map_or(0, |(.., bits)| *bits),
        }
    }

    /// Burn's name for it, if it has one.
    pub fn dtype(self) -> Option<DType> {
        Some(match self {
            Self::F64 => DType::F64,
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
            Self::I64 => DType::I64,
            Self::I32 => DType::I32,
            Self::I16 => DType::I16,
            Self::I8 => DType::I8,
            Self::U64 => DType::U64,
            Self::U32 => DType::U32,
            Self::U16 => DType::U16,
            Self::U8 => DType::U8,
            Self::Bool => DType::Bool(burn::tensor::BoolStore::Native),
            Self::Other(..) => return None,
        })
    }

    /// The format's type for tensors of `dtype`.
    pub fn of(dtype: DType) -> Option<Self> {
        if matches!(dtype, DType::Bool(_)) {
            return Some(Self::Bool);
        }
        NAMES.iter().map(|(_, t, _)| *t).find(|t| t.dtype() == Some(dtype))
    }

    /// Whether a model can be built from it.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F64 | Self::F32 | Self::F16 | Self::BF16)
    }
}

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its key.
    pub key: String,
    /// Its element type.
    pub element: ElementType,
    /// Its shape.
    pub shape: Vec<usize>,
    /// First byte, counted from the end of the header (safetensors) or the start of the file (PyTorch).
    pub begin: u64,
    /// One past the last byte.
    pub end: u64,
    /// Elements between neighbours along each dimension; `None` if they follow one another row by row.
    pub strides: Option<Vec<usize>>,
}

impl Entry {
    /// Elements of the tensor. The shape was checked to fit.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of the tensor's elements.
    pub fn bytes(&self) -> u64 {
        (self.elements() as u64).saturating_mul(self.element.bits()) / 8
    }
}

/// A checked list of tensors. Those of safetensors come in the order of their bytes, which follow one another without
/// holes; those of PyTorch in the order of their dictionary.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Header {
    /// The tensors.
    pub entries: Vec<Entry>,
    /// The `__metadata__` of the file.
    pub metadata: BTreeMap<String, String>,
    /// Bytes of all tensors.
    pub data_bytes: u64,
}

/// Parses and checks the JSON of a header (without its length). The error is a sentence that names the key at fault.
pub fn parse_header(json: &[u8]) -> Result<Header, String> {
    let text = std::str::from_utf8(json).map_err(|e| format!("the header is not UTF-8: {e}"))?;
    let raw: RawHeader = serde_json::from_str(text).map_err(|e| format!("the header does not parse: {e}"))?;
    let mut entries = Vec::with_capacity(raw.entries.len());
    for (key, info) in raw.entries {
        entries.push(check_entry(key, info)?);
    }
    // Empty tensors may share an offset with a neighbour: they go first, so that the chain below closes.
    entries.sort_by_key(|e| (e.begin, e.end));
    let mut cursor = 0;
    for (i, entry) in entries.iter().enumerate() {
        if entry.begin < cursor {
            let before = &entries[i.saturating_sub(1)].key;
            return Err(format!("`{}` starts at byte {} inside `{before}`, which ends at {cursor}: they overlap", entry.key, entry.begin));
        }
        if entry.begin > cursor {
            return Err(format!(
                "`{}` starts at byte {}, {} bytes after the tensor before it ends: a hole",
                entry.key,
                entry.begin,
                entry.begin - cursor
            ));
        }
        cursor = entry.end;
    }
    Ok(Header { entries, metadata: raw.metadata, data_bytes: cursor })
}

fn check_entry(key: String, info: RawEntry) -> Result<Entry, String> {
    let RawEntry { dtype, shape, data_offsets: (begin, end) } = info;
    let element = ElementType::parse(&dtype).ok_or_else(|| format!("`{key}` has the unknown dtype `{dtype}`"))?;
    let absurd = || format!("`{key}` has the absurd shape {shape:?}: its size does not fit 64 bits");
    let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).ok_or_else(absurd)?;
    let bits = elements.checked_mul(element.bits()).ok_or_else(absurd)?;
    if bits % 8 != 0 {
        return Err(format!("`{key}` ({dtype} {shape:?}) does not end on a whole byte"));
    }
    if end < begin {
        return Err(format!("`{key}` ends at byte {end}, before it starts ({begin})"));
    }
    if end - begin != bits / 8 {
        return Err(format!("`{key}`: {dtype} {shape:?} needs {} bytes, its offsets {begin}..{end} give {}", bits / 8, end - begin));
    }
    let dims = shape.iter().map(|&d| usize::try_from(d)).collect::<Result<Vec<_>, _>>().map_err(|_| absurd())?;
    Ok(Entry { key, element, shape: dims, begin, end, strides: None })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// Keeps the pairs of the JSON object as they come: a map would silently keep one of two equal keys.
struct RawHeader {
    entries: Vec<(String, RawEntry)>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of key -> {dtype, shape, data_offsets}")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        use serde::de::Error;
        let mut header = RawHeader { entries: Vec::new(), metadata: BTreeMap::new() };
        let mut seen = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            if !seen.insert(key.clone()) {
                return Err(A::Error::custom(format!("the key `{key}` is there twice")));
            }
            if key == "__metadata__" {
                header.metadata = map.next_value()?;
            } else {
                let entry = map.next_value().map_err(|e| A::Error::custom(format!("`{key}`: {e}")))?;
                header.entries.push((key, entry));
            }
        }
        Ok(header)
    }
}
