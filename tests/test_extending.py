"""Extending the project: a toy of each kind, added to a copy of it, each in one place.

An eval, an optimizer, a reason to stop, a counter of a run, and an option of the architecture.
"""

import shutil
import subprocess
import sys

from conftest import ROOT, TEXT, read_log
from weights import load_checkpoint

import pytest

EVAL = '''"""A toy eval: the share of texts that the tokenizer shortens."""

NAME, KIND, MAIN_METRIC = "Toy", "toy", "share"


def load_items(limit=0):
    return ["abc", "def"]


def evaluate(model, enc, items, rank=0, world_size=1):
    return {"share": sum(len(enc.encode(item)) < len(item) for item in items) / len(items)}


def summary(result):
    return f"Toy {result['share']:.2f}"
'''
OPTIMIZER = '''
class ToySGD(torch.optim.SGD):
    """SGD with momentum for all parameters."""

    state_floats_per_param = 1
    scales_with_size = False

    @classmethod
    def configure(cls, model, weight_decay, lr, betas):
        return [cls(model.parameters(), lr=lr, momentum=0.9)]

    @staticmethod
    def hyperparameters_at(step):
        return {}


OPTIMIZERS = {"toy": ToySGD, "adamw": AdamW, "muon": Muon}
'''


def insert(path, *changes):
    """Put lines after others in a file: (existing line, new line), or replace: (old, new, True)."""
    source = path.read_text()
    for anchor, new, *replace in changes:
        assert source.count(anchor + "\n") == 1, (path, anchor)
        source = source.replace(anchor + "\n", f"{new}\n" if replace else f"{anchor}\n{new}\n")
    path.write_text(source)


@pytest.fixture
def clone(tmp_path):
    """A copy of the project's code, in which a test may change things; and shards next to it."""
    folder = tmp_path / "clone"
    for path in (*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("training/*.py")):
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    (tmp_path / "input.txt").write_text(TEXT * 3)
    return folder


def run(clone, script, *args, status=0):
    """Run a script of the clone; returns its stdout, or its stderr if it is to fail."""
    line = [sys.executable, str(clone / script), *args]
    result = subprocess.run(line, cwd=clone.parent, capture_output=True, text=True, timeout=120)
    assert result.returncode == status, result.stderr
    return result.stderr if status else result.stdout


def test_a_toy_of_each_kind(clone, tmp_path):
    (clone / "toy.py").write_text(EVAL)
    insert(
        clone / "train_gpt2.py",
        ("import hellaswag", "import toy"),
        (
            "ewok_every = 250  # run EWoK (ewok.py) every N steps; 0: never",
            "toy_every = 4  # run the toy eval",
        ),
        (
            "EVALS = (hellaswag, ewok)",
            "EVALS = (hellaswag, ewok, toy)",
            True,
        ),
        # An option of the architecture is a field of GPTConfig, and a setting of the same name.
        ("n_embd = 768  # width of the model", "toy_scale = 1.0  # a factor of the embedding"),
        # A reason to stop is a function.
        (
            "    stop = distributed.StopRequests()",
            '    stop.conditions.append(lambda: __import__("os").path.exists("STOP"))',
        ),
        # A counter is a field of Run, and whatever counts.
        ("        run.step += 1", "        run.toy_steps += 1"),
    )
    insert(
        clone / "training" / "checkpoint.py",
        (
            '    wandb_id: str = ""  # the run\'s id at Weights & Biases',
            "    toy_steps: int = 0  # a toy counter",
        ),
    )
    insert(
        clone / "model.py",
        ("    n_embd: int = 768", "    toy_scale: float = 1.0  # a factor of the embedding"),
        (
            "        x = self.transformer.wte(idx)  # (B, T, C)",
            "        x = x * self.config.toy_scale",
        ),
    )
    insert(
        clone / "training" / "optimizers.py",
        ('OPTIMIZERS = {"adamw": AdamW, "muon": Muon}', OPTIMIZER, True),
    )

    small = [
        "--max_steps=12",
        "--B=2",
        "--total_batch_size=512",
        "--eval_every=4",
        "--save_every=4",
    ]
    toys = ["--optimizer=toy", "--max_lr=0.1", "--toy_scale=2", "--plot_every=0"]
    (tmp_path / "STOP").write_text("")
    assert "stopped; resume with" in run(clone, "train_gpt2.py", *small, *toys)
    log = tmp_path / "log"
    assert list(read_log(log, "train")) == [] and (log / "model_00000.pt").exists()
    (tmp_path / "STOP").unlink()
    error = run(clone, "train_gpt2.py", "--resume", "--toy_scale=3", status=1)
    assert "--toy_scale=3.0: the run to resume has 2.0; leave it out" in error
    assert "Toy 0.00" in run(clone, "train_gpt2.py", "--resume")

    # The run is the one that was started, with all its toys.
    assert list(read_log(log, "train")) == list(range(12))
    assert list(read_log(log, "toy")) == [0, 4, 8, 12]
    saved = load_checkpoint(str(log / "resume.pt"))
    assert saved["toy_steps"] == 12
    states = saved["optimizers"][0]["state"]
    assert all(state.keys() == {"momentum_buffer"} for state in states.values())
    assert load_checkpoint(str(log / "model_00012.pt"))["config"]["toy_scale"] == 2.0
    run(clone, "sample.py", "--max_new_tokens=5")
    # What transformers does not have is never exported as something else.
    assert "toy_scale=2.0" in run(clone, "export.py", status=1)
