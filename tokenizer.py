"""Tokenizers by name, each a tiktoken.Encoding.

    load_tokenizer("gpt2")              GPT-2's 50,257-token BPE, through tiktoken (downloaded once)
    load_tokenizer("bytes")             the 256 bytes and <|endoftext|>; needs no download
    load_tokenizer("tokenizer.json")    a byte-level BPE of your own, as train_tokenizer.py writes it, or Hugging Face
    load_tokenizer("hf_model")          the same of a Hugging Face folder

tokenizer.json holds {"name", "pat_str", "tokens", "special_tokens"}: `tokens` are base64 byte strings whose place in
the list is their id and their merge rank, as in tiktoken's own files, null for ids that are special tokens or nothing.
A checkpoint carries its tokenizer as a name or, for one of your own, as that same dict.
"""

import base64
import hashlib
import json
import os
import sys

import numpy as np
import tiktoken

EOT = "<|endoftext|>"  # opens every document
PATTERNS = {
    # Of GPT-2 and of GPT-4 (cl100k_base), in the words that Python's, Rust's and Ruby's engines share.
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def load_tokenizer(name):
    """The tiktoken.Encoding for "gpt2", "bytes", a path to a tokenizer.json or a folder that holds one, or its dict.

    Exits with one line if GPT-2's vocabulary cannot be had or the file is not a tokenizer.
    """
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as e:  # no network, or a file that fails tiktoken's hash
            hint = "go online once, or set TIKTOKEN_CACHE_DIR to a folder that holds it"
            sys.exit(f"cannot get GPT-2's vocabulary ({type(e).__name__}): {hint} (texts go with --tokenizer=bytes)")
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        # No merges, so where a text is split does not matter; short pieces are fastest.
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,64})", mergeable_ranks=ranks, special_tokens={EOT: 256})
    if isinstance(name, str) and os.path.isdir(name):
        path = os.path.join(name, "tokenizer.json")
        return load_tokenizer(path) if os.path.exists(path) else load_vocab_json(os.path.join(name, "vocab.json"))
    try:
        if isinstance(name, str):
            with open(name, encoding="utf-8") as f:
                state = json.load(f)
            if "model" in state:
                return load_hugging_face(name, state)
        else:
            state = name
        if EOT not in state["special_tokens"] or state["name"] in ("gpt2", "bytes"):
            raise ValueError(f"it needs {EOT} and a name of its own")
        ranks = {base64.b64decode(token): i for i, token in enumerate(state["tokens"]) if token is not None}
        return new_encoding(state["name"], state["pat_str"], ranks, state["special_tokens"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        where = name if isinstance(name, str) else "the tokenizer in this checkpoint"
        why = f"{type(e).__name__}: {e}"
        sys.exit(f"{where}: not a tokenizer ({why}); use gpt2, bytes or the path of a tokenizer.json")


def new_encoding(name, pat_str, ranks, special):
    """A tiktoken.Encoding; raises ValueError where tiktoken would panic."""
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise ValueError(f"it has no token for {len(missing)} of the 256 bytes")
    return tiktoken.Encoding(name, pat_str=pat_str, mergeable_ranks=ranks, special_tokens=special)


def cut(text, size=400_000):
    """A text in parts of so many characters."""
    return [text[i : i + size] for i in range(0, len(text), size)]


def encode(enc, text, eot=False):
    """The token ids of a text, a NumPy array of uint32: what every script has for it.

    <|endoftext|> in it is a token only with eot, other special tokens are always. Half of a surrogate pair becomes "?".
    """
    special = enc.special_tokens_set if eot else enc.special_tokens_set - {EOT}
    try:
        return enc.encode_to_numpy(text, allowed_special=special, disallowed_special=())
    except UnicodeEncodeError:
        return encode(enc, text.encode(errors="replace").decode(), eot)
    except ValueError:  # a million blanks in a row are more than the engine of the pattern can go back over
        return np.concatenate([encode(enc, part, eot) for part in cut(text)])


def tokenizer_state(enc):
    """What a checkpoint stores for `enc`: a name, or the dict that tokenizer.json holds."""
    if enc.name in ("gpt2", "bytes"):
        return enc.name
    tokens = [None] * (max(enc._mergeable_ranks.values()) + 1)
    for token, i in enc._mergeable_ranks.items():
        tokens[i] = base64.b64encode(token).decode()
    special = dict(enc._special_tokens)
    return {"name": enc.name, "pat_str": enc._pat_str, "tokens": tokens, "special_tokens": special}


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


def load_hugging_face(path, state):
    """The tiktoken.Encoding of what a Hugging Face tokenizer.json holds, a byte-level BPE with <|endoftext|>.

    "gpt2" and "bytes" if it is one of those. Exits with one line for other kinds of tokenizers.
    """
    try:
        if state["model"]["type"] != "BPE" or state.get("normalizer"):
            raise ValueError("it is not a plain BPE")
        special = {token["content"]: token["id"] for token in state["added_tokens"]}
        if any(token.get(x) for token in state["added_tokens"] for x in ("lstrip", "rstrip", "single_word")):
            raise ValueError("its special tokens take blanks from the text beside them")
        byte_of = {character: b for b, character in byte_characters().items()}
        vocab = state["model"]["vocab"]
        ranks = {bytes(byte_of[c] for c in token): i for token, i in vocab.items() if token not in special}
        steps = state["pre_tokenizer"].get("pretokenizers", [state["pre_tokenizer"]])
        kinds = [step["type"] for step in steps]
        pat_str = PATTERNS["gpt2"] if kinds == ["ByteLevel"] else steps[0]["pattern"]["Regex"]
        if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]) or EOT not in special:
            raise ValueError(f"it needs byte-level pieces and {EOT}")
        isolated = steps[0].get("behavior", "Isolated") == "Isolated" and not steps[0].get("invert")
        if steps[-1]["add_prefix_space"] or not isolated:
            raise ValueError("it changes the text, or leaves some of it out")
        cuts = steps[-1].get("use_regex", True)  # by GPT-2's pattern
        if cuts if len(kinds) > 1 else not cuts and len(ranks) > 256:
            raise ValueError("it cuts text into pieces otherwise")
        pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in state["model"]["merges"]]
        order = [vocab[a + b] for a, b in pairs]
        if order != sorted(order):
            raise ValueError("the order of its merges is not that of its tokens")
        return named(pat_str, ranks, special)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        sys.exit(f"{path}: not a byte-level BPE that can be read ({type(e).__name__}: {e})")


def named(pat_str, ranks, special):
    """The tiktoken.Encoding of these tokens: "gpt2" or "bytes" if it is one of those."""
    if ranks == {bytes([b]): b for b in range(256)} and special == {EOT: 256}:
        return load_tokenizer("bytes")
    if pat_str == PATTERNS["gpt2"] and len(ranks) == 50256 and special == {EOT: 50256}:
        gpt2 = load_tokenizer("gpt2")
        if ranks == gpt2._mergeable_ranks:
            return gpt2
    return new_encoding(own_name(ranks, special), pat_str, ranks, special)


def load_vocab_json(path):
    """GPT-2's tiktoken.Encoding, if a vocab.json, as older versions of transformers save it, is GPT-2's.

    With the tokens of an added_tokens.json beside it.
    """
    enc, characters = load_tokenizer("gpt2"), byte_characters()
    beside = os.path.join(os.path.dirname(path), "added_tokens.json")
    try:
        with open(path, encoding="utf-8") as f:
            vocab = json.load(f)
        same = all(vocab["".join(characters[b] for b in token)] == i for token, i in enc._mergeable_ranks.items())
        if same and os.path.exists(beside):
            with open(beside, encoding="utf-8") as f:
                return named(enc._pat_str, enc._mergeable_ranks, enc._special_tokens | json.load(f))
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        sys.exit(f"{path}: not GPT-2's vocabulary; save the tokenizer as tokenizer.json (new transformers do)")
    return enc


def own_name(ranks, special):
    """A name for a tokenizer of one's own: the same for the same tokens."""
    tokens = b" ".join(base64.b64encode(token) for token in sorted(ranks, key=ranks.get))
    if special != {EOT: len(ranks)}:
        tokens += json.dumps([sorted(ranks.values())[:1], special], sort_keys=True).encode()
    return f"bpe-{len(ranks) + len(special)}-{hashlib.sha256(tokens).hexdigest()[:8]}"
