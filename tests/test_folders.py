"""Folders as people have them: splits, links, cards, metadata, leftovers. No document is lost."""

import bz2
import json
import lzma
import os
from pathlib import Path

from conftest import TEXT
from data.dataset_files import split_of
from data.documents import Documents
from data.tokenizer import load_tokenizer
from files import lock_folder
from script import UserError
from test_fineweb import jsonl

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

BYTES = load_tokenizer("bytes")
LINES = TEXT.splitlines()
PARTS = {"train": LINES[:100], "validation": LINES[100:140], "test": LINES[140:]}


def split_documents(folder):
    """{split: documents} of the shards in a folder."""
    meta = json.loads((Path(folder) / "meta.json").read_text())
    documents = {}
    for split in ("val", "train"):
        names = [shard["file"] for shard in meta["shards"] if shard["split"] == split]
        tokens = np.concatenate([np.load(Path(folder) / name) for name in names])
        parts = np.split(tokens, np.flatnonzero(tokens == BYTES.eot_token))[1:]
        documents[split] = [BYTES.decode(part[1:]) for part in parts]
    return documents


# -- splits -------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.jsonl", "train"),
        ("data/test-00000-of-00001.parquet", "test"),
        ("TinyStoriesV2-GPT4-valid.txt", "validation"),
        ("c4-validation.00003-of-00008.json.gz", "validation"),
        ("dev.tsv", "validation"),
        ("dev2.txt", "validation"),
        ("val/00.txt", "validation"),
        ("TEST.TXT", "test"),
        ("test/train.txt", "train"),
        ("alpaca_eval_train.jsonl", "train"),
        ("evaluation/a.txt", "test"),
        ("devices.txt", ""),
        ("contest.txt", ""),
        ("testament.txt", ""),
        ("trained/book.txt", ""),
        ("valley.md", ""),
    ],
)
def test_splits_are_words_of_a_name(path, split):
    assert split_of(path) == split


@pytest.mark.parametrize("layout", ["files", "folders", "parquet", "suffixes", "arrow"])
def test_splits_of_a_folder(run, tmp_path, layout):
    """Test documents stay out, validation documents become the validation shards."""
    folder = tmp_path / "d"
    for split, texts in PARTS.items():
        if layout == "files":
            path = folder / f"{split}.jsonl"
        elif layout == "folders":
            path = folder / split.replace("validation", "dev") / "0.jsonl"
        elif layout == "suffixes":
            path = folder / f"stories-{split.replace('validation', 'valid')}.jsonl"
        else:
            path = folder / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        if layout == "parquet":
            pq.write_table(pa.table({"text": texts}), path)
        elif layout != "arrow":
            path.write_text(jsonl(texts))
    if layout == "arrow":
        rows = {
            split: datasets.Dataset.from_dict({"text": texts}) for split, texts in PARTS.items()
        }
        datasets.DatasetDict(rows).save_to_disk(folder)
    args = ("fineweb.py", "--dataset=d", "--tokenizer=bytes", "--shard_size=3000")
    out = run(*args, "--out_dir=out")
    assert split_documents("out") == {"val": PARTS["validation"], "train": PARTS["train"]}
    assert "d: for training: " in out
    assert "; for validation: " in out
    assert "(--split=test reads the test files)" in out
    run(*args, "--out_dir=test", "--split=test")
    documents = split_documents("test")
    assert documents["train"] + documents["val"] == PARTS["test"]
    with pytest.raises(SystemExit, match=r"d: has no files for --split=hard; choose --split=tra"):
        run(*args, "--out_dir=hard", "--split=hard")


def test_limits_of_validation_files(run, tmp_path):
    (tmp_path / "d").mkdir()
    for split, texts in PARTS.items():
        (tmp_path / "d" / f"{split}.jsonl").write_text(jsonl(texts))
    args = ("fineweb.py", "--dataset=d", "--tokenizer=bytes", "--shard_size=1000")

    def sizes(*more):
        run(*args, *more)
        meta = json.loads((tmp_path / more[0].partition("=")[2] / "meta.json").read_text())
        of = {"val": 0, "train": 0}
        for shard in meta["shards"]:
            of[shard["split"]] += shard["tokens"]
        return of

    count = {split: sum(len(text) + 1 for text in texts) for split, texts in PARTS.items()}
    assert sizes("--out_dir=a") == {"val": count["validation"], "train": count["train"]}
    assert sizes("--out_dir=b", "--val_tokens=700") == {"val": 700, "train": count["train"]}
    assert sizes("--out_dir=c", "--max_tokens=3000") == {"val": 300, "train": 2700}
    with pytest.raises(SystemExit, match=r"--max_tokens=9: must be more than --val_tokens=10"):
        run(*args, "--max_tokens=9", "--val_tokens=10")


def test_without_training_files(run, tmp_path):
    (tmp_path / "d").mkdir()
    for name in ("dev", "test"):
        (tmp_path / "d" / f"{name}.jsonl").write_text(jsonl(LINES[:9]))
    with pytest.raises(
        SystemExit, match=r"has no files for --split=train; choose --split=validation or test"
    ):
        run("fineweb.py", "--dataset=d", "--tokenizer=bytes", "--out_dir=out")
    (tmp_path / "d" / "train.jsonl").write_text("")
    with pytest.raises(SystemExit, match=r"out has validation shards only: there is no training"):
        run("fineweb.py", "--dataset=d", "--tokenizer=bytes", "--out_dir=out")


def test_one_file_has_no_split(tmp_path):
    """Whatever it is called: the user has named it."""
    (tmp_path / "test.jsonl").write_text(jsonl(LINES))
    assert list(Documents(str(tmp_path / "test.jsonl"))) == LINES


@pytest.mark.parametrize("k", range(6))
def test_splits_killed_and_continued(run, tmp_path, dies_at, k):
    """At any shard, of validation or training: the same bytes as without."""
    (tmp_path / "d").mkdir()
    for split, texts in PARTS.items():
        (tmp_path / "d" / f"{split}.jsonl").write_text(jsonl(texts))
    args = ("fineweb.py", "--dataset=d", "--tokenizer=bytes", "--shard_size=1500")
    run(*args, "--out_dir=whole")
    dies_at(k, after=k % 2 == 0)
    with pytest.raises(ZeroDivisionError):
        run(*args, "--out_dir=parts")
    run(*args, "--out_dir=parts")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.*")}
    parts = {path.name: path.read_bytes() for path in (tmp_path / "parts").glob("*.*")}
    assert len(whole) > 6
    assert parts == whole


def test_a_tokenizer_learns_from_training_files_only(tmp_path):
    for split, texts in PARTS.items():
        (tmp_path / f"{split}.txt").write_text("\n<|endoftext|>\n".join(texts))
    assert list(Documents(str(tmp_path))) == PARTS["train"]


# -- what is read, and how often ----------------------------------------------------
def texts_of(folder):
    return list(Documents(str(folder)))


def test_every_file_once(tmp_path, capsys):
    """Links to siblings, to files, and hidden folders."""
    for name in ("real", ".ipynb_checkpoints"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    (tmp_path / "latest").symlink_to(tmp_path / "real")
    (tmp_path / "b.txt").symlink_to(tmp_path / "real" / "a.txt")
    os.link(tmp_path / "real" / "a.txt", tmp_path / "c.txt")
    assert texts_of(tmp_path) == ["real"]
    line = capsys.readouterr().out
    assert "2 duplicate" in line
    assert "1 duplicate folder" in line
    assert "1 hidden" in line


def test_two_revisions_in_the_hubs_cache(tmp_path):
    """Both link to one file, and their README.md is the dataset's card."""
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / "0a1b2c"
    pq.write_table(pa.table({"text": LINES}), blob)
    for revision in ("1111", "2222"):
        (tmp_path / "snapshots" / revision).mkdir(parents=True)
        (tmp_path / "snapshots" / revision / "x.parquet").symlink_to(blob)
        (tmp_path / "snapshots" / revision / "README.md").write_text("---\nlicense: mit\n---\nHi")
    assert texts_of(tmp_path) == LINES


def test_readme_files(tmp_path):
    """The dataset's own is no text; others are, and so is a folder of nothing else."""
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "README.md").write_text("about the dataset")
    (tmp_path / "d" / "a.txt").write_text("a")
    (tmp_path / "d" / "sub" / "README.md").write_text("a text")
    assert texts_of(tmp_path / "d") == ["a", "a text"]
    assert texts_of(tmp_path / "d" / "README.md") == ["about the dataset"]
    for name in ("x", "y"):
        (tmp_path / "readmes" / name).mkdir(parents=True)
        (tmp_path / "readmes" / name / "README.md").write_text(name)
    assert texts_of(tmp_path / "readmes") == ["x", "y"]


def test_a_leftover_lock_hides_nothing(run, tmp_path):
    folder = tmp_path / "d"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.txt").write_text("a")
    (folder / "sub" / ".lock").write_text("")
    assert texts_of(folder) == ["a"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".lock").write_text("")
    with pytest.raises(SystemExit, match=r"empty/: make them with python fineweb\.py"):
        run("train_gpt2.py", "--data_dir=empty")
    # One that a process holds does.
    lock = lock_folder(str(folder / "sub"))
    with pytest.raises(UserError, match="no data files here"):
        texts_of(folder)
    lock.release()


def test_shards_and_logs_inside_the_dataset(run, tmp_path, capsys):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text(TEXT)
    args = ("--dataset=d", "--tokenizer=bytes")
    run("fineweb.py", *args, "--out_dir=d/shards")
    (tmp_path / "d" / "log").mkdir()
    for name in ("log.txt", "metrics.jsonl"):
        (tmp_path / "d" / "log" / name).write_text("0 train 1.0\n")
    assert "3 shards or logs of this project" in run("fineweb.py", *args, "--out_dir=d/more")
    first, second = (
        json.loads((tmp_path / "d" / name / "meta.json").read_text()) for name in ("shards", "more")
    )
    assert first == second


@pytest.mark.parametrize(
    "name", ["dataset_info.json", "_delta_log/0.json", "_SUCCESS", "state.json"]
)
def test_metadata_next_to_the_data(tmp_path, name, capsys):
    pq.write_table(pa.table({"text": LINES}), tmp_path / "part-0.parquet")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"citation": "x"}')
    assert texts_of(tmp_path) == LINES
    assert "1 files or folders are not read" in capsys.readouterr().out


def test_a_json_file_called_as_metadata_is_can_be_all_there_is(tmp_path):
    (tmp_path / "state.json").write_text('{"text": "Ohio"}')
    assert texts_of(tmp_path) == ["Ohio"]


def test_save_to_disk(tmp_path):
    """Several .arrow files, continued after each document."""
    rows = datasets.Dataset.from_dict({"text": LINES, "id": list(range(len(LINES)))})
    rows.save_to_disk(tmp_path / "d", num_shards=3)
    texts = Documents(str(tmp_path / "d"))
    seen = []
    for text in texts:
        seen.append(text)
        if len(seen) % 25 == 0:
            rest = Documents(str(tmp_path / "d"))
            rest.state = json.loads(json.dumps(texts.state))
            assert [*seen, *rest] == LINES
    assert seen == LINES


# -- compressed files ---------------------------------------------------------------
@pytest.mark.parametrize("module", [bz2, lzma])
@pytest.mark.parametrize("between", [b"", b"\0" * 512, b"\0" * 100_000])
def test_streams_after_padding_are_read(tmp_path, module, between):
    extension = ".bz2" if module is bz2 else ".xz"
    parts = [module.compress(jsonl(LINES[i : i + 30]).encode()) for i in range(0, 180, 30)]
    path = tmp_path / f"a.jsonl{extension}"
    path.write_bytes(between.join(parts) + between)
    texts = Documents(str(path))
    seen = []
    for text in texts:
        seen.append(text)
        if len(seen) == 77:
            rest = Documents(str(path))
            rest.state = texts.state
            assert list(rest) == LINES[77:]
    assert seen == LINES


@pytest.mark.parametrize("extension", [".bz2", ".xz", ".gz", ".zst"])
@pytest.mark.parametrize("damage", ["garbage", "cut"])
def test_damaged_streams_end_the_command(tmp_path, extension, damage):
    """The rest of the file would be missing."""
    import gzip

    content = jsonl(LINES).encode()
    compress = {
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".gz": gzip.compress,
        ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
    }[extension]
    packed = compress(content)
    path = tmp_path / f"a.jsonl{extension}"
    path.write_bytes(packed + b"garbage!" + packed if damage == "garbage" else packed[:-20])
    with pytest.raises(UserError, match=r"cannot read .*a\.jsonl.*; repair it"):
        texts_of(path)


# -- files without usable text ------------------------------------------------------
def test_a_column_that_is_a_list_here_and_missing_there(tmp_path):
    (tmp_path / "a.jsonl").write_text(jsonl(LINES))
    (tmp_path / "b.jsonl").write_text("".join('{"text": ["x", "y"]}\n' for _ in range(50)))
    with pytest.raises(
        UserError, match=r"b\.jsonl: no row has text; take the file out \(.* 50 not a string\)"
    ):
        texts_of(tmp_path)
    (tmp_path / "b.jsonl").write_text("".join('{"body": "x"}\n' for _ in range(5)))
    with pytest.raises(UserError, match=r"b\.jsonl has no column 'text': use --text_column= with"):
        texts_of(tmp_path)
    (tmp_path / "b.jsonl").write_text("".join('{"body": "x"}\n' for _ in range(5000)))
    with pytest.raises(UserError, match=r"b\.jsonl line 100 has no column 'text'"):
        texts_of(tmp_path)
    # A file in which some rows have text is fine; the others are counted.
    (tmp_path / "b.jsonl").write_text('{"body": "x"}\n{"text": "late"}\n')
    texts = Documents(str(tmp_path))
    assert list(texts)[-1] == "late"
    assert "1 without text" in texts.report()


def test_a_requested_column_is_not_replaced_by_a_chat(tmp_path):
    chat = [{"role": "user", "content": "Hi"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    assert texts_of(tmp_path) == ["User: Hi"]
    with pytest.raises(UserError, match=r"has no column 'body'.* with one of messages"):
        list(Documents(str(tmp_path), text_column="body"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.jsonl.gz"])
def test_git_lfs_pointers_are_not_text(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 12345\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(UserError, match=r"is a Git LFS pointer, .*; run git lfs pull there"):
        texts_of(tmp_path)


def test_a_row_with_very_many_columns(tmp_path):
    row = {f"key{i}": i for i in range(100_000)}
    (tmp_path / "a.json").write_text(json.dumps(row))
    with pytest.raises(UserError) as e:
        texts_of(tmp_path)
    assert len(str(e.value)) < 600


def test_a_parquet_row_that_is_not_utf8(tmp_path):
    """It is skipped and reported, as in a .jsonl file."""
    raw = [line.encode() for line in LINES]
    raw[50] = b"caf\xe9"
    text = pa.array(raw, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    texts = Documents(str(tmp_path / "a.parquet"))
    assert list(texts) == LINES[:50] + LINES[51:]
    assert (
        texts.report()
        == (
            f"left out of 180 rows: 1 unreadable ({tmp_path}/a.parquet row 51: not UTF-8 "
            "(invalid continuation byte))"
        )
        or "row 51: not UTF-8" in texts.report()
    )


# -- found by reading the code --------------------------------------------------------
@pytest.mark.parametrize("spelling", ["d", "d/", "./d", "x/../d", "d//"])
def test_a_dataset_card_however_the_folder_is_spelled(tmp_path, monkeypatch, spelling):
    (tmp_path / "d").mkdir()
    (tmp_path / "x").mkdir()
    (tmp_path / "d" / "README.md").write_text("about it")
    (tmp_path / "d" / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    assert texts_of(spelling) == ["a"]


def test_what_map_has_cached_is_not_read_twice(tmp_path):
    rows = datasets.Dataset.from_dict({"text": LINES})
    rows.save_to_disk(tmp_path / "d")
    stored = datasets.load_from_disk(tmp_path / "d")
    stored.map(lambda row: {"n": len(row["text"])})
    assert list((tmp_path / "d").glob("cache-*.arrow"))
    assert texts_of(tmp_path / "d") == LINES


def test_nested_and_binary_texts(tmp_path):
    """In Parquet and Arrow files, also where one is not UTF-8."""
    nested = pa.array([{"text": b"one", "n": 1}, {"text": b"caf\xe9", "n": 2}])
    table = pa.table({"data": nested, "text": pa.array([b"top", b"caf\xe9"])})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as f, pa.ipc.new_stream(f, table.schema) as w:
        w.write_table(table)
    for column, text in (("data.text", "one"), ("text", "top")):
        for as_bytes in (False, True):
            texts = Documents(str(tmp_path), text_column=column, as_bytes=as_bytes)
            found = [t.decode() if isinstance(t, bytes) else t for t in texts]
            assert found == [text, text]
            assert "2 unreadable" in texts.report()


def test_two_columns_of_one_name_in_an_arrow_file(tmp_path):
    schema = pa.schema([("text", pa.string()), ("text", pa.string())])
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as f, pa.ipc.new_stream(f, schema) as w:
        w.write_batch(pa.record_batch([["a"], ["b"]], schema=schema))
    with pytest.raises(UserError, match=r"several columns are called 'text'"):
        texts_of(tmp_path)


def test_continued_before_many_rows_without_the_column(tmp_path):
    """As without the interruption."""
    lines = ['{"text": "one"}\n', *(['{"body": "x"}\n'] * 200), '{"text": "two"}\n']
    (tmp_path / "a.jsonl").write_text("".join(lines))
    texts = Documents(str(tmp_path))
    assert next(iter(texts)) == "one"
    rest = Documents(str(tmp_path))
    rest.state = texts.state
    assert list(rest) == ["two"]


@pytest.mark.parametrize("setting", ["--split=test", "--val_tokens=500"])
def test_the_same_command_without_a_setting_is_another(run, tmp_path, setting):
    (tmp_path / "d").mkdir()
    for split, texts in PARTS.items():
        (tmp_path / "d" / f"{split}.jsonl").write_text(jsonl(texts))
    args = ("fineweb.py", "--dataset=d", "--tokenizer=bytes", "--out_dir=out")
    run(*args, setting)
    with pytest.raises(
        SystemExit, match=r"out holds shards made with (val_files=None|val_tokens=500)"
    ):
        run(*args)


def test_byte_order_marks_of_later_documents(tmp_path):
    """As of files that were put together: removed, also when reading continues there."""
    bom = "\ufeff"
    parts = [f"{bom}{line}" for line in LINES[:6]]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(parts))
    texts = Documents(str(tmp_path))
    for i, text in enumerate(texts):
        assert text == LINES[i]
        rest = Documents(str(tmp_path))
        rest.state = json.loads(json.dumps(texts.state))
        assert list(rest) == LINES[i + 1 : 6]


def test_a_broken_link_that_is_no_data(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "latest").symlink_to("nowhere")
    assert texts_of(tmp_path) == ["a"]


def test_the_output_is_not_the_dataset(run, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text(TEXT)
    with pytest.raises(SystemExit, match=r"--out_dir=\./d: is the dataset"):
        run("fineweb.py", "--dataset=d", "--tokenizer=bytes", "--out_dir=./d")
