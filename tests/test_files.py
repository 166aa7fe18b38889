"""Files, chats and tokenizers as people have them: each kind is made here; no document is lost."""

import bz2
import gzip
import json
import lzma
import os
import random
import subprocess

from conftest import MODERN_PARTS, ROOT, TEXT, command
from data import readers
from data.documents import Documents, render_chat
from data.readers import Continuation, join_parts
from data.tokenizer import EOT, encode, load_tokenizer, tokenizer_state
from fineweb import write_shards
from model import GPT, GPTConfig, load_model
from script import UserError
from test_fineweb import decode, jsonl

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

BYTES = load_tokenizer("bytes")
LINES = TEXT.splitlines()


def found(path, **how):
    """(documents, what report() says) of a file or folder."""
    texts = Documents(str(path), **how)
    return list(join_parts(texts)), texts.report()


def compressed(content):
    """{ending: content} in all packings."""
    zst = pa.Codec("zstd").compress(content, asbytes=True)
    packed = {
        ".gz": gzip.compress(content),
        ".bz2": bz2.compress(content),
        ".xz": lzma.compress(content),
        ".zst": zst,
    }
    return packed | {"": content}


# -- names --------------------------------------------------------------------------
def test_names_are_names(tmp_path, monkeypatch):
    """Not patterns: [1] * ? in files, folders and the working directory; links; a Mac's files."""
    home = tmp_path / "work [1] *?"
    folder = home / "da[t]a"
    (folder / "sub*").mkdir(parents=True)
    names = [
        "notes[1].jsonl",
        "notes1.jsonl",
        "a*.txt",
        "ab.txt",
        "what?.parquet",
        "UPPER.TXT",
        "sub*/x.MD",
        "é ü.csv",
    ]
    for name in names:
        if name.endswith("parquet"):
            pq.write_table(pa.table({"text": [name]}), folder / name)
        else:
            text = (
                jsonl([name]) if "jsonl" in name else f"text\n{name}\n" if "csv" in name else name
            )
            (folder / name).write_text(text)
    (folder / "._a.txt").write_text("a Mac's")
    (folder / "README.md").write_text("a dataset's card")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "linked.txt").write_text("linked")
    (tmp_path / "far" / "loop").symlink_to(tmp_path / "far")
    (folder / "link").symlink_to(tmp_path / "far")
    monkeypatch.chdir(home)
    assert sorted(found("da[t]a")[0]) == sorted([*names, "linked"])
    assert found("da[t]a/notes[1].jsonl")[0] == ["notes[1].jsonl"]


def test_what_is_no_file_is_named(tmp_path):
    """Instead of waiting for a pipe for ever, or blaming the shards' folder."""
    (tmp_path / "a.txt").write_text("x")
    os.mkfifo(tmp_path / "b.txt")
    with pytest.raises(UserError, match=r"b\.txt: is not a file that can be read; take it out"):
        found(tmp_path)
    (tmp_path / "b.txt").unlink()
    (tmp_path / "c.txt").symlink_to("/nonexistent")
    with pytest.raises(UserError, match=r"c\.txt: is not a file that can be read; take it out"):
        found(tmp_path)
    (tmp_path / "c.txt").unlink()
    (tmp_path / "d.jsonl").write_text('{"content": "y"}\n')
    with pytest.raises(UserError, match=r"d\.jsonl has no column 'text'"):
        found(tmp_path)


def test_what_is_not_read_is_counted(tmp_path, capsys):
    for name in ("a.txt", "b.pdf", "c.pdf", "d.docx", "e", "README.md"):
        (tmp_path / name).write_text("x")
    assert found(tmp_path)[0] == ["x"]
    assert (
        capsys.readouterr().out == f"{tmp_path}: 5 files or folders are not read "
        "(2 .pdf, 1 README.md, 1 .docx, 1 no extension)\n"
    )


@pytest.mark.parametrize("ending", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize(
    "kind", ["jsonl", "ndjson", "json", "array.json", "csv", "tsv", "txt", "md"]
)
def test_every_ending(tmp_path, kind, ending):
    """And going on from any document of it."""
    texts = [*LINES[:30], 'with "quotes", commas', "tabs? no", "naïve 日本語 🙂"]
    rows = [{"text": text, "id": i} for i, text in enumerate(texts)]
    quoted = [text.replace('"', '""') for text in texts]
    content = {
        "jsonl": jsonl(texts),
        "ndjson": "\n\n".join(map(json.dumps, rows)),
        "json": "\n".join(map(json.dumps, rows)),
        "array.json": json.dumps(rows, indent=2),
        "txt": f"\n{EOT}\n".join(texts),
        "md": f"\n{EOT}\n".join(texts),
        "csv": "id,text\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(quoted)),
        "tsv": "id\ttext\n" + "".join(f'{i}\t"{t}"\n' for i, t in enumerate(quoted)),
    }[kind]
    path = tmp_path / f"data.{kind}{ending}"
    path.write_bytes(compressed(content.encode())[ending])
    texts_of = Documents(str(path))
    seen, states = [], []
    for text in texts_of:
        seen.append(text)
        states.append(json.loads(json.dumps(texts_of.state)))
    assert seen == texts
    for i in (0, 17, len(texts) - 1):
        rest = Documents(str(path))
        rest.state = states[i]
        assert list(rest) == texts[i + 1 :]


def test_files_that_come_and_go(run, tmp_path):
    """The state names a file: finished files may go, and new ones do not shift the rest."""
    (tmp_path / "d").mkdir()
    for name in ("a", "m", "z"):
        (tmp_path / "d" / f"{name}.jsonl").write_text(jsonl([f"{name}{i}" for i in range(20)]))
    texts = Documents(str(tmp_path / "d"))
    seen = [text for _, text in zip(range(45), texts)]
    state = texts.state
    (tmp_path / "d" / "a.jsonl").unlink()
    (tmp_path / "d" / "b.txt").write_text("new")
    rest = Documents(str(tmp_path / "d"))
    rest.state = state
    assert [*seen, *rest] == [f"{name}{i}" for name in "amz" for i in range(20)]


def test_a_fault_that_hides_the_rest_of_a_file_ends_the_run(tmp_path, monkeypatch):
    """What is behind it cannot be counted."""
    rows = [json.dumps({"text": f"document {i}"}) for i in range(100)]
    (tmp_path / "a.json").write_text("[" + ",\n".join([*rows[:5], "{broken", *rows[6:]]) + "]")
    with pytest.raises(
        UserError,
        match=r"cannot read .*a\.json: ValueError: object 6: .*; repair it and repeat the command",
    ):
        found(tmp_path / "a.json")
    monkeypatch.setattr(readers, "PART_SIZE", 1000)
    (tmp_path / "b.txt").write_bytes(TEXT.encode()[:5000] + b"\xe9" + TEXT.encode()[5000:])
    with pytest.raises(UserError, match=r"cannot read .*b\.txt: UnreadableRow: not UTF-8"):
        found(tmp_path / "b.txt")


# -- columns ------------------------------------------------------------------------
def test_columns_that_nobody_uses(tmp_path):
    """Whose types change, in a file and from file to file, that are null, or without rows."""
    (tmp_path / "a.jsonl").write_text(
        "".join(
            json.dumps({"id": i if i < 900 else f"x{i}", "text": f"a{i}"}) + "\n"
            for i in range(1000)
        )
    )
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"text": "b", "meta": {"deep": [1]}, "id": None}) + "\n"
    )
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "c.parquet")
    pq.write_table(
        pa.table({"id": pa.array([None, None], pa.null()), "text": ["c0", None]}),
        tmp_path / "d.parquet",
    )
    pq.write_table(pa.table({"x": [1.5], "text": ["e"], "y": [b"\xff"]}), tmp_path / "e.parquet")
    for name in ("f.parquet", "g.jsonl", "h.txt", "i.csv"):
        (tmp_path / name).write_bytes(b"")
    texts, report = found(tmp_path)
    assert texts == [*(f"a{i}" for i in range(1000)), "b", "c0", "e"]
    assert report == "left out of 1,004 rows: 1 without text"


def test_a_column_inside_another(tmp_path):
    rows = [{"data": {"text": f"x{i}"}, "data.text": None} for i in range(3)] + [
        {"data.text": "dotted"}
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(
        pa.table({"data": [{"text": "p", "more": 1}, None], "id": [1, 2]}), tmp_path / "b.parquet"
    )
    rows = [{key: value for key, value in row.items() if value} for row in rows]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert found(tmp_path, text_column="data.text")[0] == ["x0", "x1", "x2", "dotted", "p"]
    with pytest.raises(
        UserError, match=r"has no column 'body': use --text_column= with one of data"
    ):
        found(tmp_path, text_column="body")


def test_a_column_whose_name_has_a_dot(tmp_path):
    (tmp_path / "a.csv").write_text("id,meta.text\n1,hello\n")
    assert found(tmp_path / "a.csv", text_column="meta.text")[0] == ["hello"]


# -- rows ---------------------------------------------------------------------------
def test_tables_that_are_not_quite_tables(tmp_path):
    """Commas and quotation marks that should be quoted, columns of one name, an open quotation."""
    rows = [
        "id,text",
        "1,a,",
        "2,b, and more",
        '3,"c" he said,"and',
        'b,c,d"',
        "4",
        '5,"d',
        'e"',
        "6,f",
    ]
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    texts, report = found(tmp_path / "a.csv")
    assert texts == ["a", "d\ne", "f"]
    assert report.startswith("left out of 6 rows: 2 unreadable, 1 without text (")
    assert (
        "row 2: more fields than columns; " in report
        and "row 3: ',' expected after '\"'; in a field" in report
    )
    (tmp_path / "b.csv").write_text("\ntext\na\n")
    with pytest.raises(
        UserError, match=r"cannot read .*b\.csv: ValueError: its first line is empty"
    ):
        found(tmp_path / "b.csv")
    (tmp_path / "b.csv").write_text("text,text\na,b\n")
    with pytest.raises(
        UserError, match=r"cannot read .*b\.csv: ValueError: several columns are called 'text'"
    ):
        found(tmp_path / "b.csv")
    (tmp_path / "c.tsv").write_text('text\n"a\nb\nc\n')
    with pytest.raises(UserError, match=r"cannot read .*c\.tsv: ValueError: row 1: unexpected end"):
        found(tmp_path / "c.tsv")
    # the rest of a badly quoted row is not a row, unless it never ends
    (tmp_path / "d.csv").write_text('text,note\n"He said "x" now","two\nlines"\nlast,one\n')
    texts, report = found(tmp_path / "d.csv")
    assert texts == ["last"] and report.startswith("left out of 2 rows: 1 unreadable (")
    (tmp_path / "e.csv").write_text('text,note\n"He said "x" now","two\nlines\nlast,one\n')
    with pytest.raises(UserError, match=r"cannot read .*e\.csv: ValueError: row 1: ',' expected"):
        found(tmp_path / "e.csv")


BAD = {
    "null": b"null",
    "number": b"5",
    "surrogate": b'{"text": "x\\ud83d"}',
    "latin-1": b'{"text": "caf\xe9"}',
    "cut short": b'{"text": "half of a li',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("at", [0, 500, 999])
def test_a_row_that_cannot_be_read(tmp_path, kind, at):
    """Is left out, counted and named, wherever it stands; all others are there."""
    rows = [json.dumps({"text": f"document {i}"}).encode() for i in range(1000)]
    rows[at] = BAD[kind]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    texts, report = found(tmp_path)
    assert texts == [f"document {i}" for i in range(1000) if i != at]
    assert report.startswith(
        f"left out of 1,000 rows: 1 unreadable ({tmp_path}/a.jsonl line {at + 1}: "
    )


def test_a_raw_tab_in_a_string_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\tb"}\n')
    assert found(tmp_path) == (["a\tb"], "")


def test_too_many_rows_that_cannot_be_read(run, tmp_path):
    rows = [
        b"null" if i % 50 == 7 else json.dumps({"text": f"document {i}"}).encode()
        for i in range(1000)
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    why = r"^a\.jsonl: too many rows cannot be read; left out of [\d,]+ rows: \d+ unreadable "
    why += r"\(a\.jsonl line 8: not an object; "
    with pytest.raises(
        SystemExit,
        match=why + r"a\.jsonl line 58: not an object; a\.jsonl line 108: not an object\)$",
    ):
        run("fineweb.py", "--dataset=a.jsonl", "--tokenizer=bytes", "--out_dir=out")


def test_the_last_line_says_what_was_left_out(run, tmp_path):
    rows = [{"text": "a"}, {"text": None}, {"text": ["b"]}, {"text": 5}, {"text": "c"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    out = run("fineweb.py", "--dataset=a.jsonl", "--tokenizer=bytes", "--out_dir=out")
    assert (
        "left out of 6 rows: 1 without text, 2 not a string, 1 unreadable (a.jsonl line 6: " in out
    )
    assert decode(tmp_path / "out", BYTES, val_last=True) == ["a", "c"]


def test_chats():
    parts = [{"type": "text", "text": "see "}, {"type": "image"}, {"type": "text", "text": "this"}]
    assert (
        render_chat([{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}])
        == "User: hi"
    )
    assert render_chat([{"role": "user", "content": parts}]) == "User: see this"
    share = [
        {"from": "system", "value": "be"},
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "ho"},
    ]
    assert render_chat(share) == "System: be\n\nUser: hi\n\nAssistant: ho"
    assert (
        render_chat(["a"]) is None
        and render_chat(7) is None
        and render_chat(None) == render_chat([]) == ""
    )


def test_texts_and_chats_in_one_file(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    rows = [
        {"text": "a"},
        {"messages": chat},
        {"text": None, "messages": chat},
        {"conversations": [{"from": "gpt", "value": "x"}]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert found(tmp_path) == (["a", "User: hi", "User: hi", "Assistant: x"], "")


# -- plain text -----------------------------------------------------------------------
def test_text_files(tmp_path):
    cases = {
        b"\xef\xbb\xbfone\ntwo\n": ["one\ntwo\n"],
        b"one\r\n<|endoftext|>\r\ntwo\r\nthree\r\n<|endoftext|>\r\n": ["one", "two\r\nthree"],
        b"it says <|endoftext|> here\nand <|endoftext|>": [
            "it says <|endoftext|> here\nand <|endoftext|>"
        ],
        b"<|endoftext|>\na\n\n<|endoftext|>\n<|endoftext|>\nb": ["a", "b"],
        b"\xef\xbb\xbf<|endoftext|>\na": ["a"],
        b" one line ": [" one line "],
        b"": [],
    }
    for i, (content, expected) in enumerate(cases.items()):
        (tmp_path / f"{i}.txt").write_bytes(content)
        assert found(tmp_path / f"{i}.txt") == (expected, ""), content
    (tmp_path / "latin.txt").write_bytes(
        b"good\n<|endoftext|>\ncaf\xe9\nx\n<|endoftext|>\ngood too"
    )
    texts, report = found(tmp_path / "latin.txt")
    assert texts == ["good", "good too"]
    assert (
        "1 unreadable" in report
        and "latin.txt row 2: not UTF-8 (invalid continuation byte at byte 22)" in report
    )


@pytest.mark.parametrize("blanks", ["words", "none", "wide"])
def test_long_documents_come_in_parts(tmp_path, monkeypatch, blanks, gpt2):
    """That join to them and to the same tokens, also from the position of any part."""
    monkeypatch.setattr(readers, "PART_SIZE", 5000)
    if blanks == "wide":
        text = "日本語 naïve 🙂🙂, d'accord?\n\n\n  x=1;" * 1500
    else:
        text = (
            TEXT
            if blanks == "words"
            else TEXT.replace(" ", "").replace("\n", "").replace(".", "").replace(",", "")
        )
    path = tmp_path / "a.txt"
    path.write_text(f"{text}\n{EOT}\nshort\n{EOT}\n{text}", encoding="utf-8", newline="")
    seen, states, texts = [], [], Documents(str(path))
    for part in texts:
        seen.append(part)
        states.append(json.loads(json.dumps(texts.state)))
    assert list(join_parts(seen)) == [text.strip("\n"), "short", text.strip("\n")] and max(
        map(len, seen)
    ) < 10_100 < len(text)
    for i, state in enumerate(states):
        rest = Documents(str(path))
        rest.state = state
        assert [(x, type(x)) for x in rest] == [(x, type(x)) for x in seen[i + 1 :]]
    for enc in (BYTES, gpt2):
        write_shards(
            Documents(str(path)),
            enc,
            str(tmp_path / enc.name),
            "x",
            dataset="x",
            subset=None,
            seed=0,
        )
        tokens = np.concatenate(
            [np.load(tmp_path / enc.name / f"x_{s}.npy") for s in ("train_000001", "val_000000")]
        )
        expected = [
            t for doc in join_parts(seen) for t in (enc.eot_token, *enc.encode_ordinary(doc))
        ]
        if enc is BYTES or blanks != "none":
            assert tokens.tolist() == expected
        else:
            assert enc.decode(tokens.tolist()) == enc.decode(expected)


def test_memory_is_bounded(tmp_path):
    """40 MB as one document, in 60 MB more than a small file takes."""
    (tmp_path / "a.txt").write_text(TEXT * 3300)
    (tmp_path / "small.txt").write_text(TEXT)
    code = (
        "import sys\nfrom data.documents import Documents\n"
        "print(sum(len(x) for x in Documents(sys.argv[1])))\n"
        "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    )
    size = {}
    for name in ("small.txt", "a.txt"):
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        out = subprocess.run(
            [command("x")[0], "-c", code, str(tmp_path / name)],
            capture_output=True,
            text=True,
            env=env,
        )
        read, size[name] = map(int, out.stdout.split())
        assert read == len(TEXT) * (1 if name == "small.txt" else 3300)
    assert max(size.values()) - size["small.txt"] < 60_000, size


def test_killed_in_the_middle_of_many_kinds_of_files(run, tmp_path, monkeypatch):
    """And taken up again, at any moment: nothing twice, nothing left out."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = random.Random(0)
    texts = {
        name: [f"{name} {i} {' '.join(rng.sample(LINES, 3)) * 300}" for i in range(60)]
        for name in "abcdef"
    }
    (folder / "a.jsonl").write_text(jsonl(texts["a"]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(texts["b"]).encode()))
    (folder / "c.txt").write_text(f"\n{EOT}\n".join(texts["c"]))
    (folder / "d.csv").write_text("text\n" + "".join(f'"{t}"\n' for t in texts["d"]))
    (folder / "e.json").write_text(json.dumps([{"text": t} for t in texts["e"]]))
    pq.write_table(pa.table({"text": texts["f"]}), folder / "f.parquet", row_group_size=25)
    args = ["--dataset=data", "--tokenizer=bytes", "--shard_size=1000000"]
    run("fineweb.py", *args, "--out_dir=whole")
    real, calls = Documents._text, []
    for stop in (300, 110):

        def dies(*args, stop=stop):
            calls.append(1)
            return real(*args) if len(calls) < stop else 1 / 0

        monkeypatch.setattr(Documents, "_text", dies)
        with pytest.raises(ZeroDivisionError):
            run("fineweb.py", *args, "--out_dir=parts")
        calls.clear()
        monkeypatch.setattr(Documents, "_text", real)
    out = run("fineweb.py", *args, "--out_dir=parts")
    assert "continuing after them" in out
    expected = sorted(t for some in texts.values() for t in some)
    assert (
        sorted(decode(tmp_path / "parts", BYTES))
        == sorted(decode(tmp_path / "whole", BYTES))
        == expected
    )
    for path in (tmp_path / "whole").glob("*.npy"):
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()


# -- tokenizers and models --------------------------------------------------------------
def test_a_folder_of_the_name_of_a_tokenizer(tmp_path, monkeypatch, gpt2):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "bytes"):
        (tmp_path / name).mkdir()
        assert load_tokenizer(name).name == name


def gpt2_folder(path, how):
    """A transformers GPT-2 with added tokens, in one of the ways that people save it."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import AddedToken, Tokenizer

    load_tokenizer("gpt2")
    enc = load_tokenizer("gpt2")
    import export

    base = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(export.tokenizer_json(enc)), eos_token=EOT
    )
    if how == "special":
        base.add_special_tokens({"pad_token": "<|pad|>", "bos_token": "<|startoftext|>"})
    elif how == "plain":
        base.add_tokens(["Zürich", "<extra>"])
    else:
        base.add_tokens([AddedToken("<|pad|>", normalized=False)], special_tokens=True)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=32, n_positions=64, vocab_size=len(base)
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(path)
    base.save_pretrained(path)
    if how == "added_tokens.json":
        vocab = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
        (path / "tokenizer.json").unlink()
        (path / "vocab.json").write_text(json.dumps(vocab))
        (path / "added_tokens.json").write_text(json.dumps({"<|pad|>": 50257}))
    return base, model


TRICKY = (
    "a <|pad|>b<|startoftext|><|startoftext|> Zürich in Zürich<extra>  <extra>\n<|pad|>"
    + "".join(map(chr, [*range(1, 0xD800, 7), *range(0xE000, 0x1F900, 3)]))
)


@pytest.mark.parametrize("how", ["special", "plain", "added_tokens.json"])
def test_added_tokens_stay(run, tmp_path, gpt2, how):
    """As transformers has them: in encoding, generation, a .pt, shards and an export."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "hf"
    base, theirs = gpt2_folder(folder, how)
    model, enc = load_model(str(folder))
    assert enc.n_vocab == len(base) == model.config.vocab_size
    assert encode(enc, TRICKY).tolist() == base(TRICKY)["input_ids"]
    text = " ".join(chr(i) for i in range(1, 100_000) if not 0xD800 <= i < 0xE000)
    assert encode(enc, text).tolist() == base(text)["input_ids"]
    again = load_tokenizer(json.loads(json.dumps(tokenizer_state(enc))))
    assert (
        encode(again, TRICKY).tolist() == encode(enc, TRICKY).tolist()
        and again.n_vocab == enc.n_vocab
    )

    idx = torch.tensor([base("a b c")["input_ids"]])
    with torch.no_grad():  # make an added token the likeliest
        last = 10 * model.hidden(idx)[0, -1].clone()
        for m in (model, theirs):
            m.lm_head.weight[50257] = last
    run("export.py", f"--ckpt={folder}", "--out_dir=out")
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (
        auto.config.vocab_size == len(base)
        and tokens(TRICKY)["input_ids"] == base(TRICKY)["input_ids"]
    )
    run("export.py", f"--ckpt={folder}", "--format=pt", "--out=m.pt")
    assert load_model(str(tmp_path / "m.pt"))[1].n_vocab == enc.n_vocab
    greedy = [t.item() for t in model.generate(idx, 8, vocab_size=enc.n_vocab, temperature=0)]
    assert (
        greedy
        == theirs.generate(idx, max_new_tokens=8, do_sample=False, pad_token_id=0)[
            0, idx.size(1) :
        ].tolist()
    )
    assert 50257 in greedy

    (tmp_path / "t.txt").write_text(TRICKY)
    path = folder if how == "plain" or how == "added_tokens.json" else folder / "tokenizer.json"
    run("fineweb.py", "--dataset=t.txt", f"--tokenizer={path}", "--out_dir=shards")
    meta = json.loads((tmp_path / "shards" / "meta.json").read_text())
    ids = np.concatenate(
        [np.load(tmp_path / "shards" / s["file"]) for s in meta["shards"][::-1]]
    ).tolist()
    assert ids[1:] == base(TRICKY)["input_ids"]
    if how != "plain":  # the rest does not depend on it
        return
    small = [
        "--data_dir=shards",
        "--T=16",
        "--B=2",
        "--total_batch_size=32",
        "--max_steps=2",
        "--sample_every=0",
    ]
    run(
        "train_gpt2.py",
        *small,
        f"--init_from={folder}",
        "--eval_every=0",
        "--hellaswag_every=0",
        "--ewok_every=0",
    )
    assert load_model("latest", log_dir=str(tmp_path / "log"))[1].n_vocab == enc.n_vocab


@pytest.mark.parametrize("specials", [[EOT], [EOT, "<s>", "<pad>", "</s>", "<unk>"]])
def test_special_tokens_that_come_first(run, tmp_path, specials):
    """As train_new_from_iterator has them: ids are not shifted, in a .pt or an export."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        LINES,
        trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet),
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    enc = load_tokenizer(str(tmp_path / "tokenizer.json"))
    text = TEXT[:500] + "<s> x <pad></s>"
    expected = tokenizer.encode(text).ids
    assert encode(enc, text).tolist() == expected and enc.eot_token == 0
    again = load_tokenizer(json.loads(json.dumps(tokenizer_state(enc))))
    assert encode(again, text).tolist() == expected and again.decode(expected) == text
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, enc.n_vocab, 1, 2, 32))
    saved = {
        "model": model.state_dict(),
        "config": vars(model.config),
        "step": 1,
        "tokenizer": tokenizer_state(enc),
    }
    torch.save(saved, tmp_path / "m.pt")
    run("export.py", "--ckpt=m.pt", "--out_dir=out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(text)["input_ids"] == expected and theirs.eos_token_id == 0
    assert encode(load_model(str(tmp_path / "out"))[1], text).tolist() == expected


@pytest.mark.parametrize(
    "parts",
    [
        {"norm": "rmsnorm", "mlp": "swiglu"},
        MODERN_PARTS,
        MODERN_PARTS | {"mlp": "gelu", "softcap": 0.0, "tie_embeddings": True},
    ],
)
def test_what_export_writes_is_read_back(run, tmp_path, parts):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            32, 257, 2, 2, 48, **{"pos": "rope", "bias": False} | parts | {"zero_init": False}
        )
    ).eval()
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, 1, 0.1)
    torch.nn.init.normal_(model.lm_head.weight)  # which zeros would be
    saved = {
        "model": model.state_dict(),
        "config": vars(model.config),
        "step": 1,
        "tokenizer": "bytes",
    }
    torch.save(saved, tmp_path / "m.pt")
    run("export.py", "--ckpt=m.pt", "--out_dir=out")
    back, enc = load_model(str(tmp_path / "out"))
    assert back.config == model.config and enc.name == "bytes"
    x = torch.randint(257, (2, 32))
    torch.testing.assert_close(back(x), model(x))
    torch.testing.assert_close(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(x).logits,
        back(x),
        atol=1e-4,
        rtol=1e-4,
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for key, value in (
        ("rms_norm_eps", 1e-4),
        ("num_key_value_heads", 1),
        *([] if model.config.norm == "rmsnorm_noaffine" else [("tie_word_embeddings", False)]),
        ("hidden_act", "gelu"),
    ):
        (tmp_path / "out" / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(
            UserError, match=rf"its config\.json says {key}={value}; this project supports"
        ):
            load_model(str(tmp_path / "out"))
    for key, value in (("rope_theta", 5e5), ("rope_type", "yarn")):
        rope = config["rope_parameters"] | {key: value}
        (tmp_path / "out" / "config.json").write_text(
            json.dumps(config | {"rope_parameters": rope})
        )
        with pytest.raises(
            UserError, match=rf"its config\.json says {key}={value}; this project supports"
        ):
            load_model(str(tmp_path / "out"))


def test_a_name_on_the_hub(tmp_path, monkeypatch, gpt2):
    """owner/name, through the hub's own library: here, from its cache."""
    import huggingface_hub

    gpt2_folder(tmp_path / "hf", "special")
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **how: asked.append(name) or str(tmp_path / "hf"),
    )
    model, enc = load_model("distilbert/distilgpt2")
    assert asked[0] == "distilbert/distilgpt2" and enc.n_vocab == model.config.vocab_size == 50259
    with pytest.raises(UserError, match=r"no/such\.pt: no such checkpoint"):
        load_model("no/such.pt")


def test_a_million_blanks(run, tmp_path, gpt2):
    """One function encodes, in every script."""
    (tmp_path / "a.txt").write_text("x" + " " * 1_000_000 + "y")
    run("fineweb.py", "--dataset=a.txt", "--out_dir=out")
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    ids = np.concatenate(
        [np.load(tmp_path / "out" / s["file"]) for s in meta["shards"][::-1]]
    ).tolist()
    assert gpt2.decode(ids[1:]) == (tmp_path / "a.txt").read_text()
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 50257, 1, 2, 32))
    torch.save(
        {"model": model.state_dict(), "config": vars(model.config), "step": 1, "tokenizer": "gpt2"},
        tmp_path / "m.pt",
    )
    assert run("sample.py", "--ckpt=m.pt", "--prompt=FILE:a.txt", "--max_new_tokens=2").startswith(
        "x" + " " * 1_000_000 + "y"
    )
    (tmp_path / "many.txt").write_text(f"\n{EOT}\n".join(["x" + " " * 1_000_000 + "y"] * 20))
    run(
        "train_tokenizer.py", "--data=many.txt", "--vocab_size=260", "--out=t.json", "--max_bytes=0"
    )
    assert encode(gpt2, "\ud83d").tolist() == encode(gpt2, "?").tolist()
    assert isinstance(Continuation("x"), str)


# -- evals --------------------------------------------------------------------------
def test_hellaswag_files(tmp_path):
    """A BOM, blank lines, Hugging Face's labels.

    An empty context scores the same, whatever other items there are.
    """
    import hellaswag

    item = {
        "ctx": "A",
        "ctx_a": "A",
        "ctx_b": "",
        "activity_label": "B",
        "endings": ["x", "yy", "z", "w"],
        "label": "1",
    }
    empty = item | {"ctx": "", "ctx_a": "[header]", "activity_label": "[title]"}
    lines = [json.dumps(x) for x in (item, empty, item | {"label": 3})]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(lines) + "\n \n", encoding="utf-8")
    items = hellaswag.load_items(str(tmp_path / "a.jsonl"))
    assert [x["label"] for x in items] == [1, 1, 3]
    assert hellaswag.completion_style(items[1], BYTES)[0][0][0] == [BYTES.eot_token]
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 257, 1, 2, 32)).eval()
    assert (
        hellaswag.predict(model, BYTES, items)[0][1]
        == hellaswag.predict(model, BYTES, items[1:2])[0][0]
    )
    (tmp_path / "b.jsonl").write_text(json.dumps(item | {"label": "4"}))
    with pytest.raises(UserError, match=r"b\.jsonl line 1: not a HellaSwag item"):
        hellaswag.load_items(str(tmp_path / "b.jsonl"))


def test_a_number_where_ewok_has_a_text():
    import ewok

    item = {"Context1": "a", "Context2": "b", "Target1": 5, "Target2": "d"}
    with pytest.raises(UserError, match=r"x line 1: an item without a text in Target1"):
        ewok.parse_items("x", json.dumps(item).encode())
