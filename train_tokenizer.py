"""Train a tokenizer of your own: a byte-level BPE.

    pip install rustbpe
    python train_tokenizer.py --data=my_texts --vocab_size=8192 --out=tokenizer.json
    python fineweb.py --dataset=my_texts --tokenizer=tokenizer.json --out_dir=my_shards

Byte-level BPE (https://arxiv.org/abs/1508.07909, on bytes since GPT-2): a pattern cuts text into pieces, words by and
large; inside of one, starting from bytes, the pair of tokens that was the most frequent in training becomes one token,
again and again. Training is rustbpe's (1.1 s for 34 MB on 2 cores, where Hugging Face's tokenizers took 3.0 s for
tokens that compress the same). Every twentieth document is held out, to see how well the tokens compress what they have
not been trained on.
"""

import json
import os
import sys

from configurator import configure
from documents import Documents
from shards import write_whole
from tokenizer import EOT, PATTERNS, cut, encode, load_tokenizer, new_encoding, own_name, tokenizer_state

# -- settings: override any with --key=value --------------------------------------
data = "fineweb-edu"  # what to train on: a name or a path, as fineweb.py's --dataset
subset = ""  # of a dataset of the hub; empty: sample-10BT of fineweb(-edu)
text_column = "text"  # the column that holds the text
max_bytes = 100_000_000  # how much of it; 0: all
vocab_size = 8192  # tokens, <|endoftext|> among them
pattern = "gpt4"  # how text is cut into pieces: gpt4 or gpt2
out = "tokenizer.json"  # the file to write


def train(texts, vocab_size, pat_str):
    """A tiktoken.Encoding of vocab_size tokens, the last one <|endoftext|>, trained on texts by rustbpe."""
    try:
        import rustbpe
    except ImportError:
        sys.exit("training a tokenizer needs rustbpe: pip install rustbpe")
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(texts, vocab_size - 1, pattern=pat_str)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    special = {EOT: len(ranks)}
    return new_encoding(own_name(ranks, special), pat_str, ranks, special)


def bytes_per_token(enc, texts):
    """UTF-8 bytes of the texts over their tokens: the higher, the better enc compresses them."""
    size = sum(len(text.encode(errors="replace")) for text in texts)
    return size / sum(len(encode(enc, text)) for text in texts)


def main():
    if vocab_size < 257:
        sys.exit(f"--vocab_size={vocab_size}: must be at least 257, the bytes and {EOT}")
    if pattern not in PATTERNS:
        sys.exit(f"--pattern={pattern}: choose {' or '.join(PATTERNS)}")
    if not os.path.isdir(os.path.dirname(out) or "."):
        sys.exit(f"--out={out}: there is no folder {os.path.dirname(out)}")
    if os.path.exists(out):
        sys.exit(f"--out={out}: exists already; choose another, or delete it")
    held_out, size = [], 0
    documents = Documents(data, subset or ("sample-10BT" if data.startswith("fineweb") else None), text_column)

    def training_texts():
        """Of every twenty documents nineteen; the twentieth is held out."""
        nonlocal size
        for i, text in enumerate(documents):
            if i % 20 == 19:
                held_out.append(text)
            else:
                yield from cut(text)
            size += len(text.encode(errors="replace"))
            if 0 < max_bytes <= size:
                break

    enc = train(training_texts(), vocab_size, PATTERNS[pattern])
    if not size:
        sys.exit(f"--data={data}: holds no text to train on; {documents.report()}".removesuffix("; "))
    if enc.n_vocab < vocab_size:
        print(f"the text has pairs for {enc.n_vocab} tokens only, not {vocab_size}")
    try:
        write_whole(out, lambda f: f.write(json.dumps(tokenizer_state(enc)).encode()))
    except OSError as e:
        sys.exit(f"--out={out}: cannot be written ({e.strerror})")
    print(f"{out}: {enc.n_vocab} tokens, from {size:,} bytes of {data}")
    if documents.report():
        print(documents.report())
    if held_out:
        print(f"bytes per token on {len(held_out)} documents that were held out:")
        print(f"  {enc.name:24} {bytes_per_token(enc, held_out):.3f}")
        try:
            print(f"  {'gpt2 (50257)':24} {bytes_per_token(load_tokenizer('gpt2'), held_out):.3f}")
        except SystemExit as e:
            print(f"  gpt2: {e}")
    else:
        print("fewer than 20 documents: none was held out to measure the compression on")


if __name__ == "__main__":
    configure(globals())
    main()
