"""Trains small SentencePiece models and writes what SentencePiece says of tricky strings.

    pip install sentencepiece==0.2.3 protobuf
    python make.py TEXT [EXTRA_TEXT...]

TEXT is tiny Shakespeare or any other text in the public domain. Every model is stored without its compiled
normalisation rules, which are large and the same for all: they are in nmt_nfkc.charsmap.gz, and the test appends them
to the model (a second normalizer_spec is merged into the first, as protobuf does).
"""

import gzip
import io
import json
import pathlib
import random
import sys

import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as proto

HERE = pathlib.Path(__file__).parent
SEED = 17

STRINGS = [
    "", " ", "  ", "   \t ", "\n", "\r\n", "\t", "a", " a", "a ", " a ", "  a  ", "a  b", "a   b    c", "\ta\tb", "a\nb\n\nc\n",
    "Hello, world!", "Hello,world", "  Hello   world  ", "To be, or not to be: that is the question.", "ROMEO:\nBut, soft!",
    "the the the", "thethethe", "aaaaaaaaaaaaaaaaaaaaaaa", "aaa aaa aaaa", "abababababab", "mississippi", "                a",
    "a                b", "12345", "3.14159", "1,000,000", "x=1+2*(3-4)/5", "foo_bar-baz", "C:\\path\\to", "a|b&c#d~e^f$g", "[x] {y} <z>",
    "\"quoted\" 'single' `tick`", "don't can't I'll", "...", "!?!?", "--- ---", "@user #tag", "http://example.org/?q=1&r=2#top",
    "\u00e9", "e\u0301", "caf\u00e9 cafe\u0301", "na\u00efve r\u00e9sum\u00e9", "Gr\u00f6\u00dfe", "\u0130stanbul \u0131", "\u0141\u00f3d\u017a", "\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440", "\u05e9\u05dc\u05d5\u05dd", "\u0645\u0631\u062d\u0628\u0627", "\u0939\u093f\u0928\u094d\u0926\u0940", "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22",
    "\u4f60\u597d", "\u4e16\u754c\u4f60\u597d\u3002", "\u6771\u4eac\u90fd", "\u3053\u3093\u306b\u3061\u306f", "\u30ab\u30bf\u30ab\u30ca", "\uff76\uff9e", "\ud55c\uad6d\uc5b4", "\u1112\u1161\u11ab",
    "\U0001f600", "hi \U0001f600 there", "\U0001f469\u200d\U0001f680", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "\U0001d400\U0001d401", "\U00020000",
    "\uff21\uff22\uff23", "\uff21\u0301", "\uff11\uff12", "\u2460\u2461", "\u00bd", "\ufb01ne", "\u00b2\u00b3", "\u2122 \u00ae", "\u212b", "\u00a8x", "a\u00a8",
    "\u3000wide\u3000blank\u3000", "a\u00a0b", "a\u2003b", "a\u200bb", "a\ufeffb", "soft\u00adhyphen", "\u2028line\u2029",
    "\u0000", "a\u0000b", "\u0001\u0002", "\u001b[0m", "\u007f", "a\u0085b", "\ufffd", "\ufffe", "\ue000",
    "\u2581", "\u2581a", "a\u2581", "a\u2581b", "\u2581\u2581", " \u2581 ", "\u2047", "a \u2047 b",
    "<0x41>", "<0x0A>", "a<0x41>b", "<sep>", "<sep>a", "a<sep>", " <sep> ", "a <sep> b", "a  <sep>  b", "<sep><sep>", "<sep", "<se<sep>p>",
    "<long><longer>", "<longer", "x<tab\ty>z", "a\tb", "\t\t", "\n\n", "a\n\nb", "e\u0301\u0301", "z\u0300\u0323", "q\u0307\u0323", "\u1e9b\u0323",
    "control </s> in text", "<s>", "<unk>", "a<unk>b", "Vie\u0323\u0302t Vie\u0302\u0323t", "\u20acuro", "unknown \u2603\u2604 together", "\u2603 \u2604", "\u2603a\u2604",
]

UDS = ["<sep>", "<long>", "<longer>"]
MODELS = {
    "unigram-plain": dict(model_type="unigram", normalization_rule_name="identity"),
    "unigram-bytes": dict(model_type="unigram", normalization_rule_name="identity", byte_fallback=True, add_dummy_prefix=False,
                          remove_extra_whitespaces=False),
    "unigram-nfkc": dict(model_type="unigram", normalization_rule_name="nmt_nfkc", user_defined_symbols=UDS + ["\t", "\uff21"]),
    "unigram-nfkc-bytes": dict(model_type="unigram", normalization_rule_name="nmt_nfkc", byte_fallback=True, remove_extra_whitespaces=False,
                               pad_id=3, bos_piece="[B]", eos_piece="[E]", pad_piece="[P]"),
    "bpe-plain": dict(model_type="bpe", normalization_rule_name="identity", unk_surface="[?]"),
    "bpe-bytes": dict(model_type="bpe", normalization_rule_name="identity", byte_fallback=True, remove_extra_whitespaces=False,
                      allow_whitespace_only_pieces=True, split_digits=True),
    "bpe-nfkc": dict(model_type="bpe", normalization_rule_name="nmt_nfkc", bos_id=-1, unk_id=2, eos_id=0),
    "bpe-nfkc-bytes-user": dict(model_type="bpe", normalization_rule_name="nmt_nfkc", byte_fallback=True, add_dummy_prefix=False,
                                user_defined_symbols=UDS + ["\n", "\t", "\u2581\u2581"], remove_extra_whitespaces=False),
    "bpe-user": dict(model_type="bpe", normalization_rule_name="identity", user_defined_symbols=UDS + ["[x]", "th"]),
    "bpe-across-blanks": dict(model_type="bpe", normalization_rule_name="identity", byte_fallback=True, split_by_whitespace=False,
                              remove_extra_whitespaces=False),
}
REFUSED = {"word": dict(model_type="word", normalization_rule_name="identity"), "char": dict(model_type="char", normalization_rule_name="identity")}


def train(lines, options):
    out = io.BytesIO()
    options = dict(vocab_size=700, hard_vocab_limit=False, character_coverage=1.0, num_threads=1, minloglevel=2) | options
    spm.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, **options)
    return out.getvalue()


def random_strings(text, rng):
    """Pieces of the text with noise, so that not only the cases above are compared."""
    noise = [" ", "  ", "\t", "\n", "\u2581", "\u00e9", "\u4f60", "\U0001f600", "<sep>", "0", "Q", "zz", "\u0301", "\u3000"]
    for _ in range(120):
        at = rng.randrange(len(text) - 80)
        chars = list(text[at:at + rng.randrange(1, 60)])
        for _ in range(rng.randrange(4)):
            chars.insert(rng.randrange(len(chars) + 1), rng.choice(noise))
        yield "".join(chars)


def main():
    text = pathlib.Path(sys.argv[1]).read_text()
    text = text[:200_000] + "\n" + "\n".join(["x = 10;", "    if (a < b) { return [1, 2, 3]; }", "        caf\u00e9 \u00fc \u00e4 \u00f6", "/* 50% */ > @ # + _"] * 20)
    lines = [line for line in text.split("\n") if line]
    code = [line for line in lines if line.startswith("    ")]
    strings = list(dict.fromkeys(STRINGS + list(random_strings(text, random.Random(SEED)))))
    charsmap = None
    for name, options in MODELS.items():
        processor = spm.SentencePieceProcessor(model_proto=(model := train(lines, options)))
        whole = proto.ModelProto.FromString(model)
        if whole.normalizer_spec.precompiled_charsmap:
            charsmap = whole.normalizer_spec.precompiled_charsmap
            whole.normalizer_spec.precompiled_charsmap = b""
        # Names of the training run's files and of the machine's settings do not matter to anyone.
        whole.trainer_spec.ClearField("input")
        (HERE / f"{name}.model").write_bytes(whole.SerializeToString(deterministic=True))
        rng = random.Random(SEED)
        size = processor.vocab_size()
        sequences = [[rng.randrange(size) for _ in range(rng.randrange(1, 9))] for _ in range(60)]
        golden = {
            "nfkc": options["normalization_rule_name"] == "nmt_nfkc",
            "size": size,
            "bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id(), "unk": processor.unk_id(),
            "strings": [[s, ids := processor.encode_as_ids(s), processor.decode(ids)] for s in strings],
            "sequences": [[ids, processor.decode(ids)] for ids in sequences],
        }
        lines_out = json.dumps(golden, separators=(",", ":")).replace("],[\"", "],\n[\"").replace("\"sequences\"", "\n\"sequences\"")
        (HERE / f"{name}.json").write_text(lines_out + "\n")
        print(name, size, (HERE / f"{name}.model").stat().st_size, (HERE / f"{name}.json").stat().st_size)
    for name, options in REFUSED.items():
        (HERE / f"{name}.model").write_bytes(train(lines[:300], options | dict(vocab_size=100, use_all_vocab=name == "char")))
    (HERE / "nmt_nfkc.charsmap.gz").write_bytes(gzip.compress(charsmap, mtime=0))
    print("charsmap", len(charsmap), (HERE / "nmt_nfkc.charsmap.gz").stat().st_size)


main()
