//! SentencePiece models (`tokenizer.model`) as pipelines of the `tokenizers` crate.
//!
//! Built so that ids are those of SentencePiece's `encode_as_ids` and text that of its `decode`: the whole normalised
//! text is one word for the model (SentencePiece may cut pieces across blanks), and the order of the steps is its own.
//! What cannot be said with the parts of that crate is listed at [`Tokenizer::from_sentencepiece`].

mod charsmap;
mod proto;

use std::collections::HashMap;
use std::path::Path;

use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{NFC, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, NormalizerWrapper, SplitDelimiterBehavior};

use super::Tokenizer;
use super::special::Special;
use crate::error::TokenizerError;
use crate::{Error, Result};
use proto::{Algorithm, Kind, Model};

/// What SentencePiece writes for a blank.
const BLANK: &str = "\u{2581}";
/// Stands for the unknown piece between the steps of decoding: no text has this character.
const UNKNOWN: &str = "\u{10FFFF}";
/// User-defined pieces hide behind characters from here on while the rest of a text is normalised.
const HIDDEN: u32 = 0x10_0000;
/// Far more than the largest vocabulary needs; keeps a wrong file from filling the memory.
const MOST_BYTES: u64 = 64 << 20;
/// Far longer than any piece (16 characters are usual); merges and the library's tree grow with it.
const LONGEST_PIECE: usize = 2048;

impl Tokenizer {
    /// A SentencePiece model, unigram or BPE, with the special tokens that it names. Ids are those of SentencePiece's
    /// `encode_as_ids`, except that:
    ///
    /// - text that spells a control piece (`</s>`) is that piece, as with every tokenizer.json;
    /// - with normalisation rules, marks on a character are put in order and composed, and of the rare rules that match
    ///   a character with a mark the shortest is used: of a full-width letter with a mark only the letter stays;
    /// - scores are added up in 64 bits instead of 32, which decides between cuts of equal score;
    /// - text that spells a byte piece (`<0x41>`) with characters that the vocabulary lacks is that piece.
    ///
    /// Bytes that are no UTF-8 are decoded to one replacement character each, valid ones among them too.
    pub fn from_sentencepiece(file: &Path) -> Result<Self> {
        let length = std::fs::metadata(file).map_err(Error::io("read", file))?.len();
        let name = || file.display().to_string();
        if length > MOST_BYTES {
            let reason = format!("it has {length} bytes, and no SentencePiece model has more than {MOST_BYTES}");
            return Err(TokenizerError::Read { file: name(), reason }.into());
        }
        let bytes = std::fs::read(file).map_err(Error::io("read", file))?;
        Self::from_sentencepiece_bytes(&bytes, &name())
    }

    /// As [`Tokenizer::from_sentencepiece`], from memory; `file` is the name for errors.
    pub fn from_sentencepiece_bytes(bytes: &[u8], file: &str) -> Result<Self> {
        let read = |reason: String| TokenizerError::Read { file: file.into(), reason };
        let model = Model::parse(bytes).map_err(|reason| read(format!("it is no SentencePiece model ({reason})")))?;
        check(&model).map_err(read)?;
        if let Some(what) = unsupported(&model) {
            return Err(TokenizerError::Unsupported { file: file.into(), what }.into());
        }
        build(&model).map_err(|reason| read(reason).into())
    }
}

/// What SentencePiece itself demands of a model.
fn check(model: &Model) -> Result<(), String> {
    if model.pieces.is_empty() {
        return Err("it has no pieces; is it a SentencePiece model?".into());
    }
    let mut seen = HashMap::with_capacity(model.pieces.len());
    for (id, piece) in model.pieces.iter().enumerate() {
        if piece.text.is_empty() {
            return Err(format!("piece {id} is empty"));
        }
        if piece.text.len() > LONGEST_PIECE {
            return Err(format!("piece {id} has {} bytes, more than {LONGEST_PIECE}", piece.text.len()));
        }
        if !piece.score.is_finite() {
            return Err(format!("piece {id} (`{}`) has the score {}", piece.text, piece.score));
        }
        if let Some(before) = seen.insert(piece.text.as_str(), id) {
            return Err(format!("pieces {before} and {id} are both `{}`", piece.text));
        }
        if piece.kind == Kind::Byte && byte_of(&piece.text).is_none() {
            return Err(format!("piece {id} (`{}`) is of type byte and not of the form <0x00>", piece.text));
        }
    }
    let of = |kind: Kind| model.pieces.iter().filter(|p| p.kind == kind).count();
    match (of(Kind::Unknown), of(Kind::Byte), model.byte_fallback) {
        (1, 256, true) | (1, 0, false) => Ok(()),
        (1, bytes, true) => Err(format!("byte_fallback needs a piece for each of the 256 bytes, and there are {bytes}")),
        (1, bytes, false) => Err(format!("there are {bytes} byte pieces, and byte_fallback is off")),
        (unknown, ..) => Err(format!("one piece has to be of type unknown, and {unknown} are")),
    }
}

fn byte_of(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let plain = digits.len() == 2 && digits.chars().all(|c| c.is_ascii_digit() || ('A'..='F').contains(&c));
    plain.then(|| u8::from_str_radix(digits, 16).ok())?
}

/// Valid models that have no equal pipeline here.
fn unsupported(model: &Model) -> Option<String> {
    let kind = match model.algorithm {
        Algorithm::Unigram | Algorithm::Bpe => None,
        Algorithm::Word => Some("word"),
        Algorithm::Char => Some("char"),
    };
    if let Some(kind) = kind {
        return Some(format!("it is a SentencePiece model of type {kind}, and only unigram and BPE are supported"));
    }
    if model.whitespace_as_suffix {
        return Some("it writes blanks at the end of words (treat_whitespace_as_suffix)".into());
    }
    if !model.denormalizer.is_empty() {
        return Some("it rewrites decoded text (denormalizer_spec)".into());
    }
    let unused = model.pieces.iter().find(|p| p.kind == Kind::Unused);
    if let (Algorithm::Bpe, Some(piece)) = (model.algorithm, unused) {
        return Some(format!("its piece `{}` is marked unused, which BPE models cannot have here", piece.text));
    }
    None
}

fn build(model: &Model) -> Result<Tokenizer, String> {
    let text = |e: tokenizers::Error| e.to_string();
    let mut inner = match model.algorithm {
        Algorithm::Bpe => tokenizers::Tokenizer::new(bpe(model)?),
        _ => tokenizers::Tokenizer::new(unigram(model)?),
    };
    let steps = normalizers(model)?;
    inner.with_normalizer((!steps.is_empty()).then(|| Normalizers::new(steps)));
    if let (Algorithm::Bpe, Some(pattern)) = (model.algorithm, any_user_defined(model)) {
        let split = Split::new(SplitPattern::Regex(pattern), SplitDelimiterBehavior::Isolated, false).map_err(text)?;
        inner.with_pre_tokenizer(Some(split));
    }
    inner.with_decoder(Some(Decoders::new(decoders(model)?)));
    let control = model.pieces.iter().filter(|p| p.kind == Kind::Control);
    let control: Vec<_> = control.map(|p| AddedToken::from(p.text.clone(), true).normalized(false)).collect();
    inner.add_special_tokens(&control);
    let mut tokenizer = Tokenizer::wrap(inner).map_err(text)?;
    tokenizer.special = special(model, &tokenizer);
    Ok(tokenizer)
}

/// The roles that SentencePiece gives: by the spelling that the model was trained with, if that is a control piece.
fn special(model: &Model, tokenizer: &Tokenizer) -> Special {
    let role = |text: &str, kind: Kind| {
        let piece = model.pieces.iter().find(|p| p.text == text && p.kind == kind)?;
        Special::role(tokenizer, &piece.text)
    };
    let unknown = model.pieces.iter().find(|p| p.kind == Kind::Unknown);
    Special {
        bos: role(&model.bos_piece, Kind::Control),
        eos: role(&model.eos_piece, Kind::Control),
        pad: role(&model.pad_piece, Kind::Control),
        unk: unknown.and_then(|p| Special::role(tokenizer, &p.text)),
    }
}

/// The pieces with the scores that SentencePiece would search by.
fn unigram(model: &Model) -> Result<Unigram, String> {
    let normal = || model.pieces.iter().filter(|p| p.kind == Kind::Normal).map(|p| p.score);
    let (least, most) = normal().fold((f32::MAX, f32::MIN), |(least, most), s| (least.min(s), most.max(s)));
    let (least, most) = if least > most { (0.0, 0.0) } else { (least, most) };
    let scored = model.pieces.iter().map(|piece| {
        let score = match piece.kind {
            Kind::Normal => f64::from(piece.score),
            // SentencePiece's own rule, in its own precision.
            Kind::UserDefined => f64::from(piece.text.len() as f32 * most - 0.1),
            // Pieces that text never gives: the library finds them by their spelling, so any other way must be better.
            Kind::Unknown | Kind::Control | Kind::Unused | Kind::Byte => f64::from(least) - 1000.0,
        };
        (piece.text.clone(), score)
    });
    let unknown = model.pieces.iter().position(|p| p.kind == Kind::Unknown);
    Unigram::from(scored.collect(), unknown, model.byte_fallback).map_err(|e| e.to_string())
}

/// Merges are not stored: every way to make a piece of two is one, the best piece first.
fn bpe(model: &Model) -> Result<BPE, String> {
    let ids: HashMap<&str, u32> = model.pieces.iter().zip(0..).map(|(p, id)| (p.text.as_str(), id)).collect();
    let is_normal = |text: &str| ids.get(text).is_some_and(|&id| model.pieces[id as usize].kind == Kind::Normal);
    let mut order: Vec<&proto::Piece> = model.pieces.iter().filter(|p| p.kind == Kind::Normal).collect();
    order.sort_by(|a, b| b.score.total_cmp(&a.score));
    let mut merges = Vec::new();
    for piece in order {
        for (at, _) in piece.text.char_indices().skip(1) {
            let (left, right) = piece.text.split_at(at);
            if is_normal(left) && is_normal(right) {
                merges.push((left.to_string(), right.to_string()));
            }
        }
    }
    let unknown = model.pieces.iter().find(|p| p.kind == Kind::Unknown).map(|p| p.text.clone()).unwrap_or_default();
    let user_defined = model.pieces.iter().any(|p| p.kind == Kind::UserDefined);
    let vocab: Vocab = ids.into_iter().map(|(text, id)| (text.to_string(), id)).collect();
    BPE::builder()
        .vocab_and_merges(vocab, merges)
        .unk_token(unknown)
        .fuse_unk(true)
        .byte_fallback(model.byte_fallback)
        // User-defined pieces come as words of their own: no merges make them.
        .ignore_merges(user_defined)
        .build()
        .map_err(|e| e.to_string())
}

/// A regular expression for the user-defined pieces, the longest first.
fn any_user_defined(model: &Model) -> Option<String> {
    let pieces = user_defined(model);
    let escaped: Vec<String> = pieces.iter().map(|text| escape(text)).collect();
    (!escaped.is_empty()).then(|| escaped.join("|"))
}

fn user_defined(model: &Model) -> Vec<&str> {
    let mut pieces: Vec<&str> = model.pieces.iter().filter(|p| p.kind == Kind::UserDefined).map(|p| p.text.as_str()).collect();
    pieces.sort_by_key(|text| std::cmp::Reverse(text.len()));
    pieces
}

/// Escapes what both regular-expression engines in use read as an operator.
fn escape(text: &str) -> String {
    let operator = |c: char| "\\.+*?()|[]{}^$#&-~".contains(c);
    text.chars().flat_map(|c| operator(c).then_some('\\').into_iter().chain([c])).collect()
}

/// SentencePiece's steps, in its order.
fn normalizers(model: &Model) -> Result<Vec<NormalizerWrapper>, String> {
    let mut steps: Vec<NormalizerWrapper> = Vec::new();
    let rules = if model.charsmap.is_empty() { None } else { Some(charsmap::read(&model.charsmap)?) };
    let replace = |pattern: ReplacePattern, with: &str| -> Result<NormalizerWrapper, String> {
        Ok(NormalizerWrapper::Replace(Replace::new(pattern, with).map_err(|e| e.to_string())?))
    };
    let literal = |text: &str| ReplacePattern::String(text.into());
    let regex = |text: String| ReplacePattern::Regex(text);

    // User-defined pieces are not normalised: those that would change step aside.
    let changes = |text: &str| text.contains(' ') || rules.as_ref().is_some_and(|rules| rules.normalize_string(text) != text);
    let hidden: Vec<(&str, String)> = user_defined(model)
        .into_iter()
        .filter(|text| changes(text))
        .zip(HIDDEN..)
        .filter_map(|(text, code)| Some((text, char::from_u32(code)?.to_string())))
        .collect();
    let blank = if model.escape_whitespaces { BLANK } else { " " };
    let prefix = |text: &str| model.add_dummy_prefix.then(|| NormalizerWrapper::Prepend(Prepend::new(text.into())));
    // In front of any text (a blank, since rules may change its sign), or of what is left once blanks are removed.
    let (early, late) = if model.remove_extra_whitespaces { (None, prefix(blank)) } else { (prefix(" "), None) };
    steps.extend(early);
    for (text, sign) in &hidden {
        steps.push(replace(literal(text), sign)?);
    }
    if let Some(rules) = rules {
        // The library applies rules to a character with its marks by the shortest match, which would lose marks:
        // composed beforehand, most are one character. These rules are NFKC and more, which composing does not change.
        let composed = matches!(model.rules.as_str(), "nmt_nfkc" | "nfkc" | "nmt_nfkc_cf" | "nfkc_cf");
        steps.extend(composed.then_some(NormalizerWrapper::NFC(NFC)));
        // A character for the library as well, and two for SentencePiece.
        if let Some(return_) = rules.transform("\r") {
            steps.push(replace(literal("\r\n"), &format!("{return_}{}", rules.transform("\n").unwrap_or("\n")))?);
        }
        steps.push(NormalizerWrapper::Precompiled(rules));
        steps.extend(composed.then_some(NormalizerWrapper::NFC(NFC)));
    }
    if model.remove_extra_whitespaces {
        steps.push(replace(regex(r"\A +".into()), "")?);
        steps.push(replace(regex(" {2,}".into()), " ")?);
    }
    if model.escape_whitespaces {
        steps.push(replace(literal(" "), BLANK)?);
    }
    if model.remove_extra_whitespaces {
        steps.push(replace(regex(format!("{blank}+\\z")), "")?);
    }
    for (text, sign) in &hidden {
        steps.push(replace(literal(sign), &text.replace(' ', blank))?);
    }
    steps.extend(late);
    Ok(steps)
}

fn decoders(model: &Model) -> Result<Vec<DecoderWrapper>, String> {
    let replace = |text: &str, with: &str| -> Result<DecoderWrapper, String> {
        Ok(DecoderWrapper::Replace(Replace::new(text, with).map_err(|e| e.to_string())?))
    };
    let unknown = model.pieces.iter().find(|p| p.kind == Kind::Unknown);
    let mut steps = Vec::new();
    if let Some(piece) = unknown {
        steps.push(replace(&piece.text, UNKNOWN)?);
    }
    steps.push(replace(BLANK, " ")?);
    if model.byte_fallback {
        steps.push(DecoderWrapper::ByteFallback(ByteFallback::new()));
    }
    steps.push(DecoderWrapper::Fuse(Fuse::new()));
    // The blank that encoding put first, or all of them where it leaves none.
    match (model.remove_extra_whitespaces, model.add_dummy_prefix) {
        (true, _) => steps.push(DecoderWrapper::Strip(Strip::new(' ', u32::MAX as usize, 0))),
        (false, true) => steps.push(DecoderWrapper::Strip(Strip::new(' ', 1, 0))),
        (false, false) => {}
    }
    steps.push(replace(UNKNOWN, &model.unk_surface)?);
    Ok(steps)
}
