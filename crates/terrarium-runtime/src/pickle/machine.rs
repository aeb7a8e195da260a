//! The stack machine.

use std::borrow::Cow;
use std::collections::HashMap;

use super::allow::may_construct;
use super::node::{Id, Node, Object, Pickle};
use super::reader::{Reader, unescape, unquote};
use crate::error::PickleError;

type Result<T> = std::result::Result<T, PickleError>;

/// Far above a checkpoint (ten nodes for each tensor), far below what fills a memory.
const MAX_NODES: usize = 1 << 24;

/// Open marks, that is collections within collections; Python itself stops at a thousand.
const MAX_DEPTH: usize = 1 << 12;

/// Reads one pickle; bytes after its end are ignored, as Python does.
pub(crate) fn parse(bytes: &[u8]) -> Result<Pickle<'_>> {
    let mut machine =
        Machine { reader: Reader::new(bytes), nodes: vec![], stack: vec![], marks: vec![], memo: HashMap::new(), at: 0, opcode: 0 };
    loop {
        machine.at = machine.reader.at;
        machine.opcode = machine.reader.u8()?;
        if machine.opcode == b'.' {
            let root = machine.pop()?;
            return Ok(Pickle { nodes: machine.nodes, root });
        }
        machine.step()?;
    }
}

struct Machine<'a> {
    reader: Reader<'a>,
    nodes: Vec<Node<'a>>,
    stack: Vec<Id>,
    /// Heights of the stack at the open marks: nothing below the last one can be taken.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    /// Offset of the opcode at work.
    at: usize,
    opcode: u8,
}

impl<'a> Machine<'a> {
    /// One opcode, by family.
    fn step(&mut self) -> Result<()> {
        match self.opcode {
            0x80 => match self.reader.u8()? {
                0..=5 => Ok(()),
                version => Err(self.malformed(format!("protocol {version}; protocols 0 to 5 are read"))),
            },
            0x95 => {
                let (length, left) = (self.reader.u64()?, self.reader.left());
                if length > left as u64 { Err(PickleError::Truncated { at: self.at, needed: length, left }) } else { Ok(()) }
            }
            b'(' => {
                if self.marks.len() >= MAX_DEPTH {
                    return Err(PickleError::Limit { at: self.at, what: "nested collections", limit: MAX_DEPTH });
                }
                self.marks.push(self.stack.len());
                Ok(())
            }
            b'0' => self.pop_any(),
            b'1' => self.pop_mark().map(drop),
            b'2' => {
                let top = self.top()?;
                self.push_id(top)
            }
            b'N' | 0x88 | 0x89 | b'I' | b'J' | b'K' | b'M' | b'L' | 0x8a | 0x8b | b'F' | b'G' => self.number(),
            b'S' | b'T' | b'U' | b'V' | b'X' | 0x8c | 0x8d | b'B' | b'C' | 0x8e | 0x96 => self.string(),
            b')' | b't' | 0x85..=0x87 | b']' | b'l' | b'}' | b'd' | 0x8f | 0x91 => self.collection(),
            b'a' | b'e' | b's' | b'u' | 0x90 => self.fill(),
            b'p' | b'q' | b'r' | 0x94 | b'g' | b'h' | b'j' => self.memory(),
            b'c' | 0x93 | b'P' | b'Q' => self.name(),
            b'R' | 0x81 | 0x92 | b'i' | b'o' | b'b' => self.call(),
            0x82..=0x84 => Err(PickleError::Refused { callable: "a copyreg extension".into(), at: self.at }),
            0x97 => Err(self.malformed("a buffer kept outside of the pickle".into())),
            0x98 => self.top().map(drop),
            opcode => Err(PickleError::UnknownOpcode { at: self.at, opcode }),
        }
    }

    fn number(&mut self) -> Result<()> {
        let node = match self.opcode {
            b'N' => Node::None,
            0x88 => Node::Bool(true),
            0x89 => Node::Bool(false),
            b'J' => Node::Int(self.reader.i32()?.into()),
            b'K' => Node::Int(self.reader.u8()?.into()),
            b'M' => Node::Int(self.reader.u16()?.into()),
            b'G' => Node::Float(f64::from_be_bytes(self.reader.array()?)),
            0x8a => {
                let length = self.reader.u8()?;
                little_endian(self.reader.take(length.into())?)
            }
            0x8b => {
                let length = self.reader.i32()?;
                let length = u64::try_from(length).map_err(|_| self.malformed(format!("an integer of {length} bytes")))?;
                little_endian(self.reader.take(length)?)
            }
            b'F' => {
                let text = self.reader.text()?;
                Node::Float(text.trim().parse().map_err(|_| self.malformed("not a float".into()))?)
            }
            _ => {
                let text = self.reader.text()?;
                match (self.opcode, text) {
                    (b'I', "00") => Node::Bool(false),
                    (b'I', "01") => Node::Bool(true),
                    _ => decimal(text.trim_end_matches('L')).ok_or_else(|| self.malformed("not an integer".into()))?,
                }
            }
        };
        self.push(node)
    }

    fn string(&mut self) -> Result<()> {
        let node = match self.opcode {
            b'S' => {
                let literal = unquote(self.reader.line()?).ok_or_else(|| self.malformed("not a string literal".into()))?;
                match String::from_utf8(literal) {
                    Ok(text) => Node::Str(Box::new(Cow::Owned(text))),
                    Err(_) => Node::Bytes,
                }
            }
            b'V' => {
                let text = unescape(self.reader.line()?).ok_or_else(|| self.malformed("not an escaped string".into()))?;
                Node::Str(Box::new(Cow::Owned(text)))
            }
            _ => {
                let length = match self.opcode {
                    b'U' | 0x8c | b'C' => self.reader.u8()?.into(),
                    b'X' | b'B' => self.reader.u32()?.into(),
                    b'T' => {
                        let length = self.reader.i32()?;
                        u64::try_from(length).map_err(|_| self.malformed(format!("a string of {length} bytes")))?
                    }
                    _ => self.reader.u64()?,
                };
                let bytes = self.reader.take(length)?;
                // Python 2 has one type for both; text with lone surrogates is no text here.
                match std::str::from_utf8(bytes) {
                    Ok(text) if !matches!(self.opcode, b'B' | b'C' | 0x8e | 0x96) => Node::Str(Box::new(Cow::Borrowed(text))),
                    _ => Node::Bytes,
                }
            }
        };
        self.push(node)
    }

    fn collection(&mut self) -> Result<()> {
        let node = match self.opcode {
            b')' => Node::Tuple(Box::default()),
            b']' => Node::List(vec![]),
            b'}' => Node::Dict(vec![]),
            0x8f => Node::Set(vec![]),
            b't' => Node::Tuple(self.pop_mark()?.into()),
            b'l' => Node::List(self.pop_mark()?),
            0x91 => Node::Set(self.pop_mark()?),
            b'd' => {
                let items = self.pop_mark()?;
                Node::Dict(self.paired(&items)?)
            }
            small => {
                let count = usize::from(small - 0x84);
                let from = self.stack.len().checked_sub(count).filter(|&from| from >= self.floor()).ok_or_else(|| self.underflow())?;
                Node::Tuple(self.stack.drain(from..).collect())
            }
        };
        self.push(node)
    }

    /// Appends to, or sets in, the collection under the values.
    fn fill(&mut self) -> Result<()> {
        let values = match self.opcode {
            b'a' => vec![self.pop()?],
            b's' => {
                let value = self.pop()?;
                vec![self.pop()?, value]
            }
            _ => self.pop_mark()?,
        };
        let target = self.top()? as usize;
        match (self.opcode, &mut self.nodes[target]) {
            (b'a' | b'e', Node::List(items)) | (0x90, Node::Set(items)) => items.extend(values),
            (b'a' | b'e' | 0x90, Node::Object(object)) => object.items.extend(values),
            (b's' | b'u', Node::Dict(_) | Node::Object(_)) => {
                let mut new = self.paired(&values)?;
                match &mut self.nodes[target] {
                    Node::Dict(pairs) => pairs.append(&mut new),
                    Node::Object(object) => object.pairs.append(&mut new),
                    _ => {}
                }
            }
            _ => return Err(self.malformed("fills something that is no collection".into())),
        }
        Ok(())
    }

    fn memory(&mut self) -> Result<()> {
        let index = match self.opcode {
            b'p' | b'g' => {
                let text = self.reader.text()?;
                text.parse().map_err(|_| self.malformed("not a memo index".into()))?
            }
            b'q' | b'h' => self.reader.u8()?.into(),
            b'r' | b'j' => self.reader.u32()?,
            // No more entries than bytes read, and the members of an archive are limited.
            _ => u32::try_from(self.memo.len()).map_err(|_| self.malformed("too many memo entries".into()))?,
        };
        if matches!(self.opcode, b'g' | b'h' | b'j') {
            let id = *self.memo.get(&index).ok_or_else(|| self.malformed(format!("memo entry {index} was never set")))?;
            return self.push_id(id);
        }
        let top = self.top()?;
        if self.memo.len() >= MAX_NODES {
            return Err(PickleError::Limit { at: self.at, what: "memo entries", limit: MAX_NODES });
        }
        self.memo.insert(index, top);
        Ok(())
    }

    fn name(&mut self) -> Result<()> {
        let node = match self.opcode {
            b'c' => {
                let module = self.reader.text()?;
                Node::Global(Box::new((module.into(), self.reader.text()?.into())))
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (&self.nodes[module as usize], &self.nodes[name as usize]) {
                    (Node::Str(module), Node::Str(name)) => Node::Global(Box::new((*module.clone(), *name.clone()))),
                    _ => return Err(self.malformed("a global whose names are no strings".into())),
                }
            }
            b'P' => {
                let text = self.reader.text()?;
                self.push(Node::Str(Box::new(Cow::Borrowed(text))))?;
                Node::Persistent(self.pop()?)
            }
            _ => Node::Persistent(self.pop()?),
        };
        self.push(node)
    }

    fn call(&mut self) -> Result<()> {
        let (callee, args) = match self.opcode {
            b'b' => return self.build(),
            b'i' => {
                let module = self.reader.text()?;
                let names = Node::Global(Box::new((module.into(), self.reader.text()?.into())));
                let args = self.pop_mark()?;
                (self.add(names)?, self.add(Node::Tuple(args.into()))?)
            }
            b'o' => {
                let mut values = self.pop_mark()?;
                if values.is_empty() {
                    return Err(self.underflow());
                }
                let callee = values.remove(0);
                (callee, self.add(Node::Tuple(values.into()))?)
            }
            opcode => {
                // Keyword arguments are data that nothing here asks for.
                if opcode == 0x92 {
                    self.pop()?;
                }
                let args = self.pop()?;
                (self.pop()?, args)
            }
        };
        self.admit(callee, args)?;
        self.push(Node::Object(Box::new(Object { callee, args, ..Object::default() })))
    }

    /// Refuses what is not plain data.
    fn admit(&self, callee: Id, args: Id) -> Result<()> {
        let refused = |callable: String| Err(PickleError::Refused { callable, at: self.at });
        let Node::Global(names) = &self.nodes[callee as usize] else {
            return refused("something that is no name".into());
        };
        let (module, name) = (&*names.0, &*names.1);
        if !may_construct(module, name) {
            return refused(format!("{module}.{name}"));
        }
        let Node::Tuple(args) = &self.nodes[args as usize] else {
            return Err(self.malformed(format!("the arguments of {module}.{name} are no tuple")));
        };
        // Those that take another callable: it has to be on the list itself.
        let takes_callable = matches!(name, "getattr" | "_reconstructor") || (module == "torch._tensor" && name.starts_with("_rebuild"));
        if !takes_callable {
            return Ok(());
        }
        match args.first().map(|&first| &self.nodes[first as usize]) {
            Some(Node::Global(of)) if may_construct(&of.0, &of.1) && of.1 != "getattr" => Ok(()),
            Some(Node::Global(of)) => refused(format!("{module}.{name} of {}.{}", of.0, of.1)),
            _ => refused(format!("{module}.{name} of something that is no name")),
        }
    }

    fn build(&mut self) -> Result<()> {
        let state = self.pop()?;
        let target = self.top()? as usize;
        match &mut self.nodes[target] {
            Node::Object(object) if object.state.is_none() => {
                object.state = Some(state);
                Ok(())
            }
            Node::Object(_) => Err(self.malformed("an object is built twice".into())),
            Node::Global(names) => {
                let callable = format!("{}.{}", names.0, names.1);
                Err(PickleError::Refused { callable, at: self.at })
            }
            _ => Err(self.malformed("builds something that is no object".into())),
        }
    }

    fn paired(&self, items: &[Id]) -> Result<Vec<(Id, Id)>> {
        let (pairs, rest) = items.as_chunks::<2>();
        if rest.is_empty() { Ok(pairs.iter().map(|&[k, v]| (k, v)).collect()) } else { Err(self.malformed("a key without a value".into())) }
    }

    fn add(&mut self, node: Node<'a>) -> Result<Id> {
        if self.nodes.len() >= MAX_NODES {
            return Err(PickleError::Limit { at: self.at, what: "values", limit: MAX_NODES });
        }
        self.nodes.push(node);
        Ok((self.nodes.len() - 1) as Id)
    }

    fn push(&mut self, node: Node<'a>) -> Result<()> {
        let id = self.add(node)?;
        self.push_id(id)
    }

    fn push_id(&mut self, id: Id) -> Result<()> {
        if self.stack.len() >= MAX_NODES {
            return Err(PickleError::Limit { at: self.at, what: "values on the stack", limit: MAX_NODES });
        }
        self.stack.push(id);
        Ok(())
    }

    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn top(&self) -> Result<Id> {
        if self.stack.len() > self.floor() { Ok(self.stack[self.stack.len() - 1]) } else { Err(self.underflow()) }
    }

    fn pop(&mut self) -> Result<Id> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    /// POP takes the mark itself where nothing lies above it.
    fn pop_any(&mut self) -> Result<()> {
        if self.stack.len() == self.floor() && self.marks.pop().is_some() { Ok(()) } else { self.pop().map(drop) }
    }

    fn pop_mark(&mut self) -> Result<Vec<Id>> {
        let from = self.marks.pop().ok_or_else(|| self.underflow())?;
        // Not `split_off`, which may hand on the capacity of the whole stack.
        Ok(self.stack.drain(from..).collect())
    }

    fn underflow(&self) -> PickleError {
        PickleError::Underflow { at: self.at, opcode: self.opcode }
    }

    fn malformed(&self, problem: String) -> PickleError {
        PickleError::Malformed { at: self.at, problem }
    }
}

/// A two's complement integer; beyond 64 bits it is only known to be big.
fn little_endian<'a>(bytes: &[u8]) -> Node<'a> {
    let Some(&last) = bytes.last() else { return Node::Int(0) };
    let mut padded = [if last & 0x80 == 0 { 0 } else { 0xff }; 8];
    match padded.get_mut(..bytes.len()) {
        Some(low) => {
            low.copy_from_slice(bytes);
            Node::Int(i64::from_le_bytes(padded))
        }
        None => Node::Big,
    }
}

fn decimal<'a>(text: &str) -> Option<Node<'a>> {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    Some(text.parse().map_or(Node::Big, Node::Int))
}
