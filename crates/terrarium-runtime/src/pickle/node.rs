//! What a pickle holds, as an arena of nodes.

use std::borrow::Cow;

/// Index of a node in its [`Pickle`].
pub(crate) type Id = u32;

/// One value. Children are indices; strings and bytes are borrowed from the pickle wherever they stand in it verbatim.
#[derive(Debug)]
pub(crate) enum Node<'a> {
    None,
    Bool(bool),
    Int(i64),
    /// An integer beyond 64 bits, which no tensor needs.
    Big,
    Float(f64),
    Str(Box<Cow<'a, str>>),
    /// Bytes, which no tensor and no argument is made of.
    Bytes,
    Tuple(Box<[Id]>),
    List(Vec<Id>),
    Set(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A name of a class or function: module and name.
    Global(Box<(Cow<'a, str>, Cow<'a, str>)>),
    /// What a call of a global would have made.
    Object(Box<Object>),
    /// A reference to something outside of the pickle, such as a storage.
    Persistent(Id),
}

/// A call that was not made, and what would have been done to its result.
#[derive(Debug, Default)]
pub(crate) struct Object {
    /// The global.
    pub callee: Id,
    /// The tuple of arguments.
    pub args: Id,
    /// What it would have been built up with (`__setstate__`).
    pub state: Option<Id>,
    /// What would have been appended to it.
    pub items: Vec<Id>,
    /// What would have been set in it by key.
    pub pairs: Vec<(Id, Id)>,
}

/// A parsed pickle.
#[derive(Debug)]
pub(crate) struct Pickle<'a> {
    pub(super) nodes: Vec<Node<'a>>,
    pub(super) root: Id,
}

/// Dictionaries by another name.
const DICTS: [&str; 3] = ["OrderedDict", "defaultdict", "Counter"];

impl<'a> Pickle<'a> {
    /// The value of the whole.
    pub fn root(&self) -> Id {
        self.root
    }

    /// A node; `None` (Python's) for an index of another pickle.
    pub fn get(&self, id: Id) -> &Node<'a> {
        self.nodes.get(id as usize).unwrap_or(&Node::None)
    }

    /// A string.
    pub fn str(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Node::Str(text) => Some(text),
            _ => None,
        }
    }

    /// An integer that fits 64 bits.
    pub fn int(&self, id: Id) -> Option<i64> {
        match self.get(id) {
            Node::Int(value) => Some(*value),
            _ => None,
        }
    }

    /// The items of a tuple (also of a `torch.Size`) or a list.
    pub fn items(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Node::Tuple(items) => Some(items),
            Node::List(items) => Some(items),
            Node::Object(_) => match self.object(id)? {
                ("torch", "Size", object) => match self.get(*self.args(object).first()?) {
                    Node::Tuple(items) => Some(items),
                    Node::List(items) => Some(items),
                    _ => None,
                },
                _ => None,
            },
            _ => None,
        }
    }

    /// Module and name of a global.
    pub fn global(&self, id: Id) -> Option<(&str, &str)> {
        match self.get(id) {
            Node::Global(names) => Some((&names.0, &names.1)),
            _ => None,
        }
    }

    /// An inert call: module, name and the rest.
    pub fn object(&self, id: Id) -> Option<(&str, &str, &Object)> {
        let Node::Object(object) = self.get(id) else { return None };
        let (module, name) = self.global(object.callee)?;
        Some((module, name, object))
    }

    /// The positional arguments of a call.
    pub fn args(&self, object: &Object) -> &[Id] {
        match self.get(object.args) {
            Node::Tuple(items) => items,
            _ => &[],
        }
    }

    /// Keys and values of a dictionary, in the order they were set and with every repetition.
    pub fn pairs(&self, id: Id) -> Option<Vec<(Id, Id)>> {
        match self.get(id) {
            Node::Dict(pairs) => Some(pairs.clone()),
            Node::Object(_) => {
                let (module, name, object) = self.object(id)?;
                if module != "collections" || !DICTS.contains(&name) {
                    return None;
                }
                // Python 2 passes the pairs as arguments.
                let mut pairs = Vec::new();
                for &pair in self.args(object).first().and_then(|&list| self.items(list)).unwrap_or(&[]) {
                    let &[key, value] = self.items(pair)? else { return None };
                    pairs.push((key, value));
                }
                pairs.extend_from_slice(&object.pairs);
                Some(pairs)
            }
            _ => None,
        }
    }

    /// The value of a string key of a dictionary; the last one if it was set more than once.
    pub fn lookup(&self, dict: Id, key: &str) -> Option<Id> {
        self.pairs(dict)?.into_iter().rev().find(|&(k, _)| self.str(k) == Some(key)).map(|(_, value)| value)
    }

    /// What a node is, for messages.
    pub fn describe(&self, id: Id) -> String {
        match self.get(id) {
            Node::None => "None".into(),
            Node::Bool(_) => "a bool".into(),
            Node::Int(_) | Node::Big => "an int".into(),
            Node::Float(_) => "a float".into(),
            Node::Str(_) => "a string".into(),
            Node::Bytes => "bytes".into(),
            Node::Tuple(_) => "a tuple".into(),
            Node::List(_) => "a list".into(),
            Node::Set(_) => "a set".into(),
            Node::Dict(_) => "a dict".into(),
            Node::Global(names) => format!("the name {}.{}", names.0, names.1),
            Node::Object(_) => self.object(id).map_or("an object".into(), |(module, name, _)| format!("a {module}.{name}")),
            Node::Persistent(_) => "a bare storage".into(),
        }
    }
}
