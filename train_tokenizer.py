"""Train your own tokenizer: a byte-level BPE.

    pip install rustbpe
    python train_tokenizer.py --data=my_texts --vocab_size=8192 --out=tokenizer.json
    python fineweb.py --dataset=my_texts --tokenizer=tokenizer.json --out_dir=my_shards

Byte-level BPE (https://arxiv.org/abs/1508.07909, on bytes since GPT-2): a pattern splits text into
pieces, roughly words. Within the pieces, starting from bytes, the pair of tokens that is most
frequent in the training text becomes a new token, again and again. rustbpe does the training (1.1 s
for 34 MB on 2 cores; Hugging Face's tokenizers took 3.0 s for tokens that compress the same). Every
twentieth document is held out, to measure how well the tokens compress unseen text.
"""

import json
import os

from configurator import check_choice, check_command_line, configure

if __name__ == "__main__":
    check_command_line(__file__)  # before the imports below, which take a while

from data.documents import Documents
from data.tokenizer import (
    EOT,
    PATTERNS,
    canonical_encoding,
    encode,
    load_tokenizer,
    split_text,
    to_tokenizer_json,
)
from files import atomic_write
from script import UserError, run_as_script

# -- settings: override any with --key=value --------------------------------------
data = "fineweb-edu"  # the text to train on: a name or a path, as --dataset of fineweb.py
subset = ""  # the subset of a dataset on the hub; empty: sample-10BT of fineweb(-edu)
text_column = "text"  # the column that holds the text
max_bytes = 100_000_000  # how many bytes of text to read, a twentieth of it held out; 0: all
vocab_size = 8192  # the number of tokens, including <|endoftext|>
pattern = "gpt4"  # how to split text into pieces: gpt4 or gpt2
out = "tokenizer.json"  # the file to write


def train(texts, vocab_size, pattern):
    """A tiktoken.Encoding of vocab_size tokens, the last one <|endoftext|>, trained on texts."""
    try:
        import rustbpe
    except ImportError:
        raise UserError("training a tokenizer needs rustbpe: pip install rustbpe")
    # One token less than asked for, since <|endoftext|> is the last one.
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(texts, vocab_size - 1, pattern=pattern)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    return canonical_encoding(pattern, ranks, {EOT: len(ranks)})


def bytes_per_token(enc, texts):
    """UTF-8 bytes of the texts divided by their tokens: higher means better compression."""
    num_bytes = sum(len(text.encode(errors="replace")) for text in texts)
    return num_bytes / sum(len(encode(enc, text)) for text in texts)


def print_compression(enc, texts):
    """Print bytes per token on held-out texts, next to GPT-2's tokenizer."""
    if not texts:
        print("fewer than 20 documents: none was held out to measure the compression on")
        return
    print(f"bytes per token on {len(texts)} held-out documents:")
    print(f"  {enc.name:24} {bytes_per_token(enc, texts):.3f}")
    try:
        gpt2 = load_tokenizer("gpt2")
    except UserError as e:
        print(f"  gpt2: {e}")
    else:
        print(f"  {'gpt2 (50257)':24} {bytes_per_token(gpt2, texts):.3f}")


def main():
    # Check everything before the training, which takes a while.
    if vocab_size < 257:
        raise UserError(f"--vocab_size={vocab_size}: must be at least 257, the bytes and {EOT}")
    check_choice("pattern", pattern, tuple(PATTERNS))
    folder = os.path.dirname(out) or "."
    if not os.path.isdir(folder):
        raise UserError(f"--out={out}: there is no folder {folder}")
    if os.path.exists(out):
        raise UserError(f"--out={out}: exists already; choose another, or delete it")
    default_subset = "sample-10BT" if data.startswith("fineweb") else None
    documents = Documents(data, subset or default_subset, text_column)
    # Documents are read once: most are trained on as they come, the held-out ones are kept.
    held_out = []
    size = 0

    def training_texts():
        """Yield nineteen of every twenty documents; hold out the twentieth."""
        nonlocal size
        for i, text in enumerate(documents):
            if i % 20 == 19:
                held_out.append(text)
            else:
                yield from split_text(text)  # in parts: a very long text slows the trainer down
            size += len(text.encode(errors="replace"))
            if 0 < max_bytes <= size:
                break

    # Train, and look at the result.
    enc = train(training_texts(), vocab_size, PATTERNS[pattern])
    if not size:
        line = f"--data={data}: holds no text to train on; {documents.report()}"
        raise UserError(line.removesuffix("; "))
    if enc.n_vocab < vocab_size:
        print(f"the text yields only {enc.n_vocab} tokens, not {vocab_size}")
    content = json.dumps(to_tokenizer_json(enc), ensure_ascii=False).encode()
    try:
        atomic_write(out, lambda f: f.write(content))
    except OSError as e:
        raise UserError(f"--out={out}: cannot be written ({e.strerror})")
    print(f"{out}: {enc.n_vocab} tokens, from {size:,} bytes of {data}")
    if documents.report():
        print(documents.report())
    print_compression(enc, held_out)


if __name__ == "__main__":
    with run_as_script():
        configure(globals())
        main()
