//! From the record of a call of `torch._utils._rebuild_*` to where a tensor's elements are.

use crate::pickle::{Id, Node, Pickle};
use crate::tensors::ElementType;

/// A tensor as a view of a storage; counts in elements. Nothing about it has been compared with the storage's bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct View {
    /// Name of the storage in the archive.
    pub storage: String,
    /// Bytes the storage claims to have.
    pub storage_bytes: u64,
    pub element: ElementType,
    pub offset: u64,
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
}

/// Storage class (without `Storage`) or dtype, and the element type.
const TYPES: [(&str, &str, ElementType); 25] = [
    ("Double", "float64", ElementType::F64),
    ("Float", "float32", ElementType::F32),
    ("Half", "float16", ElementType::F16),
    ("BFloat16", "bfloat16", ElementType::BF16),
    ("Long", "int64", ElementType::I64),
    ("Int", "int32", ElementType::I32),
    ("Short", "int16", ElementType::I16),
    ("Char", "int8", ElementType::I8),
    ("Byte", "uint8", ElementType::U8),
    ("Bool", "bool", ElementType::Bool),
    ("ComplexFloat", "complex64", ElementType::Other("C64", 64)),
    ("ComplexDouble", "complex128", ElementType::Other("C128", 128)),
    ("", "uint64", ElementType::U64),
    ("", "uint32", ElementType::U32),
    ("", "uint16", ElementType::U16),
    ("", "float8_e4m3fn", ElementType::Other("F8_E4M3", 8)),
    ("", "float8_e5m2", ElementType::Other("F8_E5M2", 8)),
    ("", "float8_e8m0fnu", ElementType::Other("F8_E8M0", 8)),
    ("", "float8_e4m3fnuz", ElementType::Other("F8_E4M3FNUZ", 8)),
    ("", "float8_e5m2fnuz", ElementType::Other("F8_E5M2FNUZ", 8)),
    ("", "double", ElementType::F64),
    ("", "float", ElementType::F32),
    ("", "half", ElementType::F16),
    ("", "long", ElementType::I64),
    ("", "int", ElementType::I32),
];

/// More dimensions than torch allows are no tensor.
const MAX_DIMS: usize = 64;

/// Wrappers within wrappers: a parameter of a tensor with attributes is three.
const MAX_WRAPPERS: usize = 4;

/// The tensor that a value stands for; `None` if it is none at all. The error continues "`key` ...".
pub(super) fn view(pickle: &Pickle, value: Id) -> Result<Option<View>, String> {
    let mut value = value;
    for _ in 0..MAX_WRAPPERS {
        let Some((module, name, object)) = pickle.object(value) else { return Ok(None) };
        let args = pickle.args(object);
        match (module, name) {
            ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => {
                value = *args.first().ok_or("is a parameter of nothing")?;
            }
            ("torch._tensor", "_rebuild_from_type_v2") => {
                let [function, _, inner, ..] = args else { return Err("is a tensor with attributes that lacks its tensor".into()) };
                let (Some((_, name)), Some(inner)) = (pickle.global(*function), pickle.items(*inner)) else {
                    return Err("is a tensor with attributes whose parts are not what torch.save writes".into());
                };
                return rebuild(pickle, name, inner).map(Some);
            }
            ("torch._utils", name) => return rebuild(pickle, name, args).map(Some),
            _ => return Ok(None),
        }
    }
    Err("is wrapped too often".into())
}

fn rebuild(pickle: &Pickle, name: &str, args: &[Id]) -> Result<View, String> {
    let (needed, typed) = match name {
        "_rebuild_tensor" => (4, true),
        "_rebuild_tensor_v2" => (6, true),
        "_rebuild_tensor_v3" => (7, false),
        other => return Err(format!("is made by {other}, which is not read: save a plain dense tensor of it")),
    };
    if args.len() < needed {
        return Err(format!("has {} of the {needed} arguments of {name}", args.len()));
    }
    let metadata = args.get(needed).map(|&m| pickle.pairs(m));
    if metadata.is_some_and(|pairs| pairs.is_some_and(|p| !p.is_empty())) {
        return Err("is a view that is conjugated or negated when read: save its `resolve_conj().resolve_neg()`".into());
    }
    let (storage, class, elements) = storage(pickle, args[0])?;
    let element = if typed { storage_type(&class)? } else { dtype(pickle, args[6])? };
    let offset = pickle.int(args[1]).and_then(|n| u64::try_from(n).ok()).ok_or("starts at a negative offset, or none")?;
    let (shape, strides) = (counts(pickle, args[2], "shape")?, counts(pickle, args[3], "strides")?);
    if shape.len() != strides.len() {
        return Err(format!("has the shape {shape:?} and the strides {strides:?}, which are not as many"));
    }
    // An untyped storage counts its bytes.
    let width = if class == "Untyped" { 1 } else { element.bits() / 8 };
    let storage_bytes = elements.checked_mul(width).ok_or_else(|| format!("claims a storage of {elements} elements"))?;
    Ok(View { storage, storage_bytes, element, offset, shape, strides })
}

/// Key, class and number of elements of the storage behind a persistent id.
fn storage(pickle: &Pickle, value: Id) -> Result<(String, String, u64), String> {
    let unexpected = || format!("has {} where its storage should be", pickle.describe(value));
    let Node::Persistent(id) = pickle.get(value) else { return Err(unexpected()) };
    let Some([kind, class, key, _device, elements, ..]) = pickle.items(*id) else { return Err(unexpected()) };
    let class = match pickle.global(*class) {
        Some(("torch" | "torch.storage" | "torch.cuda", class)) => class.strip_suffix("Storage"),
        _ => None,
    };
    match (pickle.str(*kind), class, pickle.str(*key), pickle.int(*elements).map(u64::try_from)) {
        (Some("storage"), Some(class), Some(key), Some(Ok(elements))) => Ok((key.to_string(), class.to_string(), elements)),
        _ => Err("has a storage that is not described as torch.save describes it".into()),
    }
}

fn storage_type(class: &str) -> Result<ElementType, String> {
    let found = TYPES.iter().find(|(name, ..)| !class.is_empty() && *name == class);
    found.map(|(.., element)| *element).ok_or_else(|| format!("has a storage of the unknown type torch.{class}Storage"))
}

fn dtype(pickle: &Pickle, value: Id) -> Result<ElementType, String> {
    let Some(("torch", name)) = pickle.global(value) else { return Err(format!("has {} as its dtype", pickle.describe(value))) };
    let found = TYPES.iter().find(|(_, dtype, _)| *dtype == name);
    found.map(|(.., element)| *element).ok_or_else(|| format!("has the unknown dtype torch.{name}"))
}

fn counts(pickle: &Pickle, value: Id, what: &str) -> Result<Vec<usize>, String> {
    let items = pickle.items(value).ok_or_else(|| format!("has {} as its {what}", pickle.describe(value)))?;
    if items.len() > MAX_DIMS {
        return Err(format!("has {} dimensions, more than {MAX_DIMS}", items.len()));
    }
    let count = |&id: &Id| pickle.int(id).and_then(|n| usize::try_from(n).ok());
    items.iter().map(count).collect::<Option<_>>().ok_or_else(|| format!("has {what} that are negative or no integers"))
}
