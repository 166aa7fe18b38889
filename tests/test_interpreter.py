"""Every public function with bad input, in an interpreter that survives each error."""

import os
import subprocess
import sys

from conftest import ROOT

CALLS = """
from script import UserError
from data.shards import Shards, open_shard, read_meta; Shards("x")
open_shard("gone.npy")
open_shard("short.bin")
read_meta("damaged")
from data.loader import open_sources, parse_mixture; open_sources("a:1,b:2")
parse_mixture("a:1,b")
from data.documents import Documents; Documents("no such folder")
list(Documents("empty"))
from data.readers import read_text
from data.dataset_files import find_files; find_files("empty")
read_text("not_utf8.txt")
from data.shard_writer import ShardWriter
from data.tokenizer import load_tokenizer, from_tokenizer_json; load_tokenizer("gone.json")
ShardWriter("out", "x", load_tokenizer("bytes"), 100, {}).close()
from_tokenizer_json({"model": {"type": "WordPiece"}}, "theirs.json")
from files import lock_folder
from device import pick_device, pick_dtype, pick_compile; pick_device("cuda:99")
pick_dtype("int4", "cpu")
pick_compile("perhaps", "cpu")
from model import GPT, GPTConfig, load_model; load_model("nothing")
load_model("latest", log_dir="empty")
load_model("empty")
GPT(GPTConfig(n_embd=10, n_head=3))
GPT(GPTConfig(pos="rotary"))
GPT.from_pretrained("empty")
GPT.from_state_dict(GPTConfig(), {}, "nowhere")
from training.checkpoint import load_resume
from weights import find_checkpoint, load_checkpoint
find_checkpoint("x.pt", "log")
load_checkpoint("damaged/meta.json")
load_resume("empty", step=5)
from training.settings import check_settings
from training.micro_batch import largest_micro_batch; largest_micro_batch(3, True, 32, 500, 1)
from configurator import check_choice, check_min, convert, parse_command_line
check_choice("x", "1", ("2", "3"))
check_min(1, x=0)
convert("soon", 1, "--x=soon")
parse_command_line(["--y=1"], {"x": (1, "")})
from training.schedule import check_schedule
check_schedule({"max_steps": 5, "warmup_steps": 9, "schedule": "cosine"})
from hellaswag import load_items, parse_item; load_items("gone.jsonl")
parse_item("{}", "here")
import ewok; ewok.parse_items("here", b"[]")
import plot; plot.read_run("empty")
from huggingface import find_architecture; find_architecture(GPTConfig(pos="rope"))
from fineweb import write_shards; write_shards([], load_tokenizer("bytes"), "out", "x")
from train_tokenizer import print_compression
""".strip().splitlines()


def test_an_interpreter_survives_every_mistake(tmp_path):
    for name in ("empty", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged" / "meta.json").write_text("{")
    (tmp_path / "short.bin").write_bytes(b"x")
    (tmp_path / "not_utf8.txt").write_bytes(b"\xff\xfe\xff")
    lines = []
    for i, call in enumerate(CALLS):
        lines += [call, f"print('alive after', {i})"]
    result = subprocess.run(
        [sys.executable, "-i", "-q"],
        input="\n".join(lines) + "\n",
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSTARTUP": "", "PS1": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    alive = [line for line in result.stdout.splitlines() if line.startswith("alive after")]
    assert len(alive) == len(CALLS), result.stderr
    errors = [line for line in result.stderr.splitlines() if "Error: " in line]
    wrong = [
        line for line in errors if not line.removeprefix(">>> ").startswith("script.UserError: ")
    ]
    assert not wrong, wrong
    # Lines that only import something raise nothing; all others one UserError each.
    quiet = [call for call in CALLS if call.startswith(("from ", "import ")) and ";" not in call]
    assert len(errors) == len(CALLS) - len(quiet), result.stderr
