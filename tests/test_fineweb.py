"""From text in every form to shards, and back to the text."""

import base64
import gc
import gzip
import json
import time

from conftest import TEXT
from data import batch_encoder, documents
from data.batch_encoder import tokenize
from data.documents import Documents
from data.readers import read_text
from data.tokenizer import EOT, load_tokenizer
from fineweb import write_shards
from script import UserError

import numpy as np
import pytest

ENC = load_tokenizer("bytes")
TEXTS = [
    *TEXT.splitlines(keepends=True)[:40],
    "naïve 日本語 🙂\r\nCRLF and\ttab",
    f"{EOT} in the text",
    " ",
    "\n",
]


def jsonl(texts):
    return "".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(texts))


def decode(folder, enc, val_last=False):
    """All documents of a folder of shards, decoded, in the corpus' order.

    Validation is its beginning, or, of a corpus of less than two shards, its end.
    """
    meta = json.loads((folder / "meta.json").read_text())
    shards = sorted(meta["shards"], key=lambda shard: (shard["split"] == "val") == val_last)
    tokens = np.concatenate([np.load(folder / shard["file"]) for shard in shards])
    starts = np.flatnonzero(tokens == enc.eot_token)
    assert starts[0] == 0
    return [enc.decode(doc[1:].tolist()) for doc in np.split(tokens, starts[1:])]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json.gz", "parquet", "txt", "folder"])
@pytest.mark.parametrize("streaming", ["True", "False"])
def test_local_files(run, tmp_path, monkeypatch, kind, streaming):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / f"data.{kind}"
    expected = TEXTS
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), data)
    elif kind == "txt":
        data.write_bytes(f"\n{EOT}\n".join(TEXTS[:41]).encode())
        expected = [t.strip("\n") for t in TEXTS[:41]]
    elif kind == "folder":
        (data / "sub").mkdir(parents=True)
        (data / "a.jsonl").write_text(jsonl(TEXTS[:10]))
        (data / "sub" / "b.jsonl").write_text(jsonl(TEXTS[10:]))
        (data / "README.md").write_text("not data")
    else:
        content = jsonl(TEXTS).encode()
        data.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    out = run(
        "fineweb.py",
        f"--dataset={data}",
        f"--streaming={streaming}",
        "--tokenizer=bytes",
        "--out_dir=out",
    )
    assert decode(tmp_path / "out", ENC, val_last=True) == expected
    assert "train: 1 shards" in out
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["complete"] and meta["tokenizer"] == "bytes" and meta["dataset"] == str(data)


def test_order_and_size_of_shards(run, tmp_path):
    (tmp_path / "d.jsonl").write_text(jsonl(TEXTS))
    run("fineweb.py", "--dataset=d.jsonl", "--tokenizer=bytes", "--out_dir=out", "--shard_size=500")
    assert decode(tmp_path / "out", ENC) == TEXTS
    names = sorted(p.name for p in (tmp_path / "out").glob("*.npy"))
    assert (
        names[:2] == ["djsonl_train_000001.npy", "djsonl_train_000002.npy"]
        and "djsonl_val_000000.npy" in names
    )


@pytest.mark.parametrize("bars", ["0", "1"])
def test_max_tokens(run, tmp_path, monkeypatch, bars):
    monkeypatch.setenv("TQDM_DISABLE", bars)
    (tmp_path / "d.jsonl").write_text(jsonl(TEXTS))
    run("fineweb.py", "--dataset=d.jsonl", "--tokenizer=bytes", "--out_dir=out", "--max_tokens=1e3")
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert sum(shard["tokens"] for shard in meta["shards"]) == 1000


def test_rows_without_text_are_left_out(tmp_path):
    rows = [{"text": None}, {"text": "a"}, {"text": ""}, {"text": "b"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(Documents(str(tmp_path / "d.jsonl"))) == ["a", "b"]


def test_chats_are_flattened(tmp_path, monkeypatch):
    chat = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": chat}))
    (text,) = Documents(str(tmp_path / "d.jsonl"), text_column="messages")
    assert text == "User: Hi?\n\nAssistant: Hello."


@pytest.mark.parametrize("batch_chars", [1, 100, 10**6])
def test_tokenize_keeps_the_order(gpt2, batch_chars):
    found = np.concatenate([tokens for tokens, _ in tokenize(TEXTS, gpt2, np.uint16, batch_chars)])
    expected = [t for text in TEXTS for t in [gpt2.eot_token, *gpt2.encode_ordinary(text)]]
    assert found.tolist() == expected


@pytest.fixture
def corpus(tmp_path):
    """Eight files of 400 documents, 3.3 MB: seven batches of tokenize, 67 shards of 50 kB."""
    (tmp_path / "texts").mkdir()
    for i in range(8):
        texts = [f"{i} {k} {TEXT[:1024]}" for k in range(400)]
        (tmp_path / "texts" / f"{i}.jsonl").write_text(jsonl(texts))
    return ["--dataset=texts", "--tokenizer=bytes", "--shard_size=5e4"]


def own_tokenizer(token):
    """The dict of a tokenizer of the 256 bytes and one token more."""
    tokens = [base64.b64encode(t).decode() for t in (*(bytes([i]) for i in range(256)), token)]
    return {"name": "own", "pat_str": r"\w+|\W", "tokens": tokens, "special_tokens": {EOT: 257}}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("options", [[], ["--streaming=False"], ["--max_tokens=3e6"]])
def test_goes_on_where_it_died(run, tmp_path, monkeypatch, corpus, dies_at, options):
    """Byte for byte the same, and complete shards are not tokenized again."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run("fineweb.py", *corpus, *options, "--out_dir=whole")
    whole = contents(tmp_path / "whole")
    for n in (1, 50):
        dies_at(n)
        with pytest.raises(ZeroDivisionError) as e:
            run("fineweb.py", *corpus, *options, f"--out_dir=died{n}")
        del e  # its frames hold the lock of the folder
        gc.collect()
        meta_path = tmp_path / f"died{n}" / "meta.json"
        assert not meta_path.exists() or not json.loads(meta_path.read_text())["complete"]
        encoded, encode = [], batch_encoder.encode_documents
        spy = lambda texts, *a, f=encode, e=encoded: e.extend(texts) or f(texts, *a)  # noqa: E731
        monkeypatch.setattr(batch_encoder, "encode_documents", spy)
        out = run("fineweb.py", *corpus, *options, f"--out_dir=died{n}")
        monkeypatch.setattr(batch_encoder, "encode_documents", encode)
        assert contents(tmp_path / f"died{n}") == whole
        if n == 50:
            assert "died50 has 50 shards: continuing after them" in out
            size = sum(map(len, encoded))
            left = len(whole) - 2 - 50  # shards
            assert size < 5e4 * left + 2 * (1 << 19), "at most a batch too many"


def test_finished_files_are_not_read_again(tmp_path, monkeypatch, corpus):
    documents = Documents(str(tmp_path / "texts"))
    texts = []
    for i, text in enumerate(documents):
        texts.append(text)
        if i in (0, 5, 1999, 3199):
            again = Documents(str(tmp_path / "texts"))
            again.state = json.loads(json.dumps(documents.state))
            if i == 1999:
                (tmp_path / "texts" / "0.jsonl").write_text(jsonl(["not read"] * 400))
            rest = list(again)
            assert len(rest) == 3199 - i and "not read" not in rest
    assert len(texts) == 3200


def test_a_network_that_hiccups(monkeypatch, capsys):
    """Five failures in a row are borne, wherever they come; each document comes once."""
    import datasets

    fails = {7: 3, 8: 5, 20: 1}

    def rows():
        for i in range(30):
            if fails.get(i, 0):
                fails[i] -= 1
                raise ConnectionError("reset by peer")
            yield {"text": f"document {i}"}

    sleeps = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **how: datasets.IterableDataset.from_generator(rows)
    )
    monkeypatch.setattr(documents.time, "sleep", sleeps.append)
    assert list(Documents("fineweb-edu")) == [f"document {i}" for i in range(30)]
    assert sleeps == [2, 4, 8, 2, 4, 8, 16, 32, 2]
    assert (
        "fineweb-edu: ConnectionError: reset by peer; trying again in 2 s"
        in capsys.readouterr().err
    )
    fails[12] = 6
    with pytest.raises(
        UserError, match=r"^cannot read fineweb-edu: ConnectionError: reset by peer; go online, or"
    ):
        list(Documents("fineweb-edu"))


def test_a_folder_that_is_taken(run, tmp_path, corpus, dies_at):
    from files import lock_folder

    (tmp_path / "out").mkdir()
    lock = lock_folder(str(tmp_path / "out"))
    with pytest.raises(SystemExit, match=r"^out/ is in use by another process that writes to it"):
        run("fineweb.py", *corpus, "--out_dir=out")
    assert list(contents(tmp_path / "out")) == [".lock"]
    lock.release()
    dies_at(40)
    with pytest.raises(ZeroDivisionError):
        run("fineweb.py", *corpus, "--out_dir=out")
    before = contents(tmp_path / "out")
    for args, message in (
        (
            ["--shard_size=3e4"],
            r"out holds shards made with shard_size=50000, not 30000: choose another",
        ),
        (
            ["--text_column=body"],
            r"out holds shards made with text_column=text, not body: choose another",
        ),
        (
            ["--max_tokens=1e6"],
            r"out holds shards made with max_tokens=0, not 1000000: choose another",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            run("fineweb.py", *corpus, *args, "--out_dir=out")
        assert contents(tmp_path / "out") == before
    (tmp_path / "own.json").write_text(json.dumps(own_tokenizer(b"th")))
    run("fineweb.py", *corpus, "--tokenizer=own.json", "--out_dir=own")
    (tmp_path / "own.json").write_text(json.dumps(own_tokenizer(b"an")))
    with pytest.raises(SystemExit, match=r"own holds shards made with another tokenizer\.json"):
        run("fineweb.py", *corpus, "--tokenizer=own.json", "--out_dir=own")
    for i in range(8):
        (tmp_path / "texts" / f"{i}.jsonl").write_text(
            jsonl([f"{i} {k} {TEXT[5:1024]}" for k in range(400)])
        )
    with pytest.raises(SystemExit, match=r"out holds the start of another text"):
        run("fineweb.py", *corpus, "--out_dir=out")
    assert contents(tmp_path / "out") == before


def test_a_complete_folder_is_left_alone(run, tmp_path, corpus):
    run("fineweb.py", *corpus, "--out_dir=out")
    before = contents(tmp_path / "out")
    assert "out is complete already: nothing to do" in run("fineweb.py", *corpus, "--out_dir=out")
    assert contents(tmp_path / "out") == before


def test_rows_that_are_no_text(tmp_path):
    values = ["first", 5, None, ["x", "y"], {"a": 1}, "", 2.5, True, [], [{"role": "user"}], "last"]
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"text": value}) + "\n" for value in values)
    )
    assert list(Documents(str(tmp_path / "d.jsonl"))) == ["first", "last"]


@pytest.mark.parametrize("char", ["a", " ", "\n", "-", "7", "漢", "🙂"])
def test_megabytes_of_one_character(gpt2, char):
    start = time.perf_counter()
    text = f"hello{char * 2_000_000}world"
    ((tokens, _),) = tokenize([text], gpt2, np.uint16)
    assert gpt2.decode(tokens[1:].tolist()) == text
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize(
    "texts", [TEXTS, [text for text in TEXTS if EOT not in text], ["it 's", "s  ", "\n\n", "s"]]
)
def test_a_batch_is_its_documents_one_by_one(gpt2, texts):
    ((tokens, _),) = tokenize(texts, gpt2, np.uint16)
    assert tokens.tolist() == [
        i for text in texts for i in [gpt2.eot_token, *gpt2.encode_ordinary(text)]
    ]


def test_odd_documents(tmp_path):
    """Half a surrogate pair, and a megabyte of one character."""
    texts = ["\ud83d alone", "a" * 1_000_000]
    tokens = np.concatenate([tokens for tokens, _ in tokenize(texts, ENC, np.uint16)])
    assert ENC.decode(tokens.tolist()) == f"{EOT}? alone{EOT}{texts[1]}"


def test_large_vocabularies_are_uint32(tmp_path):
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {bytes([i, j]): 256 + 256 * i + j for i in range(256) for j in range(256)}
    enc = tiktoken.Encoding(
        "big", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={EOT: len(ranks)}
    )
    meta = write_shards(["abcd"] * 50, enc, str(tmp_path / "out"), "x", dataset="x")
    assert meta["dtype"] == "uint32" and meta["tokenizer"] == "tokenizer.json"
    from data.shards import Shards

    shards = Shards(str(tmp_path / "out"))
    assert shards.enc.n_vocab == 65_793
    assert shards.enc.decode(shards.read(*shards.val[0][:1], 1, 2).tolist()) == "abcd"


def test_tinyshakespeare_is_downloaded_whole_or_not_at_all(tmp_path, monkeypatch):
    """From a server on this machine: the whole file, and one that breaks off."""
    import http.server
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "20000")
            self.end_headers()
            self.wfile.write(b"x" * (20000 if self.path == "/whole" else 100))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.chdir(tmp_path)
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(documents, "TINYSHAKESPEARE", url + "/broken")
    with pytest.raises(UserError, match=r"cannot download .*; put it at tinyshakespeare\.txt"):
        list(Documents("tinyshakespeare"))
    assert not list(tmp_path.glob("tiny*"))
    monkeypatch.setattr(documents, "TINYSHAKESPEARE", url + "/whole")
    assert list(Documents("tinyshakespeare")) == ["x" * 20000]
    server.shutdown()


def test_read_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\n")
    assert read_text(str(path)) == ["one\r\ntwo\n"]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"a\.txt: not a readable text file: not UTF-8"):
        read_text(str(path))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dataset=gone"], r"gone: no such file or folder; known names: fineweb-edu, "),
        (
            ["--dataset=empty.jsonl"],
            r"empty\.jsonl: no row has text; take the file out \(left out of 1 rows: 1 ",
        ),
        (["--dataset=folder"], r"folder: no data files here; expected \.txt, \.md, \.jsonl"),
        (
            ["--dataset=d.jsonl", "--text_column=body"],
            r"has no column 'body': use --text_column= with one of text, id",
        ),
        (
            ["--dataset=broken.parquet"],
            r"cannot read broken\.parquet: ArrowInvalid: .*; repair it and repeat the command",
        ),
        (["--dataset=d.jsonl", "--shard_size=0"], r"--shard_size=0: must be at least 1"),
        (["--dataset=d.jsonl", "--out_dir=full"], r"full holds shards already"),
    ],
)
def test_mistakes(run, tmp_path, args, message):
    (tmp_path / "d.jsonl").write_text(jsonl(TEXTS))
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "full").mkdir()
    np.save(tmp_path / "full" / "x_val_000000.npy", np.zeros(3, dtype=np.uint16))
    with pytest.raises(SystemExit, match=message) as e:
        run("fineweb.py", "--tokenizer=bytes", "--out_dir=out", *args)
    assert "\n" not in e.value.code
    assert not (tmp_path / "out").exists()
