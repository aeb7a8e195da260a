//! Which globals a checkpoint may construct: plain data and nothing that does anything.

/// Module and names of constructors. A name that ends in `*` stands for all names that start so.
const DATA: [(&str, &[&str]); 38] = [
    ("torch._utils", &["_rebuild_*"]),
    ("torch._tensor", &["_rebuild_from_type", "_rebuild_from_type_v2"]),
    ("torch", &["Size", "device", "dtype", "Tensor", "layout"]),
    ("torch.serialization", &["_get_layout"]),
    ("torch.nn.parameter", &["Parameter", "Buffer"]),
    ("torch.storage", &["TypedStorage", "UntypedStorage", "_TypedStorage", "_UntypedStorage"]),
    ("collections", &["OrderedDict", "defaultdict", "Counter", "deque"]),
    ("argparse", &["Namespace"]),
    ("types", &["SimpleNamespace"]),
    ("_io", &["BytesIO"]),
    ("io", &["BytesIO"]),
    ("_codecs", &["encode"]),
    ("numpy", &["ndarray", "dtype"]),
    ("numpy.core.multiarray", &["_reconstruct", "scalar"]),
    ("numpy._core.multiarray", &["_reconstruct", "scalar"]),
    ("numpy.core.numeric", &["_frombuffer"]),
    ("numpy._core.numeric", &["_frombuffer"]),
    ("numpy.random._pickle", &["__randomstate_ctor", "__generator_ctor", "__bit_generator_ctor"]),
    ("numpy.random._mt19937", &["MT19937"]),
    ("numpy.random._pcg64", &["PCG64", "PCG64DXSM"]),
    ("numpy.random._philox", &["Philox"]),
    ("numpy.random._sfc64", &["SFC64"]),
    ("numpy.random.bit_generator", &["SeedSequence"]),
    ("numpy.dtypes", &["*"]),
    ("pathlib", PATHS),
    ("pathlib._local", PATHS),
    ("datetime", &["datetime", "date", "time", "timedelta", "timezone"]),
    ("builtins", BUILTINS),
    ("__builtin__", BUILTINS),
    ("copyreg", &["_reconstructor"]),
    ("copy_reg", &["_reconstructor"]),
    ("signal", &["Signals"]),
    ("uuid", &["UUID"]),
    ("decimal", &["Decimal"]),
    ("fractions", &["Fraction"]),
    ("torch.torch_version", &["TorchVersion"]),
    ("torch.random", &["Generator"]),
    ("torch._C", &["Generator"]),
];

const PATHS: &[&str] = &["Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"];

/// `getattr` only of a class on this list and a name, which is how newer pickles spell an enum's member.
const BUILTINS: &[&str] = &[
    "set",
    "frozenset",
    "dict",
    "list",
    "tuple",
    "bytearray",
    "bytes",
    "complex",
    "int",
    "long",
    "float",
    "str",
    "unicode",
    "bool",
    "slice",
    "range",
    "xrange",
    "object",
    "getattr",
];

/// Packages whose classes (configurations, enums, quantiser states) training checkpoints are full of.
const PACKAGES: [&str; 4] = ["megatron", "transformer_engine", "apex", "nemo"];

/// Whether a call of this global may be recorded.
pub(super) fn may_construct(module: &str, name: &str) -> bool {
    if DATA.iter().any(|(m, names)| *m == module && names.iter().any(|pattern| fits(pattern, name))) {
        return true;
    }
    if module == "torch" && name.strip_suffix("Storage").is_some_and(|kind| kind.bytes().all(|b| b.is_ascii_alphanumeric())) {
        return true;
    }
    let package = module.split('.').next().unwrap_or("");
    PACKAGES.contains(&package) && name.split('.').all(is_class)
}

fn fits(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'),
        None => pattern == name,
    }
}

/// Classes are capitalised; functions, and modules reached through a dotted name, are not.
fn is_class(part: &str) -> bool {
    part.trim_start_matches('_').starts_with(|c: char| c.is_ascii_uppercase())
        && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}
