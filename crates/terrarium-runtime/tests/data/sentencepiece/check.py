"""Opens the tokenizer.json of every model with Hugging Face's tokenizers and compares ids and texts.

    TERRARIUM_SENTENCEPIECE_OUT=DIR cargo test --release -p terrarium-runtime --test sentencepiece written_for_python
    pip install tokenizers
    python check.py DIR
"""

import json
import pathlib
import sys

from tokenizers import Tokenizer

failed = 0
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    strings, ids, decoded = json.loads((folder / "ids.json").read_text())
    for text, expected, back in zip(strings, ids, decoded):
        found = tokenizer.encode(text).ids
        if found != expected or tokenizer.decode(expected) != back:
            failed += 1
            print(folder.name, repr(text), found, expected, repr(tokenizer.decode(expected)), repr(back))
    print(folder.name, len(strings), "strings")
sys.exit(f"{failed} differ" if failed else 0)
