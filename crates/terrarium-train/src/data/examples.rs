//! Examples: pairs, instructions and chats, and which of their tokens are to be learned.

use std::ops::Range;

use serde_json::Value;
use terrarium_runtime::Tokenizer;
use terrarium_runtime::tokenizer::Message;

use super::files::Source;
use super::packing::{Document, Overflow};
use super::{DataError, IGNORED};
use crate::TrainError;
use crate::config::{DataConfig, Template};

/// One line of a JSONL file.
#[derive(Debug, Clone, PartialEq)]
pub enum Example {
    /// `{"text"}`.
    Text(String),
    /// `{"prompt", "completion"}`.
    Pair(String, String),
    /// `{"instruction", "input", "output"}`.
    Instruction {
        /// What to do.
        instruction: String,
        /// On what; may be empty.
        input: String,
        /// The answer.
        output: String,
    },
    /// `{"messages": [{"role", "content"}]}`.
    Chat(Vec<Message>),
}

/// Recognises an example by its keys.
///
/// # Errors
/// A sentence on what is missing.
pub fn parse_example(value: &Value) -> Result<Example, String> {
    let object = value.as_object().ok_or_else(|| "expected an object".to_string())?;
    let text = |keys: &[&str]| -> Result<Option<String>, String> {
        match keys.iter().find_map(|key| object.get(*key).map(|value| (key, value))) {
            None | Some((_, Value::Null)) => Ok(None),
            Some((_, Value::String(text))) => Ok(Some(text.clone())),
            Some((key, _)) => Err(format!("`{key}` is not a string")),
        }
    };
    if let Some(messages) = object.get("messages") {
        let messages: Vec<Message> = serde_json::from_value(messages.clone()).map_err(|error| format!("`messages`: {error}"))?;
        if !messages.iter().any(|message| message.role == "assistant") {
            return Err("`messages` holds no assistant turn to learn".to_string());
        }
        return Ok(Example::Chat(messages));
    }
    if let (Some(prompt), Some(completion)) = (text(&["prompt"])?, text(&["completion"])?) {
        return Ok(Example::Pair(prompt, completion));
    }
    if let (Some(instruction), Some(output)) = (text(&["instruction"])?, text(&["output", "response"])?) {
        return Ok(Example::Instruction { instruction, input: text(&["input", "context"])?.unwrap_or_default(), output });
    }
    if let Some(text) = text(&["text"])? {
        return Ok(Example::Text(text));
    }
    let found = object.keys().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
    Err(format!(
        "expected `messages`, `prompt` and `completion`, `instruction` and `output`, or `text`; found {}",
        if found.is_empty() { "nothing" } else { &found }
    ))
}

/// Longest text given to the tokenizer in one piece; longer ones are cut at line ends.
const LONGEST_PIECE: usize = 1 << 20;

/// Turns a file's content into documents.
pub(super) fn tokenise(
    source: Source,
    config: &DataConfig,
    tokenizer: &Tokenizer,
    eos: Option<u32>,
    documents: &mut Vec<Document>,
) -> Result<(), TrainError> {
    match source {
        Source::Text(texts) => {
            for text in &texts {
                documents.push(text_document(text, tokenizer, eos)?);
            }
        }
        Source::Examples(path, examples) => {
            for (place, example) in examples {
                let document = example_document(&example, config, tokenizer, eos).map_err(|problem| match problem {
                    Problem::Data(reason) => DataError::Example { path: path.clone(), place, reason }.into(),
                    Problem::Runtime(error) => TrainError::from(error),
                })?;
                documents.push(document);
            }
        }
    }
    Ok(())
}

fn text_document(text: &str, tokenizer: &Tokenizer, eos: Option<u32>) -> Result<Document, TrainError> {
    let mut ids = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let mut end = rest.len();
        if end > LONGEST_PIECE {
            let limit = (0..=LONGEST_PIECE).rev().find(|at| rest.is_char_boundary(*at)).unwrap_or(0);
            end = rest[..limit].rfind('\n').map_or(limit, |at| at + 1);
        }
        ids.extend(tokenizer.encode(&rest[..end], ids.is_empty())?);
        rest = &rest[end..];
    }
    push_eos(&mut ids, eos);
    let learned = std::iter::once(0..ids.len()).collect();
    Ok(Document { ids, learned, overflow: Overflow::Split })
}

fn push_eos(ids: &mut Vec<u32>, eos: Option<u32>) {
    if let Some(eos) = eos
        && ids.last() != Some(&eos)
    {
        ids.push(eos);
    }
}

enum Problem {
    Data(String),
    Runtime(terrarium_runtime::Error),
}

impl From<terrarium_runtime::Error> for Problem {
    fn from(error: terrarium_runtime::Error) -> Self {
        Self::Runtime(error)
    }
}

fn example_document(example: &Example, config: &DataConfig, tokenizer: &Tokenizer, eos: Option<u32>) -> Result<Document, Problem> {
    let mut document = match (example, config.template) {
        (Example::Text(text), _) => return text_document(text, tokenizer, eos).map_err(|error| Problem::Data(error.to_string())),
        (Example::Chat(messages), _) => chat(messages, tokenizer)?,
        (Example::Pair(prompt, completion), Template::Chat) => chat(&turns(prompt, completion), tokenizer)?,
        (Example::Pair(prompt, completion), _) => pair(prompt, completion, tokenizer, eos)?,
        (Example::Instruction { instruction, input, output }, Template::Chat) => {
            chat(&turns(&joined(instruction, input, "\n\n"), output), tokenizer)?
        }
        (Example::Instruction { instruction, input, output }, Template::Plain) => {
            pair(&format!("{}\n", joined(instruction, input, "\n")), output, tokenizer, eos)?
        }
        (Example::Instruction { instruction, input, output }, _) => pair(&alpaca(instruction, input), output, tokenizer, eos)?,
    };
    if !config.completions_only {
        document.learned = std::iter::once(0..document.ids.len()).collect();
    }
    Ok(document)
}

fn joined(instruction: &str, input: &str, glue: &str) -> String {
    if input.is_empty() { instruction.to_string() } else { format!("{instruction}{glue}{input}") }
}

fn turns(prompt: &str, completion: &str) -> Vec<Message> {
    let turn = |role: &str, content: &str| Message { role: role.to_string(), content: content.to_string() };
    vec![turn("user", prompt), turn("assistant", completion)]
}

/// The wording of Stanford Alpaca.
fn alpaca(instruction: &str, input: &str) -> String {
    let (with_input, input) = if input.is_empty() {
        ("", String::new())
    } else {
        (", paired with an input that provides further context", format!("### Input:\n{input}\n\n"))
    };
    format!(
        "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes the request.\n\n\
         ### Instruction:\n{instruction}\n\n{input}### Response:\n"
    )
}

/// Prompt and completion are tokenised together, as they will be met; what the prompt alone shares with that is the prompt.
fn pair(prompt: &str, completion: &str, tokenizer: &Tokenizer, eos: Option<u32>) -> Result<Document, Problem> {
    let mut ids = tokenizer.encode(&format!("{prompt}{completion}"), true)?;
    let start = shared_prefix(&ids, &tokenizer.encode(prompt, true)?);
    push_eos(&mut ids, eos);
    let learned = std::iter::once(start..ids.len()).collect();
    Ok(Document { ids, learned, overflow: Overflow::Truncate })
}

/// Renders the whole chat once; a turn is what rendering up to it adds to the prompt before it.
fn chat(messages: &[Message], tokenizer: &Tokenizer) -> Result<Document, Problem> {
    if !tokenizer.has_chat_template() {
        return Err(Problem::Data(
            "chats need a tokenizer with a chat template; set data.template to alpaca or plain for other examples".to_string(),
        ));
    }
    let ids = tokenizer.encode(&tokenizer.chat(messages, false)?, false)?;
    let mut learned: Vec<Range<usize>> = Vec::new();
    for (index, _) in messages.iter().enumerate().filter(|(_, message)| message.role == "assistant") {
        let before = if index == 0 { String::new() } else { tokenizer.chat(&messages[..index], true)? };
        let until = tokenizer.chat(&messages[..=index], false)?;
        let start = shared_prefix(&ids, &tokenizer.encode(&before, false)?);
        let end = shared_prefix(&ids, &tokenizer.encode(&until, false)?);
        if start >= end {
            return Err(Problem::Data(format!("the chat template hides turn {} once the chat goes on; split the chat there", index + 1)));
        }
        learned.push(start..end);
    }
    Ok(Document { ids, learned, overflow: Overflow::Truncate })
}

fn shared_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl Document {
    /// The label of predicting token `at`.
    pub(super) fn label(&self, at: usize) -> i32 {
        if self.learned.iter().any(|range| range.contains(&at)) { self.ids[at] as i32 } else { IGNORED }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_are_recognised_by_their_keys() {
        let parse = |text: &str| parse_example(&serde_json::from_str(text).unwrap());
        assert_eq!(parse(r#"{"prompt":"a","completion":"b"}"#), Ok(Example::Pair("a".into(), "b".into())));
        let alpaca = Example::Instruction { instruction: "i".into(), input: String::new(), output: "o".into() };
        assert_eq!(parse(r#"{"instruction":"i","output":"o"}"#), Ok(alpaca));
        assert!(matches!(
            parse(r#"{"messages":[{"role":"user","content":"x"},{"role":"assistant","content":"y"}]}"#),
            Ok(Example::Chat(_))
        ));
        assert!(parse(r#"{"messages":[{"role":"user","content":"x"}]}"#).unwrap_err().contains("assistant"));
        assert!(parse(r#"{"prompt":3,"completion":"b"}"#).unwrap_err().contains("`prompt` is not a string"));
        assert!(parse("[]").is_err() && parse("{}").unwrap_err().contains("nothing"));
    }
}
