"""Checkpoint files: finding and reading .pt files, those of nanoGPT as well; how tensors are saved.

log/model_00250.pt is {"model", "config", "step", "val_loss", "settings", "tokenizer"}: a model
after 250 updates. All .pt files hold plain tensors, numbers, strings, lists and dicts only, so that
loading one never runs code.
"""

import os
import pickle
import re

from files import atomic_write, check_lfs_pointer
from script import UserError

import torch
from torch.nn import functional as F

# Names that old files use -> today's: of settings, fields of GPTConfig and Run, and states.
RENAMED = {
    "tied": "tie_embeddings",
    "save_minutes": "save_every_minutes",
    "precision": "compute_dtype",
    "exposed": "exposed_tokens",
    "lengthened": "rewarm_from",
    "neuron_squares": "second_momentum_buffer",
}


def model_path(log_dir, step):
    """The path of the model after `step` updates."""
    return f"{log_dir}/model_{step:05d}.pt"


def resume_path(log_dir, step=-1):
    """The path of the latest training state, or of that of an earlier step."""
    name = "resume.pt" if step < 0 else f"resume_{step:05d}.pt"
    return f"{log_dir}/{name}"


def checkpoint_paths(log_dir, prefix="model"):
    """{step: path} of log_dir/model_*.pt, or of resume_*.pt, sorted."""
    paths = {}
    for name in os.listdir(log_dir) if os.path.isdir(log_dir) else []:
        match = re.fullmatch(rf"{prefix}_(\d+)\.pt", name)
        if match:
            paths[int(match[1])] = f"{log_dir}/{name}"
    return dict(sorted(paths.items()))


def last_checkpoint_message(log_dir):
    """Text for the end of an error message: the last checkpoint that there is."""
    paths = list(checkpoint_paths(log_dir).values())
    return f"the last good checkpoint is {paths[-1]}" if paths else "there is no checkpoint"


def find_checkpoint(ckpt, log_dir):
    """The path of a .pt file, or of the "latest" or "best" (by validation loss) in log_dir.

    ckpt can also be another log folder, of which it is the latest.
    """
    # A folder is a log folder: Hugging Face's are handled by the caller.
    if os.path.isdir(ckpt):
        log_dir = ckpt
        ckpt = "latest"
    if ckpt not in ("latest", "best"):
        if not os.path.isfile(ckpt):
            raise UserError(
                f"{ckpt}: no such checkpoint; use latest, best, gpt2 ... gpt2-xl, a .pt file or a "
                "Hugging Face folder"
            )
        return ckpt
    # The highest step is the latest, whatever the files' dates.
    paths = list(checkpoint_paths(log_dir).values())
    if not paths:
        raise UserError(
            f"no checkpoint in {log_dir}/: python train_gpt2.py makes one, --ckpt= or --init_from= "
            "names another"
        )
    if ckpt == "latest":
        return paths[-1]
    # The best by validation loss, among those where it was measured.
    losses = {}
    for path in paths:
        loss = load_checkpoint(path, mmap=True).get("val_loss")
        if loss is not None and loss == loss:  # not nan
            losses[path] = loss
    if not losses:
        raise UserError(f"no checkpoint in {log_dir}/ has a validation loss")
    return min(losses, key=losses.get)


def save_tensors(path, state):
    """Atomic torch.save(). Raises OSError if the disk is full."""

    def write(f):
        try:
            torch.save(state, f)
        except RuntimeError as e:  # torch wraps the OSError
            raise e.__context__ if isinstance(e.__context__, OSError) else e from None

    atomic_write(path, write)


class NanoGPTConfigStub:
    """Stands in for __main__.GPTConfig of build-nanogpt's checkpoints; only its values are used."""


def load_checkpoint(path, mmap=False):
    """The dict in a .pt file, on the CPU. Raises UserError if it is damaged or holds code."""
    check_lfs_pointer(path)
    # torch cannot map a file whose name is not UTF-8, as in a C locale.
    mmap = mmap and path == path.encode(errors="replace").decode()
    try:
        # weights_only refuses code. The stub lets build-nanogpt's pickled config object through.
        with torch.serialization.safe_globals([(NanoGPTConfigStub, "__main__.GPTConfig")]):
            return upgrade(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused, it holds something other than tensors and plain values")
    except Exception as e:  # torch.load raises many types of exceptions on corrupt files
        reason = str(e).partition("\n")[0].partition(". ")[0] or type(e).__name__
        hint = ""
        if "resume" in os.path.basename(path):
            hint = "; --resume_step= goes back to an earlier one"
        raise UserError(f"{path}: not a complete checkpoint file ({reason}){hint}")


def upgrade(saved):
    """The content of a .pt file with today's names and formats."""
    if not isinstance(saved, dict):
        return saved
    saved = rename(saved)
    for key in ("config", "settings", "defaults"):
        if isinstance(saved.get(key), dict):
            saved[key] = rename(saved[key])
            if saved[key].get("norm") == "weightless":
                saved[key]["norm"] = "rmsnorm_noaffine"
    for optimizer in saved.get("optimizers", []):
        optimizer["state"] = {i: rename(state) for i, state in optimizer["state"].items()}
    # Fingerprints of the data were lists.
    keys = ("weight", "shards", "dataset")
    for i, source in enumerate(saved.get("data", [])):
        if isinstance(source, list):
            saved["data"][i] = dict(zip(keys, source, strict=False))
    return saved


def rename(values):
    """A dict with today's names for its keys. Not for vocabularies, which have the word "tied"."""
    return {RENAMED.get(key, key): value for key, value in values.items()}


def read_checkpoint(path):
    """(config, state dict, tokenizer, step) of a .pt file: ours, nanoGPT's or build-nanogpt's.

    nanoGPT uses exact GELU and this project tanh, so losses differ in the fourth digit.
    """
    # Our files say which tokenizer they have; nanoGPT's and build-nanogpt's do not.
    saved = load_checkpoint(path)
    try:
        if "tokenizer" in saved:
            return saved["config"], saved["model"], saved["tokenizer"], saved.get("step", 0)
        args = saved["model_args"] if "model_args" in saved else vars(saved["config"])
        config = {"vocab_size": 50257, "bias": args.get("bias", True)}
        for key in ("block_size", "n_layer", "n_head", "n_embd"):
            config[key] = args[key]
        # nanoGPT saves compiled models, and old versions saved the causal mask.
        state = {}
        for name, tensor in saved["model"].items():
            if not name.endswith(".attn.bias"):  # a causal mask
                state[name.removeprefix("_orig_mod.")] = tensor
        wte = state["transformer.wte.weight"]
        step = saved.get("iter_num", saved.get("step"))
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{path}: not a checkpoint of this project's GPT-2, of nanoGPT or build-nanogpt ({e})"
        )
    if len(wte) not in (50257, 50304):
        raise UserError(
            f"{path}: its {len(wte)} tokens are not GPT-2's: are they characters (meta.pkl)?"
        )
    # nanoGPT saves 50,304 or 50,257 rows: pad them to 50,304, as model.py does.
    wte = F.pad(wte, (0, 0, 0, 50304 - len(wte)))
    state["transformer.wte.weight"] = wte
    state["lm_head.weight"] = wte
    return config, state, "gpt2", step
