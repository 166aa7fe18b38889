"""Tokenizers by name, each a tiktoken.Encoding.

    load_tokenizer("gpt2")              GPT-2's 50,257-token BPE, through tiktoken (downloaded once)
    load_tokenizer("bytes")             the 256 bytes and <|endoftext|>; needs no download
    load_tokenizer("tokenizer.json")    a byte-level BPE, from train_tokenizer.py or Hugging Face
    load_tokenizer("hf_model")          the same, of a Hugging Face folder

Byte-level BPE: a regular expression splits text into pieces, roughly words. Within a piece,
starting from bytes, the pair of neighbors whose merged token has the lowest rank is merged, again
and again. A token's rank is also its id. tokenizer.json is Hugging Face's format, which lists the
vocabulary and the merges. A checkpoint stores its tokenizer as a name ("gpt2", "bytes") or as the
content of that file.
"""

import base64
import functools
import hashlib
import itertools
import json
import os
import re

from files import check_lfs_pointer
from script import UserError

import numpy as np
import tiktoken

EOT = "<|endoftext|>"  # starts every document
# How text is split into pieces, in regex syntax that Python, Rust and Oniguruma agree on.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # GPT-4's, cl100k_base
    "gpt4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
ADDED_TOKEN = {"normalized": False, "special": True}  # Hugging Face's flags of <|endoftext|>
# What a damaged or unsupported file can raise while it is read.
FORMAT_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError)


# -- loading ------------------------------------------------------------------------
def load_tokenizer(source):
    """The tiktoken.Encoding of "gpt2", "bytes", or a tokenizer.json: a path, folder or dict.

    Raises UserError if GPT-2's vocabulary cannot be downloaded or the file is not supported.
    """
    if source == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as e:  # no network, or a file whose hash is wrong
            hint = "go online once, or set TIKTOKEN_CACHE_DIR to a folder that holds it"
            raise UserError(
                f"cannot get GPT-2's vocabulary ({type(e).__name__}): {hint} "
                "(texts work with --tokenizer=bytes)"
            )
    if source == "bytes":
        # There are no merges, so any split will do; short pieces are fastest.
        ranks = {bytes([i]): i for i in range(256)}
        return new_encoding("bytes", r"(?s:.{1,64})", ranks, {EOT: 256})
    if isinstance(source, dict):
        return from_tokenizer_json(source, "the tokenizer in this checkpoint")
    if os.path.isdir(source):
        path = f"{source}/tokenizer.json"
        if not os.path.exists(path):
            return load_vocab_json(f"{source}/vocab.json")
        source = path
    check_lfs_pointer(source)
    try:
        with open(source, encoding="utf-8") as f:
            content = json.load(f)
    except (OSError, ValueError) as e:
        raise UserError(
            f"{source}: not a tokenizer ({type(e).__name__}: {e}); use gpt2, bytes or the path of "
            "a tokenizer.json"
        )
    return from_tokenizer_json(content, source)


def new_encoding(name, pattern, ranks, added_tokens, flags=None):
    """A tiktoken.Encoding; raises ValueError where tiktoken would panic.

    added_tokens: {content: id} of what is found in a text before it is split into pieces. flags
    says which of them are not as <|endoftext|> is: {content: ADDED_TOKEN's fields}.
    """
    # Every byte needs a token, or some text cannot be encoded.
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise ValueError(f"it has no token for {len(missing)} of the 256 bytes")
    enc = tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=added_tokens
    )
    enc.added_token_flags = flags or {}
    return enc


def copy_encoding(enc):
    """Another tiktoken.Encoding of the same tokens."""
    flags = getattr(enc, "added_token_flags", None)
    return new_encoding(enc.name, enc._pat_str, enc._mergeable_ranks, enc._special_tokens, flags)


def canonical_encoding(pattern, ranks, special_tokens, flags=None):
    """The tiktoken.Encoding of these tokens, named "gpt2" or "bytes" if it is one of those."""
    # The same tokens get the same name, wherever they come from.
    if ranks == {bytes([b]): b for b in range(256)} and special_tokens == {EOT: 256}:
        return load_tokenizer("bytes")
    if pattern == PATTERNS["gpt2"] and len(ranks) == 50256 and special_tokens == {EOT: 50256}:
        gpt2 = load_tokenizer("gpt2")
        if ranks == gpt2._mergeable_ranks:
            return gpt2
    return new_encoding(hash_name(ranks, special_tokens), pattern, ranks, special_tokens, flags)


def hash_name(ranks, special_tokens):
    """A name such as "bpe-8192-1f2e3d4c", the same for the same tokens."""
    # Hash the tokens in order; other special tokens than <|endoftext|> count too.
    tokens = b" ".join(base64.b64encode(token) for token in sorted(ranks, key=ranks.get))
    if special_tokens != {EOT: len(ranks)}:
        others = [sorted(ranks.values())[:1], special_tokens]
        tokens += json.dumps(others, sort_keys=True).encode()
    digest = hashlib.sha256(tokens).hexdigest()[:8]
    return f"bpe-{len(ranks) + len(special_tokens)}-{digest}"


# -- encoding -----------------------------------------------------------------------
def split_text(text, size=400_000):
    """A text in parts of `size` characters."""
    return [text[i : i + size] for i in range(0, len(text), size)]


def encode(enc, text, allow_eot=False):
    """The token ids of a text, a uint32 array. All scripts encode text with this function.

    <|endoftext|> in the text is a token only with allow_eot; other added tokens always are. A lone
    surrogate becomes "?".
    """
    patterns = added_token_patterns(enc, allow_eot)
    if patterns:
        return encode_parts(enc, text, patterns)
    special = enc.special_tokens_set if allow_eot else enc.special_tokens_set - {EOT}
    return encode_with_tiktoken(enc, text, special)


def token_flags(enc, token):
    """Hugging Face's flags of an added token: {"special", "normalized"}."""
    return getattr(enc, "added_token_flags", {}).get(token, ADDED_TOKEN)


@functools.lru_cache(maxsize=256)
def added_token_patterns(enc, allow_eot):
    """Regular expressions for added tokens, in the order in which Hugging Face looks for them.

    Empty if tiktoken finds the same tokens. Of several that start at one place it takes any,
    Hugging Face the longest; and those that are `normalized` are looked for after the others.
    """
    tokens = enc.special_tokens_set if allow_eot else enc.special_tokens_set - {EOT}
    groups = {False: [], True: []}
    for token in sorted(tokens, key=len, reverse=True):
        groups[token_flags(enc, token)["normalized"]].append(token)
    is_ambiguous = any(b.startswith(a) for a, b in itertools.pairwise(sorted(tokens)))
    if not is_ambiguous and not groups[True]:
        return []
    return [re.compile("|".join(map(re.escape, group))) for group in groups.values() if group]


def encode_parts(enc, text, patterns):
    """encode() of a text that is first split at what the patterns match."""
    if not patterns:
        return encode_with_tiktoken(enc, text, set())
    # What is between the matches is split by the next pattern.
    parts = []
    end = 0
    for match in patterns[0].finditer(text):
        parts.append(encode_parts(enc, text[end : match.start()], patterns[1:]))
        parts.append([enc._special_tokens[match[0]]])
        end = match.end()
    parts.append(encode_parts(enc, text[end:], patterns[1:]))
    return np.concatenate(parts).astype(np.uint32)


def encode_with_tiktoken(enc, text, special):
    try:
        return enc.encode_to_numpy(text, allowed_special=special, disallowed_special=())
    except UnicodeEncodeError:
        return encode_with_tiktoken(enc, text.encode(errors="replace").decode(), special)
    except ValueError:
        # The regex engine hits its backtracking limit, for example on a million spaces.
        parts = [encode_with_tiktoken(enc, part, special) for part in split_text(text)]
        return np.concatenate(parts)


def token_byte_lengths(enc):
    """The UTF-8 bytes of each token id, a list of n_vocab ints; 0 for special and unused ids."""
    lengths = [0] * enc.n_vocab
    for token, rank in enc._mergeable_ranks.items():
        lengths[rank] = len(token)
    # Added tokens that are ordinary text count too.
    for token, i in enc._special_tokens.items():
        if not token_flags(enc, token)["special"]:
            lengths[i] = len(token.encode())
    return lengths


# -- tokenizer.json, to and from ----------------------------------------------------
def byte_to_char():
    """{byte: character}: how byte-level tokenizers, since GPT-2, write bytes as text."""
    # Bytes that are printable in Latin-1 stand for themselves, the others for characters from 256
    # on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    mapping = {b: chr(b) for b in printable}
    for b in range(256):
        if b not in mapping:
            mapping[b] = chr(256 + len(mapping) - len(printable))
    return mapping


@functools.lru_cache(maxsize=8)
def tokenizer_state(enc):
    """What a checkpoint stores for `enc`: "gpt2", "bytes", or the content of its tokenizer.json."""
    return enc.name if enc.name in ("gpt2", "bytes") else to_tokenizer_json(enc)


def to_tokenizer_json(enc):
    """The content of a Hugging Face tokenizer.json, a dict, that encodes as `enc` does."""
    # How text is split into pieces.
    characters = byte_to_char()

    def to_text(token):
        return "".join(characters[b] for b in token)

    ranks = enc._mergeable_ranks
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = enc.name == "gpt2"  # it means GPT-2's pattern
    pre_tokenizer = byte_level
    if enc.name not in ("gpt2", "bytes"):
        split = {"type": "Split", "pattern": {"Regex": enc._pat_str}}
        split |= {"behavior": "Isolated", "invert": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    # The vocabulary, with the special tokens.
    vocab = {to_text(token): i for token, i in ranks.items()}
    added_tokens = []
    for content, i in sorted(enc._special_tokens.items(), key=lambda item: item[1]):
        vocab[content] = i
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        added_tokens.append({"id": i, "content": content, **flags, **token_flags(enc, content)})
    model = {
        "type": "BPE",
        "ignore_merges": True,  # a piece that is a token is not merged from bytes, as in tiktoken
        "vocab": vocab,
        "merges": [[to_text(a), to_text(b)] for a, b in bpe_merges(ranks)],
    }
    return {
        "version": "1.0",
        "added_tokens": added_tokens,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": model,
    }


def bpe_merges(ranks):
    """The pair of tokens that each token of a BPE is merged from, in order of rank."""
    # A tokenizer.json needs the merges; tiktoken keeps only the tokens that they lead to.
    merges = []
    for token in sorted(ranks, key=ranks.get):
        rank = ranks[token]
        # Usually there is only one way to split it into two tokens that come before it.
        splits = []
        for i in range(1, len(token)):
            if ranks.get(token[:i], rank) < rank and ranks.get(token[i:], rank) < rank:
                splits.append((token[:i], token[i:]))
        if len(splits) > 1:
            splits = [last_merge(token, ranks)]
        merges += splits
    return merges


def last_merge(token, ranks):
    """The pair of tokens that BPE merges last to make a token."""
    # Encode the token with only the merges that have a lower rank, until two parts are left.
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = list(itertools.pairwise(parts))
        pair_ranks = [ranks.get(a + b, ranks[token]) for a, b in pairs]
        i = pair_ranks.index(min(pair_ranks))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def from_tokenizer_json(content, source):
    """The tiktoken.Encoding of a Hugging Face tokenizer.json: a byte-level BPE with <|endoftext|>.

    Raises UserError, which names the source, for other kinds of tokenizers.
    """
    try:
        if "tokens" in content:
            return from_old_format(content)
        model = content["model"]
        if model["type"] != "BPE":
            raise ValueError(f"it is of type {model['type']}, not BPE")
        if content.get("normalizer"):
            raise ValueError(f"it changes the text before ({content['normalizer']['type']})")
        # Tokens that change the text around them have no counterpart in tiktoken.
        added_tokens = {}
        flags = {}
        for token in content["added_tokens"]:
            text = token["content"]
            if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
                raise ValueError(f"its token {text} strips spaces or needs them around it")
            added_tokens[text] = token["id"]
            flags[text] = {key: token.get(key, ADDED_TOKEN[key]) for key in ADDED_TOKEN}
        if EOT not in added_tokens:
            raise ValueError(f"it has no {EOT}")
        flags[EOT] = ADDED_TOKEN
        # Back from characters to bytes.
        byte_of = {character: b for b, character in byte_to_char().items()}
        ranks = {}
        for token, i in model["vocab"].items():
            if token not in added_tokens:
                ranks[bytes(byte_of[c] for c in token)] = i
        pattern = read_pre_tokenizer(content["pre_tokenizer"], len(ranks))
        check_merges(model)
        return canonical_encoding(pattern, ranks, added_tokens, flags)
    except FORMAT_ERRORS as e:
        raise UserError(
            f"{source}: not a byte-level BPE that can be read ({type(e).__name__}: {e}); use gpt2, "
            "or train one with train_tokenizer.py"
        )


def read_pre_tokenizer(pre_tokenizer, num_ranks):
    """The regular expression of a pre_tokenizer; raises ValueError for other kinds."""
    # Either GPT-2's pattern, which ByteLevel has built in, or a pattern of its own and then
    # ByteLevel.
    if not pre_tokenizer:
        raise ValueError("it has no pre-tokenizer, as SentencePiece models")
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise ValueError(f"its pre-tokenizer is {' and '.join(kinds)}, not byte-level")
    if steps[-1]["add_prefix_space"]:
        raise ValueError("it adds a space before each text")
    use_regex = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"]:
        # It must split by GPT-2's pattern; without merges any split will do.
        if not use_regex and num_ranks > 256:
            raise ValueError("it does not split text into pieces")
        return PATTERNS["gpt2"]
    if use_regex:
        raise ValueError("its pre-tokenizer splits text twice")
    if steps[0].get("behavior", "Isolated") != "Isolated" or steps[0].get("invert"):
        raise ValueError("its pre-tokenizer leaves out or joins some of the text")
    return steps[0]["pattern"]["Regex"]


def check_merges(model):
    """Raise ValueError unless merges are in the order of their tokens' ids, as in tiktoken."""
    ids = []
    for pair in model["merges"]:
        a, b = pair if isinstance(pair, list) else pair.split(" ")
        ids.append(model["vocab"][a + b])
    if ids != sorted(ids):
        raise ValueError("its merges are not in the order of its tokens")


def from_old_format(content):
    """The tiktoken.Encoding of this project's old format, in old checkpoints and shards.

    "tokens" are base64 strings (null for special and unused ids) in the order of their ids.
    """
    ranks = {}
    for i, token in enumerate(content["tokens"]):
        if token is not None:
            ranks[base64.b64decode(token)] = i
    special_tokens = content["special_tokens"]
    if EOT not in special_tokens:
        raise ValueError(f"it has no {EOT}")
    return canonical_encoding(content["pat_str"], ranks, special_tokens)


def load_vocab_json(path):
    """GPT-2's tiktoken.Encoding, if a vocab.json (older transformers write it) is GPT-2's.

    The tokens of an added_tokens.json next to it are added; those that special_tokens_map.json
    names are special.
    """
    folder = os.path.dirname(path)
    if not os.path.exists(path):
        hint = "save it with save_pretrained() of new transformers"
        if os.path.exists(f"{folder}/tokenizer.model"):
            hint = "its tokenizer.model is SentencePiece's, which is not supported"
        raise UserError(f"{folder}: has no tokenizer.json; {hint}, or use gpt2")
    gpt2 = load_tokenizer("gpt2")
    characters = byte_to_char()
    try:
        with open(path, encoding="utf-8") as f:
            vocab = json.load(f)
        # Compare it token by token with GPT-2's.
        for token, i in gpt2._mergeable_ranks.items():
            if vocab["".join(characters[b] for b in token)] != i:
                raise ValueError
        added_tokens = read_json_file(f"{folder}/added_tokens.json")
        if not added_tokens:
            return gpt2
        # Its values are strings, dicts with a string, or lists of those.
        special = json.dumps(read_json_file(f"{folder}/special_tokens_map.json"))
        flags = {}
        for token in added_tokens:
            if json.dumps(token) not in special:
                flags[token] = {"normalized": True, "special": False}
        return canonical_encoding(
            gpt2._pat_str, gpt2._mergeable_ranks, gpt2._special_tokens | added_tokens, flags
        )
    except FORMAT_ERRORS:
        raise UserError(
            f"{path}: not GPT-2's vocabulary; save the tokenizer as tokenizer.json (new "
            "transformers do)"
        )


def read_json_file(path):
    """The content of a .json file, {} if there is none."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as f:
        return json.load(f)
