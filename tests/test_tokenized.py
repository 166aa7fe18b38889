"""Tokens made by others, in .bin and .ds files.

Downloaded from a server on this machine that speaks as the hub does, and local files read in place.
"""

import contextlib
import http.server
import json
import os
import random
import resource
import signal
import subprocess
import threading
import time
import types

from conftest import command, read_log
from data.shards import Shards, open_shard
from data.token_shards import list_token_shards
from data.tokenizer import load_tokenizer, to_tokenizer_json
from script import UserError

import numpy as np
import pytest

REPOSITORY = "karpathy/fineweb-edu-100B-gpt2-token-shards"
NAMES = [
    "edu_fineweb_val_000000.bin",
    "edu_fineweb_train_000001.bin",
    "edu_fineweb_train_000002.bin",
]


def made_up(seed, size=20_000):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 50256, size).astype(np.uint16)
    tokens[rng.integers(0, size, 40)] = 50256
    tokens[0] = 50256
    return tokens


def llmc(tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + tokens.astype("<u2").tobytes()


def all_tokens(folder):
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["complete"] and all(
        shard["split"] == ("train" if i else "val") for i, shard in enumerate(meta["shards"])
    )
    return np.concatenate(
        [open_shard(str(folder / shard["file"])) for shard in meta["shards"]]
    ), meta


class Hub:
    """The parts of the hub's interface that files of a dataset need.

    trouble: {file: [what goes wrong, each time]}
    """

    def __init__(self, files):
        self.files, self.trouble, self.asked, self.pause = files, {}, [], 0.0
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, body):
                name = self.path.partition("?")[0].rpartition("/")[2]
                if "/api/datasets/" in self.path:
                    tree = [
                        {"type": "file", "path": x, "size": len(c), "oid": "0" * 40}
                        for x, c in hub.files.items()
                    ]
                    content, headers = (
                        json.dumps(tree).encode(),
                        {"Content-Type": "application/json"},
                    )
                elif name not in hub.files:
                    return self.refuse(404, {"X-Error-Code": "EntryNotFound"})
                else:
                    content, headers = (
                        hub.files[name],
                        {"ETag": f'"{name}"', "X-Repo-Commit": "a" * 40},
                    )
                wrong = hub.trouble.get(name, []) if body else []
                wrong = wrong.pop(0) if wrong else ""
                if wrong == "429":
                    return self.refuse(429, {"Retry-After": "1"})
                if wrong == "404":
                    return self.refuse(404, {"X-Error-Code": "EntryNotFound"})
                start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
                hub.asked.append((name, start, body))
                self.send_response(206 if start else 200)
                for key, value in (
                    headers
                    | {"Content-Length": str(len(content) - start), "Accept-Ranges": "bytes"}
                ).items():
                    self.send_header(key, value)
                if start:
                    self.send_header(
                        "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                    )
                self.end_headers()
                if not body:
                    return
                content = content[start:]
                if wrong == "cut":
                    self.wfile.write(content[: len(content) // 2])
                    self.connection.close()
                    return
                for at in range(0, len(content), 4096):
                    time.sleep(hub.pause)
                    self.wfile.write(content[at : at + 4096])

            def refuse(self, code, headers):
                self.send_response(code)
                for key, value in (headers | {"Content-Length": "0"}).items():
                    self.send_header(key, value)
                self.end_headers()

            def do_GET(self):
                with contextlib.suppress(OSError, ValueError):
                    self.answer(True)

            def do_HEAD(self):
                self.answer(False)

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def hub(gpt2):
    return Hub({name: llmc(made_up(i)) for i, name in enumerate(NAMES)} | {"README.md": b"a card"})


def fetch(hub, tmp_path, *args, out="out", timeout=90, **how):
    env = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "NO_PROXY": "127.0.0.1",
    }
    env.pop("HF_HUB_OFFLINE", None)
    line = command("fineweb.py", "--dataset=fineweb-edu-gpt2", f"--out_dir={out}", *args)
    return subprocess.Popen(
        line, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_three_shards_arrive_token_for_token(hub, tmp_path):
    """Although much goes wrong while they are downloaded; nothing is left over."""
    hub.trouble = {NAMES[1]: ["cut"], NAMES[2]: ["429"]}
    process = fetch(hub, tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    tokens, meta = all_tokens(tmp_path / "out")
    expected = np.concatenate([made_up(i) for i in range(3)])
    assert np.array_equal(tokens, expected)
    assert (meta["dataset"], meta["subset"], meta["tokenizer"]) == (
        "fineweb-edu",
        REPOSITORY,
        "gpt2",
    )
    for i, shard in enumerate(meta["shards"]):
        assert (
            shard["documents"] == np.count_nonzero(made_up(i) == 50256) and shard["bytes"] > 20_000
        )
    assert sorted(os.listdir(tmp_path / "out")) == [
        ".lock",
        *sorted(s["file"] for s in meta["shards"]),
        "meta.json",
    ]
    assert not list((tmp_path / "hf").rglob("*.bin")), "the hub's cache holds a second copy"
    assert "README.md" not in {name for name, _, _ in hub.asked}


def test_only_as_many_as_are_needed(hub, tmp_path):
    """Whole files: max_tokens is rounded up to them."""
    process = fetch(hub, tmp_path, "--max_tokens=30000")
    assert process.communicate(timeout=60) and process.returncode == 0
    assert len(all_tokens(tmp_path / "out")[0]) == 40_000
    assert NAMES[2] not in {name for name, _, _ in hub.asked}
    assert ".cache" not in os.listdir(tmp_path / "out")


def test_what_cannot_be_downloaded_is_one_line(hub, tmp_path):
    hub.trouble = {NAMES[2]: ["404"] * 9}
    process = fetch(hub, tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err, err
    assert (
        err.splitlines()[-1].startswith(f"cannot download {REPOSITORY}: ")
        and "the same command continues" in err
    )
    hub.trouble = {}
    again = fetch(hub, tmp_path)
    again.communicate(timeout=60)
    assert np.array_equal(
        all_tokens(tmp_path / "out")[0], np.concatenate([made_up(i) for i in range(3)])
    )


def test_no_network(run, tmp_path, gpt2, monkeypatch):
    def lost(*args, **how):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_tree", lost)
    with pytest.raises(SystemExit) as e:
        run("fineweb.py", "--dataset=kjj0/fineweb10B-gpt2", "--out_dir=none")
    assert e.value.code.startswith(
        "cannot reach kjj0/fineweb10B-gpt2 on the hub (ConnectionError): go online"
    )
    assert not (tmp_path / "none").exists()


def test_killed_while_downloading(hub, tmp_path, pytestconfig):
    """At random moments, and with the same end."""
    hub.pause, rng = 0.02, random.Random(0)
    for _ in range(3 + pytestconfig.getoption("--kills")):
        process = fetch(hub, tmp_path)
        time.sleep(rng.uniform(1.5, 3.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    hub.pause = 0
    process = fetch(hub, tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert np.array_equal(
        all_tokens(tmp_path / "out")[0], np.concatenate([made_up(i) for i in range(3)])
    )
    assert ".cache" not in os.listdir(tmp_path / "out")


def test_training_starts_with_the_first_two(hub, spawn, tmp_path):
    """And waits for the rest: the log is that of a run that had all from the start."""
    small = [
        "--n_layer=1",
        "--n_head=1",
        "--n_embd=16",
        "--T=64",
        "--B=8",
        "--total_batch_size=2048",
        "--max_steps=11",
    ]
    small += [
        "--data_dir=out",
        "--eval_every=11",
        "--val_tokens=512",
        "--hellaswag_every=0",
        "--ewok_every=0",
        "--sample_every=0",
    ]
    hub.pause = (
        0.3  # a second and a half for the first two, which come side by side, as does the third
    )
    process = fetch(hub, tmp_path)
    end = time.monotonic() + 60
    while not list((tmp_path / "out").glob("*train_000001.bin")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    run = spawn("train_gpt2.py", *small, "--log_dir=early")
    assert run.returncode == 0, run.stderr
    process.communicate(timeout=60)
    assert spawn("train_gpt2.py", *small, "--log_dir=late").returncode == 0
    assert (tmp_path / "early" / "log.txt").read_text() == (
        tmp_path / "late" / "log.txt"
    ).read_text()
    assert list(read_log(tmp_path / "late", "train")) == list(range(11))


# -- local --------------------------------------------------------------------------
SMALL = """--n_layer=1 --n_head=1 --n_embd=16 --T=50 --B=10 --total_batch_size=500 --max_steps=1
    --eval_every=1 --val_tokens=512 --hellaswag_every=0 --ewok_every=0 --sample_every=0""".split()


def tokens_of(split):
    """The tokens of a split of Shards."""
    return np.concatenate([open_shard(path) for path, _ in split])


def datatrove(name, tokens, tokenizer="gpt2"):
    """{file: content} of what DocumentTokenizer of datatrove 0.10 writes, without the index."""
    metadata = f"{tokenizer}|{tokens.itemsize}\n{len(tokens)}\n0.02 MT"
    return {f"{name}.metadata": metadata.encode(), name: tokens.tobytes()}


def test_local_folders(run, tmp_path, gpt2):
    """llm.c's, nanoGPT's and datatrove's, read in place; fineweb.py says how."""
    a, b, c = (made_up(i, 9000 + i) for i in range(3))
    for name, files in {
        "llmc": {
            "x_val_000000.bin": llmc(a),
            "x_train_000001.bin": llmc(b),
            "x_train_000002.bin": llmc(c),
        },
        "nano": {"val.bin": a.tobytes(), "train.bin": np.concatenate([b, c]).tobytes()},
        "datatrove": {
            **datatrove("val_00000_00000_doc_shuffled.ds", a),
            **datatrove("train_00002_unshuffled.ds", a[:0]),  # of a task without documents
            **datatrove("train_00001_00000_doc_shuffled.ds", c),
            **datatrove("train_00000_00000_doc_shuffled.ds", b),
        },
        "one": {"train.bin": np.concatenate([b, c]).tobytes()},
    }.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content)
        line = f"holds tokens, which need no conversion: python train_gpt2.py --data_dir={name}"
        for dataset in (name, f"{name}/{list(files)[-1]}"):
            with pytest.raises(SystemExit) as e:
                run("fineweb.py", f"--dataset={dataset}", "--out_dir=out")
            assert e.value.code == f"--dataset={dataset}: {line}"
        assert not (tmp_path / "out").exists()
        shards = Shards(name)
        assert shards.enc.name == "gpt2" and shards.complete and shards.dataset == name
        assert np.array_equal(tokens_of(shards.train), np.concatenate([b, c]))
        if name == "one":
            assert shards.val == []
        else:
            assert np.array_equal(tokens_of(shards.val), a)
        run("train_gpt2.py", *SMALL, f"--data_dir={name}", f"--log_dir={name}_log")
        assert list(read_log(tmp_path / f"{name}_log", "train")) == [0]
    assert list(read_log(tmp_path / "llmc_log", "val")) == [0, 1]
    run("train_gpt2.py", *SMALL, "--data_dir=one", "--val_dir=nano", "--log_dir=both_log")
    for kind in ("train", "val"):
        expected = read_log(tmp_path / "nano_log", kind)
        assert read_log(tmp_path / "both_log", kind) == expected


def test_more_files_than_may_be_open(tmp_path, gpt2):
    parts = [made_up(i, 100) for i in range(300)]
    for i, part in enumerate(parts):
        (tmp_path / f"train_{i:06d}.bin").write_bytes(llmc(part))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        shards = Shards(str(tmp_path))
        found = [shards.read(path, 0, size) for path, size in shards.train]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert np.array_equal(np.concatenate(found), np.concatenate(parts))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (
            llmc(made_up(0), count=30_000),
            "says 30000 tokens and holds 20000: it is cut short, download it again",
        ),
        (llmc(made_up(0))[:-1], "says 20000 tokens and holds 19999.5: it is cut short"),
        (
            llmc(made_up(0), magic=20240801, version=7),
            "holds Llama 3's tokens (uint32), not GPT-2's",
        ),
        (made_up(0).tobytes() + b"x", "40001 bytes are not uint16 tokens"),
        (b"", "0 bytes are not uint16 tokens"),
        (
            np.array([50257] + [3] * 500, dtype=np.uint16).tobytes(),
            "token 50257 at 0 is outside the vocabulary of gpt2",
        ),
    ],
)
def test_files_that_are_none(run, tmp_path, gpt2, content, line):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "train.bin").write_bytes(content)
    with pytest.raises(SystemExit) as e:
        run("train_gpt2.py", *SMALL, "--data_dir=x")
    assert line in e.value.code and "\n" not in e.value.code


def test_datatrove_with_another_tokenizer(run, tmp_path):
    """Its name is in the .metadata; more than 65,536 tokens are written as uint32."""
    ids = np.arange(2000, dtype=np.uint32) % 250
    tmp_path = tmp_path / "x"
    tmp_path.mkdir()
    for name, content in datatrove("000_train.ds", ids, "owner/name").items():
        (tmp_path / name).write_bytes(content)
    line = [*SMALL, "--data_dir=x", "--eval_every=0"]
    with pytest.raises(SystemExit, match=r"x: holds tokens of owner/name: copy its tokenizer\."):
        run("train_gpt2.py", *line)
    content = json.dumps(to_tokenizer_json(load_tokenizer("bytes")))
    (tmp_path / "tokenizer.json").write_text(content)
    run("train_gpt2.py", *line)
    assert Shards("x").read("x/000_train.ds", 1990, 10).tolist() == ids[1990:].tolist()
    for change in (
        lambda: os.truncate("x/000_train.ds", 7000),
        (tmp_path / "000_train.ds.metadata").unlink,
    ):
        change()
        with pytest.raises(UserError, match=r"says; make it again|cannot be read") as e:
            Shards("x")
        assert str(e.value).startswith("x/000_train.ds")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["retrieval_00000.ds", "train.bin"], r"x/retrieval_00000\.ds: shards are named"),
        (["00000_doc_shuffled.ds"], r"; set save_filename= in datatrove"),
        (["train_0.ds"], "cannot be read"),
        (["train.bin", "val_0.ds owner/name"], "tokens of gpt2 and of owner/name: put them into"),
        (
            ["train_0.ds "],
            r"x: shards are named .*; no file here is named like that and has tokens",
        ),
    ],
)
def test_folders_of_datatrove_that_are_refused(tmp_path, monkeypatch, files, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    for name, space, tokenizer in (file.partition(" ") for file in files):
        tokens = made_up(0) if tokenizer or not space else made_up(0)[:0]
        contents = datatrove(name, tokens, tokenizer or "gpt2")
        for file, content in contents.items() if space else [(name, tokens.tobytes())]:
            (tmp_path / "x" / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        Shards("x")


def test_nanogpts_characters(run, tmp_path, gpt2):
    (tmp_path / "shakespeare").mkdir()
    (tmp_path / "shakespeare" / "train.bin").write_bytes(made_up(0).tobytes())
    (tmp_path / "shakespeare" / "meta.pkl").write_bytes(b"")
    with pytest.raises(
        SystemExit,
        match=r"holds the characters of the meta\.pkl next to it.*--tokenizer=bytes",
    ):
        run("train_gpt2.py", *SMALL, "--data_dir=shakespeare")


def test_another_tokenizer_for_gpt2s_tokens(run, tmp_path):
    with pytest.raises(SystemExit, match="holds GPT-2's tokens; leave out --tokenizer=bytes"):
        run("fineweb.py", "--dataset=fineweb-edu-gpt2", "--out_dir=out", "--tokenizer=bytes")
    assert not (tmp_path / "out").exists()


def test_the_validation_split_comes_first(monkeypatch):
    names = ["b_train_2.bin", "a_val.bin", "x.txt", "b_train_1.bin"]
    tree = [types.SimpleNamespace(path=name, size=2024) for name in names]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_tree", lambda *args, **kwargs: tree)
    assert list(list_token_shards(REPOSITORY, 0)) == [
        "a_val.bin",
        "b_train_1.bin",
        "b_train_2.bin",
    ]


@pytest.mark.parametrize("dtype", ["<i4", "<i8", ">u2", ">i4", ">i8"])
def test_tokens_of_another_dtype(tmp_path, dtype):
    """People pack tokens as int32 or int64; read as uint16, every second one would be "!"."""
    tokens = made_up(1)
    tokens.astype(dtype).tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match=rf"train\.bin: holds {dtype} tokens, not uint16; convert"):
        open_shard(str(tmp_path / "train.bin"))
    path = tmp_path / "train.bin"
    np.fromfile(path, dtype).astype("<u2").tofile(tmp_path / "val.bin")  # as the message says
    assert np.array_equal(open_shard(str(tmp_path / "val.bin")), tokens)


def test_token_0_is_no_other_dtype(tmp_path):
    for tokens in ([0] * 64, [0, 5, 0, 6] * 9 + [1, 1, 1, 1], [7] * 3):
        np.array(tokens, "<u2").tofile(tmp_path / "train.bin")
        assert open_shard(str(tmp_path / "train.bin")).tolist() == tokens
