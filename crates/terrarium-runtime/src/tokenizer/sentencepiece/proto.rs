//! Reading SentencePiece's model file: the few protobuf messages of `sentencepiece_model.proto` that encoding needs.

/// What a piece is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Text, found by its score.
    Normal,
    /// Stands for what no piece covers.
    Unknown,
    /// Never in text: begin, end, padding.
    Control,
    /// Text that is always one piece.
    UserDefined,
    /// Known and not used.
    Unused,
    /// One byte, `<0x00>` to `<0xFF>`.
    Byte,
}

/// How text is cut into pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Algorithm {
    Unigram,
    Bpe,
    Word,
    Char,
}

/// One entry of the vocabulary.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Piece {
    pub(super) text: String,
    pub(super) score: f32,
    pub(super) kind: Kind,
}

/// What matters of `ModelProto`, with the defaults of the format.
#[derive(Debug, Clone)]
pub(super) struct Model {
    pub(super) pieces: Vec<Piece>,
    pub(super) algorithm: Algorithm,
    pub(super) byte_fallback: bool,
    pub(super) whitespace_as_suffix: bool,
    pub(super) unk_surface: String,
    pub(super) unk_piece: String,
    pub(super) bos_piece: String,
    pub(super) eos_piece: String,
    pub(super) pad_piece: String,
    /// Name of the normalisation, `nmt_nfkc` for most models.
    pub(super) rules: String,
    pub(super) charsmap: Vec<u8>,
    pub(super) add_dummy_prefix: bool,
    pub(super) remove_extra_whitespaces: bool,
    pub(super) escape_whitespaces: bool,
    /// Rules that would rewrite decoded text.
    pub(super) denormalizer: Vec<u8>,
}

impl Model {
    /// Parses the file's bytes. The error is a sentence that says where and why.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut model = Self {
            pieces: Vec::new(),
            algorithm: Algorithm::Unigram,
            byte_fallback: false,
            whitespace_as_suffix: false,
            unk_surface: " \u{2047} ".into(),
            unk_piece: "<unk>".into(),
            bos_piece: "<s>".into(),
            eos_piece: "</s>".into(),
            pad_piece: "<pad>".into(),
            rules: String::new(),
            charsmap: Vec::new(),
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
            denormalizer: Vec::new(),
        };
        let mut reader = Reader { all: bytes, at: 0, base: 0 };
        while let Some(field) = reader.field()? {
            match field.number {
                1 => model.pieces.push(piece(field.message()?).map_err(|e| format!("piece {}: {e}", model.pieces.len()))?),
                2 => model.trainer(field.message()?).map_err(|e| format!("trainer_spec: {e}"))?,
                3 => model.normalizer(field.message()?).map_err(|e| format!("normalizer_spec: {e}"))?,
                5 => model.denormalizer(field.message()?).map_err(|e| format!("denormalizer_spec: {e}"))?,
                _ => {}
            }
        }
        Ok(model)
    }

    fn trainer(&mut self, mut reader: Reader) -> Result<(), String> {
        while let Some(field) = reader.field()? {
            match field.number {
                3 => {
                    self.algorithm = match field.integer()? {
                        1 => Algorithm::Unigram,
                        2 => Algorithm::Bpe,
                        3 => Algorithm::Word,
                        4 => Algorithm::Char,
                        other => return Err(format!("model_type is {other}, which is none of 1 (unigram), 2 (BPE), 3 (word), 4 (char)")),
                    }
                }
                24 => self.whitespace_as_suffix = field.flag()?,
                35 => self.byte_fallback = field.flag()?,
                44 => self.unk_surface = field.text()?,
                45 => self.unk_piece = field.text()?,
                46 => self.bos_piece = field.text()?,
                47 => self.eos_piece = field.text()?,
                48 => self.pad_piece = field.text()?,
                _ => {}
            }
        }
        Ok(())
    }

    fn normalizer(&mut self, mut reader: Reader) -> Result<(), String> {
        while let Some(field) = reader.field()? {
            match field.number {
                1 => self.rules = field.text()?,
                2 => self.charsmap = field.bytes()?.to_vec(),
                3 => self.add_dummy_prefix = field.flag()?,
                4 => self.remove_extra_whitespaces = field.flag()?,
                5 => self.escape_whitespaces = field.flag()?,
                _ => {}
            }
        }
        Ok(())
    }

    fn denormalizer(&mut self, mut reader: Reader) -> Result<(), String> {
        while let Some(field) = reader.field()? {
            if field.number == 2 {
                self.denormalizer = field.bytes()?.to_vec();
            }
        }
        Ok(())
    }
}

fn piece(mut reader: Reader) -> Result<Piece, String> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: Kind::Normal };
    while let Some(field) = reader.field()? {
        match field.number {
            1 => piece.text = field.text()?,
            2 => piece.score = field.float()?,
            3 => {
                piece.kind = match field.integer()? {
                    1 => Kind::Normal,
                    2 => Kind::Unknown,
                    3 => Kind::Control,
                    4 => Kind::UserDefined,
                    5 => Kind::Unused,
                    6 => Kind::Byte,
                    other => return Err(format!("its type is {other}, which is none of 1 to 6")),
                }
            }
            _ => {}
        }
    }
    Ok(piece)
}

/// Walks the fields of one message. `base` is where the message lies in the file, for errors.
struct Reader<'a> {
    all: &'a [u8],
    at: usize,
    base: usize,
}

/// A field with its value as it is stored.
struct Field<'a> {
    number: u64,
    value: Value<'a>,
    /// Where the value lies in the file.
    place: usize,
}

enum Value<'a> {
    Integer(u64),
    Fixed32(u32),
    Fixed64,
    Bytes(&'a [u8]),
}

impl<'a> Reader<'a> {
    /// The next field; `None` at the end of the message.
    fn field(&mut self) -> Result<Option<Field<'a>>, String> {
        if self.at == self.all.len() {
            return Ok(None);
        }
        let tag_at = self.base + self.at;
        let tag = self.varint()?;
        let number = tag >> 3;
        if number == 0 || number >= 1 << 29 {
            return Err(format!("byte {tag_at} starts no protobuf field (number {number})"));
        }
        let (value, place) = match tag & 7 {
            0 => (Value::Integer(self.varint()?), tag_at),
            1 => {
                self.take(8)?;
                (Value::Fixed64, tag_at)
            }
            2 => {
                let length = self.varint()?;
                let place = self.base + self.at;
                (Value::Bytes(self.take(length)?), place)
            }
            5 => {
                let bytes = self.take(4)?;
                (Value::Fixed32(bytes.iter().rev().fold(0, |n, &b| n << 8 | u32::from(b))), tag_at)
            }
            other => return Err(format!("byte {tag_at} starts a field of the unknown wire type {other}")),
        };
        Ok(Some(Field { number, value, place }))
    }

    fn varint(&mut self) -> Result<u64, String> {
        let start = self.base + self.at;
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            let Some(&byte) = self.all.get(self.at) else { return Err(format!("the file ends inside the number at byte {start}")) };
            self.at += 1;
            let bits = u64::from(byte & 0x7F);
            if shift == 63 && bits > 1 {
                break;
            }
            value |= bits << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(format!("the number at byte {start} does not fit 64 bits"))
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8], String> {
        let left = self.all.len() - self.at;
        let short = || format!("the field at byte {} needs {length} bytes and {left} are left", self.base + self.at);
        let length = usize::try_from(length).ok().filter(|&n| n <= left).ok_or_else(short)?;
        let bytes = &self.all[self.at..self.at + length];
        self.at += length;
        Ok(bytes)
    }
}

impl<'a> Field<'a> {
    fn wrong(&self, expected: &str) -> String {
        format!("field {} at byte {} is not {expected}", self.number, self.place)
    }

    fn bytes(&self) -> Result<&'a [u8], String> {
        if let Value::Bytes(bytes) = self.value { Ok(bytes) } else { Err(self.wrong("a run of bytes")) }
    }

    fn message(&self) -> Result<Reader<'a>, String> {
        Ok(Reader { all: self.bytes()?, at: 0, base: self.place })
    }

    fn text(&self) -> Result<String, String> {
        std::str::from_utf8(self.bytes()?).map(String::from).map_err(|_| self.wrong("UTF-8 text"))
    }

    fn integer(&self) -> Result<u64, String> {
        if let Value::Integer(value) = self.value { Ok(value) } else { Err(self.wrong("an integer")) }
    }

    fn flag(&self) -> Result<bool, String> {
        Ok(self.integer()? != 0)
    }

    fn float(&self) -> Result<f32, String> {
        if let Value::Fixed32(bits) = self.value { Ok(f32::from_bits(bits)) } else { Err(self.wrong("a float")) }
    }
}
