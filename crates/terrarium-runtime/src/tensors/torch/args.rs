//! What else a training checkpoint of Megatron holds: the arguments of the run.

use serde_json::{Map, Number, Value};

use super::{Archive, torch};
use crate::Result;
use crate::error::TorchError;
use crate::pickle::{Id, Node, Pickle};
use crate::tensors::Header;

/// Values within the arguments, lists unfolded: far above any real run, far below what shared lists can unfold to.
const MAX_VALUES: usize = 1 << 16;

/// Lists within lists.
const MAX_NESTED: usize = 4;

/// The tensors of the `model` of a Megatron checkpoint and the plain values of its `args`.
pub(in crate::tensors) fn megatron_parts(archive: &Archive) -> Result<(Header, Map<String, Value>)> {
    let pickle = &archive.pickle;
    let root = pickle.root();
    let wrong = |problem: String| torch(TorchError::Container { file: archive.path.to_path_buf(), problem });
    if pickle.lookup(root, "model0").is_some() {
        return Err(wrong("it is of an interleaved (virtual) pipeline, `model0` and on: save it again without one".into()));
    }
    let Some(model) = pickle.lookup(root, "model") else {
        return Err(wrong(format!("it holds {} without a `model`: not a checkpoint of Megatron", pickle.describe(root))));
    };
    let (mut args, mut left) = (Map::new(), MAX_VALUES);
    for (key, value) in pickle.lookup(root, "args").and_then(|id| attributes(pickle, id)).unwrap_or_default() {
        if let (Some(key), Some(value)) = (pickle.str(key), plain(pickle, value, 0, &mut left)) {
            args.insert(key.to_string(), value);
        }
    }
    Ok((archive.tensors(model)?, args))
}

/// Names and values of a namespace or a dict.
fn attributes(pickle: &Pickle, id: Id) -> Option<Vec<(Id, Id)>> {
    match pickle.object(id) {
        Some(("argparse", "Namespace", object) | ("types", "SimpleNamespace", object)) => pickle.pairs(object.state?),
        // Protocols 0 and 1 build a namespace by way of `copyreg`.
        Some(("copyreg" | "copy_reg", "_reconstructor", object)) => pickle.pairs(object.state?),
        _ => pickle.pairs(id),
    }
}

/// Numbers, strings, null and lists of them; nothing else has a place among arguments.
fn plain(pickle: &Pickle, id: Id, depth: usize, left: &mut usize) -> Option<Value> {
    *left = left.checked_sub(1)?;
    Some(match pickle.get(id) {
        Node::None => Value::Null,
        Node::Bool(value) => (*value).into(),
        Node::Int(value) => (*value).into(),
        Node::Float(value) => Value::Number(Number::from_f64(*value)?),
        Node::Str(text) => Value::String(text.to_string()),
        Node::Tuple(_) | Node::List(_) if depth < MAX_NESTED => {
            let items = pickle.items(id)?.iter().map(|&item| plain(pickle, item, depth + 1, left));
            Value::Array(items.collect::<Option<_>>()?)
        }
        _ => return None,
    })
}
