//! Python literals, as `repr` writes them: RACE keeps its questions so.

use serde_json::{Map, Value};

/// Lists, dictionaries with text as keys, text, numbers, `None`, `True`, `False`.
pub(crate) fn parse(text: &str) -> Option<Value> {
    let mut reader = Reader { rest: text };
    let value = reader.value(0)?;
    reader.blank();
    reader.rest.is_empty().then_some(value)
}

/// Nesting that is read; what is deeper is no question.
const DEEPEST: usize = 32;

struct Reader<'a> {
    rest: &'a str,
}

impl Reader<'_> {
    fn blank(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn take(&mut self, token: &str) -> bool {
        self.blank();
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        if depth > DEEPEST {
            return None;
        }
        for (name, value) in [("None", Value::Null), ("True", Value::Bool(true)), ("False", Value::Bool(false))] {
            if self.take(name) {
                return Some(value);
            }
        }
        if self.take("[") {
            let mut items = Vec::new();
            while !self.take("]") {
                items.push(self.value(depth + 1)?);
                if !self.take(",") {
                    return self.take("]").then_some(Value::Array(items));
                }
            }
            return Some(Value::Array(items));
        }
        if self.take("{") {
            let mut entries = Map::new();
            while !self.take("}") {
                let key = self.text()?;
                if !self.take(":") {
                    return None;
                }
                entries.insert(key, self.value(depth + 1)?);
                if !self.take(",") {
                    return self.take("}").then_some(Value::Object(entries));
                }
            }
            return Some(Value::Object(entries));
        }
        if self.rest.starts_with(['\'', '"']) { self.text().map(Value::String) } else { self.number() }
    }

    fn number(&mut self) -> Option<Value> {
        let end = self.rest.find(|c: char| !(c.is_ascii_alphanumeric() || "+-.".contains(c))).unwrap_or(self.rest.len());
        let (number, rest) = self.rest.split_at(end);
        self.rest = rest;
        serde_json::from_str::<serde_json::Number>(number).ok().map(Value::Number)
    }

    fn text(&mut self) -> Option<String> {
        self.blank();
        let quote = self.rest.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
        let mut out = String::new();
        let mut chars = self.rest[1..].char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                c if c == quote => {
                    self.rest = &self.rest[1 + at + 1..];
                    return Some(out);
                }
                '\\' => {
                    let (_, escaped) = chars.next()?;
                    let digits = match escaped {
                        'x' => 2,
                        'u' => 4,
                        'U' => 8,
                        _ => 0,
                    };
                    out.push(match escaped {
                        'n' => '\n',
                        't' => '\t',
                        'r' => '\r',
                        'x' | 'u' | 'U' => {
                            let code = (0..digits).map(|_| chars.next().map(|(_, c)| c)).collect::<Option<String>>()?;
                            char::from_u32(u32::from_str_radix(&code, 16).ok()?)?
                        }
                        '\\' | '\'' | '"' => escaped,
                        // `repr` writes no other.
                        _ => return None,
                    });
                }
                c => out.push(c),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::parse;

    #[test]
    fn what_repr_writes_is_read() {
        // repr([{"question": "It's \"so\" _ .", "n": 2, "options": ["a\n", "naïve\x9c", "c\\"]}, None])
        let text = r#"[{'question': 'It\'s "so" _ .', 'n': 2, 'options': ["a'\n", 'naïve\x9c', 'c\\']}, None]"#;
        let expected = json!([{"question": "It's \"so\" _ .", "n": 2, "options": ["a'\n", "naïve\u{9c}", "c\\"]}, null]);
        assert_eq!(parse(text), Some(expected));
        assert_eq!(parse("[True, -1.5, {}, [],]"), Some(json!([true, -1.5, {}, []])));
        for broken in ["", "[", "['a", "{1: 2}", "[1] x", "'\\q'", "'\\x4'", "[1 2]", &"[".repeat(1000)] {
            assert_eq!(parse(broken), None, "{broken}");
        }
    }
}
