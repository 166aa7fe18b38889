"""Tokenizers by name, each a tiktoken.Encoding; as a script, train one of your own.

    load_tokenizer("gpt2")              GPT-2's 50,257-token BPE, through tiktoken (downloaded once)
    load_tokenizer("bytes")             the 256 bytes and <|endoftext|>; needs no download
    load_tokenizer("tokenizer.json")    a byte-level BPE of your own

    python tokenizer.py --data=my_texts --vocab_size=8192 --out=tokenizer.json
    python fineweb.py --dataset=my_texts --tokenizer=tokenizer.json --out_dir=my_shards

Byte-level BPE (https://arxiv.org/abs/1508.07909, on bytes since GPT-2): a pattern cuts text into pieces,
words by and large; inside of one, starting from bytes, the pair of tokens that was the most frequent in
training becomes one token, again and again. Training is rustbpe's (1.1 s for 34 MB on 2 cores, where
Hugging Face's tokenizers took 3.0 s for tokens that compress the same).

tokenizer.json holds {"name", "pat_str", "tokens", "special_tokens"}: `tokens` are base64 byte
strings whose place in the list is their id and their merge rank, as in tiktoken's own files.
A checkpoint carries its tokenizer as a name or, for one of your own, as that same dict.
"""

import base64
import hashlib
import json
import os
import sys

import tiktoken

from configurator import configure

# -- settings: override any with --key=value --------------------------------------
data = "fineweb-edu"  # what to train on: a name or a path, as fineweb.py's --dataset
subset = "sample-10BT"  # of fineweb(-edu)
text_column = "text"  # the column that holds the text
max_bytes = 100_000_000  # how much of it; 0: all
vocab_size = 8192  # tokens, <|endoftext|> among them
pattern = "gpt4"  # how text is cut into pieces: gpt4 or gpt2
out = "tokenizer.json"  # the file to write

EOT = "<|endoftext|>"  # opens every document
PATTERNS = {
    # Of GPT-2 and of GPT-4 (cl100k_base), in the words that Python's, Rust's and Ruby's engines share.
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def load_tokenizer(name):
    """The tiktoken.Encoding for "gpt2", "bytes", a path to a tokenizer.json, or its dict.

    Exits with one line if GPT-2's vocabulary cannot be had or the file is not a tokenizer.
    """
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as e:  # no network, or a file that fails tiktoken's hash
            sys.exit(
                f"cannot get GPT-2's vocabulary ({type(e).__name__}): go online once, set "
                "TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer=bytes"
            )
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        # No merges, so where a text is split does not matter; short pieces are fastest.
        return tiktoken.Encoding(
            "bytes", pat_str=r"(?s:.{1,64})", mergeable_ranks=ranks, special_tokens={EOT: 256}
        )
    try:
        if isinstance(name, str):
            with open(name, encoding="utf-8") as f:
                state = json.load(f)
        else:
            state = name
        if EOT not in state["special_tokens"] or state["name"] in ("gpt2", "bytes"):
            raise ValueError(f"it needs {EOT} and a name of its own")
        return tiktoken.Encoding(
            state["name"],
            pat_str=state["pat_str"],
            mergeable_ranks={base64.b64decode(t): i for i, t in enumerate(state["tokens"])},
            special_tokens=state["special_tokens"],
        )
    except (OSError, ValueError, KeyError, TypeError) as e:
        sys.exit(
            f"{name if isinstance(name, str) else 'the tokenizer in this checkpoint'}: not a tokenizer "
            f"({type(e).__name__}: {e}); use gpt2, bytes or the path of a tokenizer.json"
        )


def copy_encoding(enc):
    """A tiktoken.Encoding that shares nothing with enc but its tokens."""
    return tiktoken.Encoding(
        enc.name,
        pat_str=enc._pat_str,
        mergeable_ranks=enc._mergeable_ranks,
        special_tokens=enc._special_tokens,
    )


def tokenizer_state(enc):
    """What a checkpoint stores for `enc`: a name, or the dict that tokenizer.json holds."""
    if enc.name in ("gpt2", "bytes"):
        return enc.name
    ranks = sorted(enc._mergeable_ranks, key=enc._mergeable_ranks.get)
    return {
        "name": enc.name,
        "pat_str": enc._pat_str,
        "tokens": [base64.b64encode(t).decode() for t in ranks],
        "special_tokens": dict(enc._special_tokens),
    }


def token_byte_lengths(enc):
    """UTF-8 bytes of each token id, a list of n_vocab ints; 0 for special tokens and unused ids."""
    lengths = [0] * enc.n_vocab
    for token, rank in enc._mergeable_ranks.items():
        lengths[rank] = len(token)
    return lengths


# -- Hugging Face's tokenizer.json --------------------------------------------------


def byte_characters():
    """{byte: character}: how Hugging Face's byte-level tokenizers, after GPT-2's, write bytes as text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def load_hugging_face(path):
    """The tiktoken.Encoding of a Hugging Face tokenizer.json, a byte-level BPE with <|endoftext|>.

    "gpt2" and "bytes" if it is one of those. Exits with one line for other kinds of tokenizers.
    """
    try:
        with open(path, encoding="utf-8") as f:
            state = json.load(f)
        if state["model"]["type"] != "BPE" or state.get("normalizer"):
            raise ValueError("it is not a plain BPE")
        special = {token["content"]: token["id"] for token in state["added_tokens"]}
        byte_of = {character: b for b, character in byte_characters().items()}
        ranks = {
            bytes(byte_of[c] for c in token): i
            for token, i in state["model"]["vocab"].items()
            if token not in special
        }
        steps = state["pre_tokenizer"].get("pretokenizers", [state["pre_tokenizer"]])
        kinds = [step["type"] for step in steps]
        pat_str = PATTERNS["gpt2"] if kinds == ["ByteLevel"] else steps[0]["pattern"]["Regex"]
        if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]) or EOT not in special:
            raise ValueError(f"it needs byte-level pieces and {EOT}")
        if (
            steps[-1]["add_prefix_space"]
            or steps[0].get("behavior", "Isolated") != "Isolated"
            or steps[0].get("invert")
        ):
            raise ValueError("it changes the text, or leaves some of it out")
        if kinds == ["ByteLevel"] and not steps[0].get("use_regex", True) and len(ranks) > 256:
            raise ValueError("it does not cut text into pieces before it merges")
        pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in state["model"]["merges"]]
        order = [state["model"]["vocab"][a + b] for a, b in pairs]
        if order != sorted(order):
            raise ValueError("the order of its merges is not that of its tokens")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        sys.exit(f"{path}: not a byte-level BPE that can be read ({type(e).__name__}: {e})")
    if ranks == {bytes([b]): b for b in range(256)}:
        return load_tokenizer("bytes")
    if pat_str == PATTERNS["gpt2"] and len(ranks) == 50256:
        gpt2 = load_tokenizer("gpt2")
        if ranks == gpt2._mergeable_ranks:
            return gpt2
    return tiktoken.Encoding(own_name(ranks), pat_str=pat_str, mergeable_ranks=ranks, special_tokens=special)


def load_vocab_json(path):
    """GPT-2's tiktoken.Encoding, if a vocab.json, as older versions of transformers save it, is GPT-2's."""
    enc, characters = load_tokenizer("gpt2"), byte_characters()
    try:
        with open(path, encoding="utf-8") as f:
            vocab = json.load(f)
        same = all(
            vocab["".join(characters[b] for b in token)] == i for token, i in enc._mergeable_ranks.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        sys.exit(f"{path}: not GPT-2's vocabulary; save the tokenizer as tokenizer.json (new transformers do)")
    return enc


def own_name(ranks):
    """A name for a tokenizer of one's own: the same for the same tokens."""
    tokens = b" ".join(base64.b64encode(token) for token in sorted(ranks, key=ranks.get))
    return f"bpe-{len(ranks) + 1}-{hashlib.sha256(tokens).hexdigest()[:8]}"


# -- as a script --------------------------------------------------------------------


def train(texts, vocab_size, pat_str):
    """A tiktoken.Encoding of vocab_size tokens, the last one <|endoftext|>, trained on texts by rustbpe."""
    try:
        import rustbpe
    except ImportError:
        sys.exit("training a tokenizer needs rustbpe: pip install rustbpe")
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(texts, vocab_size - 1, pattern=pat_str)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    return tiktoken.Encoding(
        own_name(ranks), pat_str=pat_str, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)}
    )


def bytes_per_token(enc, texts):
    """UTF-8 bytes of the texts over their tokens: the higher, the better enc compresses them."""
    size = sum(len(text.encode(errors="replace")) for text in texts)
    return size / sum(len(enc.encode_ordinary(text)) for text in texts)


def main():
    from fineweb import Documents, cut
    from shards import write_whole

    if vocab_size < 257:
        sys.exit(f"--vocab_size={vocab_size}: must be at least 257, the bytes and {EOT}")
    if pattern not in PATTERNS:
        sys.exit(f"--pattern={pattern}: choose {' or '.join(PATTERNS)}")
    if not os.path.isdir(os.path.dirname(out) or "."):
        sys.exit(f"--out={out}: there is no folder {os.path.dirname(out)}")
    held_out, size = [], 0

    def training_texts():
        """Of every twenty documents nineteen; the twentieth is held out."""
        nonlocal size
        for i, text in enumerate(Documents(data, subset, text_column)):
            if i % 20 == 19:
                held_out.append(text)
            else:
                yield from cut(text)
            size += len(text.encode(errors="replace"))
            if 0 < max_bytes <= size:
                break

    enc = train(training_texts(), vocab_size, PATTERNS[pattern])
    if not size:
        sys.exit(f"--data={data}: holds no text to train on")
    if enc.n_vocab < vocab_size:
        print(f"the text has pairs for {enc.n_vocab} tokens only, not {vocab_size}")
    write_whole(out, lambda f: f.write(json.dumps(tokenizer_state(enc)).encode()))
    print(f"{out}: {enc.n_vocab} tokens, from {size:,} bytes of {data}")
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
