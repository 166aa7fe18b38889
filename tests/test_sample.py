"""sample.py on a checkpoint made for it."""

import io
import os
from unittest import mock

from model import GPT, GPTConfig

import pytest
import torch


@pytest.fixture
def checkpoint(tmp_path):
    config = dict(block_size=32, vocab_size=257, n_layer=1, n_head=2, n_embd=32)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**config))
    (tmp_path / "log").mkdir()
    state = {"model": model.state_dict(), "config": config, "tokenizer": "bytes"}
    torch.save(state, tmp_path / "log" / "model_00001.pt")
    return model.eval()


def test_greedy_text_is_the_models(run, checkpoint):
    out = run(
        "sample.py", "--prompt=Hello", "--temperature=0", "--max_new_tokens=20", "--dtype=float32"
    )
    tokens = torch.cat(
        list(checkpoint.generate(torch.tensor([list(b"Hello")]), 20, temperature=0))
    ).tolist()
    assert out == "Hello" + bytes(tokens).decode(errors="replace") + "\n"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype(run, checkpoint, dtype):
    out = run("sample.py", "--prompt=Hello", f"--dtype={dtype}", "--max_new_tokens=40")
    assert out.startswith("Hello") and len(out) > 20  # past the context


def test_samples_seed_and_file(run, checkpoint, tmp_path):
    args = ["--prompt=ab", "--num_samples=3", "--max_new_tokens=30"]
    first = run("sample.py", *args, "--out=out.txt")
    assert first == run("sample.py", *args) != run("sample.py", *args, "--seed=2")
    samples = first.removesuffix("\n").split(f"\n{'-' * 80}\n")
    assert len(samples) == 3 and all(s.startswith("ab") for s in samples) and len(set(samples)) == 3
    assert (tmp_path / "out.txt").read_text() == "".join(f"{s}\n{'-' * 80}\n" for s in samples)


def test_prompt_from_a_file_keeps_its_end(run, checkpoint, tmp_path):
    (tmp_path / "p.txt").write_text("x" * 100 + "the end of it, exactly 32 bytes.")
    args = ["--temperature=0", "--max_new_tokens=1", "--dtype=float32"]
    whole = run("sample.py", "--prompt=FILE:p.txt", *args)
    end = run("sample.py", "--prompt=the end of it, exactly 32 bytes.", *args)
    assert whole == "x" * 100 + end


def test_interactive(run, checkpoint, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\nthree\n"))
    out = run("sample.py", "--interactive=True", "--max_new_tokens=5")
    assert out.startswith("prompt> one") and "\nprompt> two" in out and "three" not in out
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    assert run("sample.py", "--interactive", "--max_new_tokens=5").endswith("prompt> ")


def test_nobody_to_ask(run, checkpoint, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert run("sample.py", "--interactive") == ""


def test_an_error_between_prompts_is_said(run, checkpoint, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    monkeypatch.setattr(
        "torch.multinomial", mock.Mock(side_effect=RuntimeError("CUDA out of memory. Tried"))
    )
    with pytest.raises(
        SystemExit, match=r"^out of memory: try a smaller batch, or a smaller model$"
    ):
        run("sample.py", "--interactive")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk(run, checkpoint):
    with pytest.raises(
        SystemExit, match=r"^--out=/dev/full: cannot write this file \(No space left on device\)$"
    ):
        run("sample.py", "--out=/dev/full", "--max_new_tokens=5")


def test_a_mistake_leaves_the_file_alone(run, tmp_path):
    (tmp_path / "keep.txt").write_text("precious")
    with pytest.raises(SystemExit, match="no checkpoint in log/"):
        run("sample.py", "--out=keep.txt")
    assert (tmp_path / "keep.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ckpt=gone.pt"], r"gone\.pt: no such checkpoint"),
        (["--log_dir=empty"], r"no checkpoint in empty/"),
        (["--prompt=FILE:gone.txt"], r"--prompt=FILE:gone\.txt: cannot read this file"),
        (["--top_p=0"], r"--top_p=0\.0: must be more than 0, and 1 at most"),
        (["--num_samples=0"], r"--num_samples=0: must be at least 1"),
        (["--out=no/such/folder.txt"], r"--out=no/such/folder\.txt: cannot write this file"),
    ],
)
def test_mistakes(run, checkpoint, args, message):
    with pytest.raises(SystemExit, match=message):
        run("sample.py", *args)
