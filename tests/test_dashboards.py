"""What Weights & Biases (offline) and TensorBoard have been sent, read back."""

import json

from conftest import read_jsonl, read_log
from test_train import SMALL
from training import logdir

import pytest

ARGS = [*SMALL, "--plot_every=0", "--tensorboard=True"]


def in_tensorboard(folder):
    """{tag: [(step, value)]}"""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def leveldb_records(content, block=32768, header=7):
    """The records of a log in LevelDB's format, behind a header of wandb's."""
    at, parts = header, []
    while at + header <= len(content):
        if block - at % block < header:  # too little for another
            at += block - at % block
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts.append(content[at + header : at + header + size])
        at += header + size
        if kind in (1, 4):  # whole, or its last part
            yield b"".join(parts)
            parts = []


def in_wandb(folder):
    """The same of the run's offline folders, one for each time it was started.

    Where two have a number for the same step, the later one counts.
    """
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    found, ids = {}, set()
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):  # by the time of day
        ids.add(path.stem)
        for data in leveldb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                row = {
                    (i.key or "/".join(i.nested_key)): json.loads(i.value_json)
                    for i in record.history.item
                }
                step = row.pop("step")
                for key, value in row.items():
                    if not key.startswith("_"):
                        found.setdefault(key, {})[step] = value
    assert len(ids) == 1, "every start continues the same run"
    return {key: sorted(values.items()) for key, values in found.items()}


def expected(folder):
    found = {}
    for record in read_jsonl(folder / "metrics.jsonl"):
        for key, value in record.items():
            if isinstance(value, (int, float)) and key != "step" and record["kind"] != "run":
                found.setdefault(f"{record['kind']}/{key}", []).append((record["step"], value))
    return found


def test_the_same_numbers_once_each_after_a_kill_and_a_resume(
    run, shards, tmp_path, at_step, monkeypatch
):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    args = [*ARGS, "--wandb=mine", "--wandb_name=first"]
    at_step(5, lambda: 1 / 0)  # the checkpoint is of step 3
    with pytest.raises(ZeroDivisionError):
        run("train_gpt2.py", *args)
    import wandb

    wandb.finish()
    at_step(-1, None)
    run("train_gpt2.py", *args, "--resume")
    numbers = expected(tmp_path / "log")
    assert [step for step, _ in numbers["train/loss"]] == list(range(8)) and len(
        numbers["val/loss"]
    ) == 4
    assert {step: round(loss, 6) for step, loss in numbers["train/loss"]} == read_log(
        tmp_path / "log", "train"
    )
    found = in_tensorboard(tmp_path / "log" / "tensorboard")
    assert {
        key: [(s, pytest.approx(v, rel=1e-6)) for s, v in values] for key, values in numbers.items()
    } == found
    assert in_wandb(tmp_path / "log") == numbers


def test_one_that_fails_does_not_end_the_run(run, shards, tmp_path, monkeypatch):
    def lost(*args):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(logdir, "open_tensorboard", lost)
    out = run("train_gpt2.py", *ARGS)
    assert (
        out.count("warning: this run continues without tensorboard: ConnectionError: no route\n")
        == 1
    )
    monkeypatch.setattr(logdir, "open_tensorboard", lambda folder, step: (lost, lost))
    out = run("train_gpt2.py", *ARGS)
    assert (
        out.count("warning: this run continues without tensorboard: ConnectionError: no route\n")
        == 1
    )
    assert list(read_log(tmp_path / "log", "train")) == list(range(8))


def test_what_is_not_installed_is_one_line(run, shards, tmp_path, monkeypatch):
    """And nothing has been moved aside for a run that cannot start."""
    run("train_gpt2.py", *SMALL)
    monkeypatch.setattr("training.logdir.importlib.util.find_spec", lambda name: None)
    for name, args in (("wandb", "--wandb=mine"), ("tensorboard", "--tensorboard=True")):
        with pytest.raises(SystemExit, match=rf"^{args} needs {name}: pip install {name}$"):
            run("train_gpt2.py", *SMALL, args)
    assert (tmp_path / "log" / "model_00008.pt").exists()
