import base64
import json
from random import Random
import re

from data.tokenizer import (
    EOT,
    copy_encoding,
    encode,
    load_tokenizer,
    to_tokenizer_json,
    token_byte_lengths,
    tokenizer_state,
)
from fineweb import write_shards
from script import UserError

import numpy as np
import pytest

ODD = [
    "",
    "a",
    "Hello,  world!\n\n",
    "naïve 日本語 🙂",
    "\x00\x7f\t",
    "<|endoftext|> is text here",
    "x" * 1000,
]


def test_bytes_are_utf8():
    enc = load_tokenizer("bytes")
    assert enc.n_vocab == 257 and enc.eot_token == 256
    for text in ODD:
        assert enc.encode_ordinary(text) == list(text.encode())
        assert enc.decode(enc.encode_ordinary(text)) == text


def test_gpt2(gpt2):
    assert gpt2.n_vocab == 50257 and gpt2.eot_token == 50256
    assert gpt2.encode_ordinary("Hello, I'm a language model,") == [
        15496,
        11,
        314,
        1101,
        257,
        3303,
        2746,
        11,
    ]


def test_state_round_trip(tmp_path):
    """A tokenizer of one's own, through a tokenizer.json and through the dict in a checkpoint.

    The former format is still read, with a name made from the tokens.
    """
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the"]
    former = {
        "name": "mine",
        "pat_str": r" ?\w+|\W",
        "tokens": [base64.b64encode(t).decode() for t in tokens],
        "special_tokens": {EOT: len(tokens)},
    }
    state = tokenizer_state(load_tokenizer(former))
    path, former_path = tmp_path / "tokenizer.json", tmp_path / "former.json"
    path.write_text(json.dumps(state))
    former_path.write_text(json.dumps(former))
    for source in (str(path), state, str(former_path), former):
        enc = load_tokenizer(source)
        assert tokenizer_state(enc) == state
        assert re.fullmatch(r"bpe-260-[0-9a-f]{8}", enc.name)
        assert enc.encode_ordinary("the the") == [257, 258]
        assert enc.eot_token == 259
    assert tokenizer_state(load_tokenizer("bytes")) == "bytes"


def test_byte_lengths():
    enc = load_tokenizer("bytes")
    assert token_byte_lengths(enc) == [1] * 256 + [0]


def test_byte_lengths_of_gpt2(gpt2):
    lengths = token_byte_lengths(gpt2)
    for text in ODD:
        assert sum(lengths[t] for t in gpt2.encode_ordinary(text)) == len(text.encode())
    assert lengths[gpt2.eot_token] == 0


def test_mistakes(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"gone\.json: not a tokenizer"):
        load_tokenizer("gone.json")
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"t\.json: not a byte-level BPE that can be read \(KeyError"
    ):
        load_tokenizer(str(tmp_path / "t.json"))

    def no_network(name):
        raise ConnectionError

    monkeypatch.setattr("tiktoken.get_encoding", no_network)
    with pytest.raises(UserError, match=r"TIKTOKEN_CACHE_DIR.*--tokenizer=bytes"):
        load_tokenizer("gpt2")


def hugging_face(base, tokens):
    """(our Encoding, Hugging Face's Tokenizer) of base with (token, options) added in order."""
    from tokenizers import AddedToken, Tokenizer

    theirs = Tokenizer.from_str(json.dumps(to_tokenizer_json(base)))
    theirs.add_tokens([AddedToken(token, **options) for token, options in tokens])
    return load_tokenizer(json.loads(theirs.to_str())), theirs


ORDINARY = {"special": False, "normalized": True}
SPACES = [(" " * n, ORDINARY) for n in range(31, 1, -1)] + [("\t" * n, ORDINARY) for n in (9, 2, 5)]
OVERLAPS = [
    ("ab", ORDINARY), ("abc", {"special": True, "normalized": False}), ("bcd", ORDINARY),
    ("xyz", {"special": False, "normalized": False}), ("ça", ORDINARY), ("çaé", ORDINARY),
    ("wxy", {"special": True, "normalized": True}), ("🙂", ORDINARY),
    ("🙂🙂🙂", ORDINARY), (".*", ORDINARY),
]  # fmt: skip


@pytest.mark.parametrize(
    "tokens",
    [[("covid", ORDINARY), ("covid-19", ORDINARY), ("covid-19-free", ORDINARY)], SPACES, OVERLAPS],
    ids=["covid", "spaces", "overlaps"],
)
def test_added_tokens_that_start_alike(tokens):
    """The longest is taken, as by Hugging Face, and ordinary ones have bytes."""
    enc, theirs = hugging_face(load_tokenizer("bytes"), tokens)
    random = Random(0)
    names = [token for token, _ in tokens]
    pieces = [*names, *"abcdwxyz -19çé🙂.*\n", "    ", EOT]
    for _ in range(300):
        text = "".join(random.choices(pieces, k=30))
        ids = encode(enc, text, allow_eot=True)
        assert ids.tolist() == theirs.encode(text).ids
        assert enc.decode(ids.tolist()) == text
        if tokens is not OVERLAPS:
            num_bytes = sum(token_byte_lengths(enc)[i] for i in ids)
            assert num_bytes == len(text.replace(EOT, "").encode())
    # Through a checkpoint, an export, and the copies that threads use.
    state = json.loads(json.dumps(tokenizer_state(enc)))
    again = load_tokenizer(state)
    for other in (again, copy_encoding(again)):
        assert encode(other, text, allow_eot=True).tolist() == ids.tolist()
    flags = {token["content"]: token["special"] for token in state["added_tokens"]}
    assert flags == {EOT: True, **{token: options["special"] for token, options in tokens}}


def test_shards_have_the_longest_added_tokens(tmp_path):
    """The same ids as the model is served with."""
    enc, theirs = hugging_face(load_tokenizer("bytes"), SPACES)
    texts = [" " * i + "def f():\n" + " " * 2 * i + "pass" for i in range(40)] + [
        f"{EOT} in a text"
    ]
    write_shards(texts, enc, str(tmp_path / "d"), "x", 10**6)
    meta = json.loads((tmp_path / "d" / "meta.json").read_text())
    ids = np.concatenate([np.load(tmp_path / "d" / s["file"]) for s in meta["shards"][::-1]])
    expected = []
    for text in texts[:-1]:
        expected += [enc.eot_token, *theirs.encode(text).ids]
    assert ids[: len(expected)].tolist() == expected
    assert np.count_nonzero(ids == enc.eot_token) == len(texts)
    num_bytes = sum(shard["bytes"] for shard in meta["shards"])
    assert num_bytes == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": None}, "it has no pre-tokenizer, as SentencePiece models"),
        ({"normalizer": {"type": "NFC"}}, r"it changes the text before \(NFC\)"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Digits"}, {"type": "ByteLevel"}]}},
            "its pre-tokenizer is Digits and ByteLevel",
        ),
        ({"model": {"type": "Unigram"}}, "it is of type Unigram, not BPE"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(change, message):
    content = {**to_tokenizer_json(load_tokenizer("bytes")), **change}
    with pytest.raises(UserError, match=rf"{message}.*; use gpt2, or train one with train_tokeni"):
        load_tokenizer(content)


def test_folders_without_a_tokenizer_json(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer\.json; save it with save_pretrained"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"its tokenizer\.model is SentencePiece's, which is not"):
        load_tokenizer(str(tmp_path))


def test_tokens_of_an_added_tokens_json(tmp_path, gpt2):
    """Those in special_tokens_map.json are special."""
    vocab = to_tokenizer_json(gpt2)["model"]["vocab"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    added = {"covid": 50257, "covid-19": 50258, "<|pad|>": 50259}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "<|pad|>"}}')
    enc = load_tokenizer(str(tmp_path))
    assert encode(enc, "covid-19<|pad|>covid").tolist() == [50258, 50259, 50257]
    assert token_byte_lengths(enc)[-3:] == [5, 8, 0]
