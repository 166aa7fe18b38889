"""gigatoken encodes as tiktoken does: in shards, and on what is difficult to split into pieces."""

import json
import random

from conftest import TEXT
from data import batch_encoder
from data.batch_encoder import gigatoken_encoder
from data.tokenizer import (
    EOT,
    PATTERNS,
    encode,
    load_tokenizer,
    to_tokenizer_json,
)
import fineweb
from script import UserError
from test_fineweb import jsonl
from train_tokenizer import train

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken, Tokenizer

PIECES = [
    " ", "  ", "   ", "\n", "\r\n", "\t", "1", "12", "1234", "'s", "'S", "don't", "é", "日本",
    "🙂🙂", "\u200d", "ſ", "K", "ʼs", "a", "B", "_", "-", "...", "\u00a0", "½", "٣", EOT, "covid",
    "covid-19", "x" * 50, "\x00", "\ufeff", "İ", "ß", "\u0301", "<|", "|>",
]  # fmt: skip


def own(pattern):
    return train([TEXT], 300, PATTERNS[pattern])


def with_added_tokens():
    theirs = Tokenizer.from_str(json.dumps(to_tokenizer_json(load_tokenizer("bytes"))))
    theirs.add_tokens([AddedToken(" " * n) for n in range(9, 1, -1)])
    theirs.add_tokens([AddedToken("covid"), AddedToken("covid-19")])
    return load_tokenizer(json.loads(theirs.to_str()))


@pytest.mark.parametrize("name", ["gpt2", "bytes", "own gpt2", "own gpt4", "added"])
def test_the_same_ids(request, name):
    """Each code point, alone and between letters, and random mixtures of hard pieces."""
    pytest.importorskip("gigatoken")
    if name == "gpt2":
        enc = request.getfixturevalue("gpt2")
    elif name == "added":
        enc = with_added_tokens()
    else:
        enc = own(name[4:]) if name.startswith("own") else load_tokenizer(name)
    fast = gigatoken_encoder(enc)
    rng = random.Random(0)
    texts = ["".join(rng.choices(PIECES, k=rng.randint(1, 30))) for _ in range(500)]
    # All code points but surrogates, some in a text.
    points = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    for i in range(0, len(points), 2000):
        texts.append(" a".join(points[i : i + 2000]))
    for text in texts:
        expected = encode(enc, text, allow_eot=True)
        assert np.array_equal(fast(text), expected), text[:50]
        assert np.array_equal(fast(text.encode()), expected)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_the_same_shards(run, tmp_path, monkeypatch, kind):
    """Of a text long enough for gigatoken, with a literal <|endoftext|> and an empty document."""
    pytest.importorskip("gigatoken")
    encoded = []

    def counted(enc):
        fast = gigatoken_encoder(enc)
        return lambda text: encoded.append(len(text)) or fast(text)

    monkeypatch.setattr(batch_encoder, "gigatoken_encoder", counted)
    texts = [f"{i} é {TEXT * 3}" for i in range(150)]
    texts[100] = f"a literal {EOT} here"
    texts[120] = ""
    (tmp_path / "d").mkdir()
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), tmp_path / "d" / "a.parquet")
    else:
        (tmp_path / "d" / "a.jsonl").write_text(jsonl(texts))
    # run() imports fineweb.py anew: call it as a module.
    for engine in ("auto", "tiktoken"):
        documents = fineweb.Documents(str(tmp_path / "d"), as_bytes=True)
        enc = load_tokenizer("bytes")
        fineweb.write_shards(
            documents, enc, str(tmp_path / engine), "x", 1_000_000, engine=engine, dataset="x"
        )
    assert sum(encoded) > 2_000_000
    for path in (tmp_path / "auto").glob("*.npy"):
        assert path.read_bytes() == (tmp_path / "tiktoken" / path.name).read_bytes()
    assert "1 without text" in documents.report()


def test_other_ids_end_the_command(tmp_path, monkeypatch):
    """With the text, and the way out."""
    enc = load_tokenizer("bytes")

    def wrong(text):
        ids = encode(enc, text, allow_eot=True).copy()
        ids[text.find("cart")] = 0
        return ids

    monkeypatch.setattr(batch_encoder, "gigatoken_encoder", lambda enc: wrong)
    texts = [f"{TEXT * 20}" for _ in range(20)]
    with pytest.raises(UserError, match=r"gigatoken encodes .* differently from tiktoken: .*engi"):
        fineweb.write_shards(texts, enc, str(tmp_path / "d"), "x", dataset="x")
    fineweb.write_shards(texts, enc, str(tmp_path / "e"), "x", engine="tiktoken", dataset="x")
