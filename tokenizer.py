"""Tokenizers by name, each a tiktoken.Encoding.

    load_tokenizer("gpt2")              GPT-2's 50,257-token BPE, through tiktoken (downloaded once)
    load_tokenizer("bytes")             the 256 bytes and <|endoftext|>; needs no download
    load_tokenizer("tokenizer.json")    a byte-level BPE of your own

tokenizer.json holds {"name", "pat_str", "tokens", "special_tokens"}: `tokens` are base64 byte
strings whose place in the list is their id and their merge rank, as in tiktoken's own files.
A checkpoint carries its tokenizer as a name or, for one of your own, as that same dict.
"""

import base64
import json
import sys

import tiktoken

EOT = "<|endoftext|>"  # opens every document


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
