import base64
import json
import re

from data.tokenizer import EOT, load_tokenizer, token_byte_lengths, tokenizer_state
from script import UserError

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
