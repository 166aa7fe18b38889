"""What a run measures as it goes: its validation loss, the evals, a sample, what it has read.

Each of validate, score, write_sample and write_exposure prints and records what there is to say of a `run`
(logdir.Run) in its `log` (logdir.LogDir); train_gpt2.py says when, and all ranks call them. An eval is a script like
hellaswag.py with load_items(limit=); evaluate(model, enc, items, rank=, world_size=), a dict of plain values, on every
rank the same, which may hold each item's under "items"; summary(dict), a line; and SCORE, its key for log.txt.
"""

import math
import statistics
import sys

from model import load_model
from order import open_mixture, read_windows, val_windows
from parallel import all_agree, any_shape, is_rank_0, local_first, print0, sum_over_ranks
from sample import stream_text
from tokenizer import token_byte_lengths

import numpy as np
import torch
from tqdm import tqdm


@torch.no_grad()
def evaluate(model, shards, B, T, max_tokens, rank=0, world_size=1):
    """Validation loss over the first max_tokens validation tokens, the batches divided among ranks.

    Returns {"loss", "accuracy", "bpb", "tokens", "perplexity"}: nats a token, the share of tokens that the model took
    for the likeliest, bits a UTF-8 byte of the text, how many tokens were predicted, and the exp of the loss. Runs
    under the autocast of the caller.
    """
    device = model.lm_head.weight.device
    byte_lengths = np.array(token_byte_lengths(shards.enc))
    windows = val_windows(shards, T, max_tokens)
    sums = torch.zeros(4, dtype=torch.float64)  # nats, right, tokens, bytes
    starts = range(rank * B, len(windows), world_size * B)
    for i in tqdm(starts, desc="validation", leave=False, disable=rank != 0):
        x, y = read_windows(shards, windows[i : i + B], B, T)
        tokens = y[y >= 0]
        means = model(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device), with_accuracy=True)
        nats, right = (len(tokens) * mean.item() for mean in means)
        sums += torch.tensor([nats, right, len(tokens), byte_lengths[tokens].sum()])
    nats, right, tokens, size = sum_over_ranks(sums).tolist()
    means = {"loss": nats / tokens, "accuracy": right / tokens, "bpb": nats / math.log(2) / max(size, 1)}
    return means | {"tokens": int(tokens), "perplexity": math.exp(min(nats / tokens, 700))}


def evaluate_mixture(model, mixture, *args, **ranks):
    """evaluate() on each of a mixture's Shards; of several, the mean by weight and all {folder: loss}."""
    results = {shards.data_dir: evaluate(model, shards, *args, **ranks) for shards in mixture}
    if len(results) == 1:
        return next(iter(results.values()))
    parts = [(float(weight), results[shards.data_dir]) for shards, weight in mixture.items()]
    mean = {key: sum(weight * result[key] for weight, result in parts) for key in ("loss", "accuracy", "bpb")}
    mean |= {"tokens": sum(r["tokens"] for r in results.values()), "perplexity": math.exp(min(mean["loss"], 700))}
    return mean | {"sources": {folder: result["loss"] for folder, result in results.items()}}


def sources(mixture, val_dir, max_tokens):
    """{Shards: share} of what validation is measured on: val_dir, or the mixture; what has no tokens for it is told."""
    found = open_mixture(val_dir) if val_dir else mixture
    first = next(iter(mixture))
    next(iter(found)).check_tokenizer(first.data_dir, first.enc)
    measured = {s: share for s, share in found.items() if max_tokens > 1 and any(size > 1 for _, size in s.val)}
    for shards in found.keys() - measured.keys():
        rest = "the validation loss is that of the others" if measured else "there is no validation loss"
        print0(f"{shards.data_dir} has no validation tokens: {rest} (fineweb.py --val_tokens=, or --val_dir=)")
    return {shards: share / sum(measured.values()) for shards, share in measured.items()}


def validate(model, mixture, B, T, max_tokens, autocast, ranks, run, log):
    with autocast:
        result = evaluate_mixture(model, mixture, B, T, max_tokens, **ranks)
    parts = "".join(f" | {folder} {loss:.4f}" for folder, loss in result.get("sources", {}).items())
    print0(
        f"step {run.step:5d} | val loss {result['loss']:.4f} | accuracy {result['accuracy']:.2%} | "
        f"{result['bpb']:.4f} bits per byte{parts}"
    )
    log.record(run.step, "val", result["loss"], **result)
    return result


def print_validation(ckpt, log_dir, where, mixture, B, T, max_tokens, autocast, ranks):
    """Print what evaluate_mixture finds of a checkpoint."""
    if not mixture:
        sys.exit("there is nothing to measure the loss on")
    model, enc = load_model(ckpt, where, log_dir)
    next(iter(mixture)).check_tokenizer(ckpt, enc)
    context = min(T, model.config.block_size)
    with autocast:
        result = evaluate_mixture(model, mixture, B, context, max_tokens, **ranks)
    print0(f"{ckpt} on {' and '.join(shards.data_dir for shards in mixture)}, context {context}:")
    result |= result.pop("sources", {})
    print0(" | ".join(f"{key} {value:,.4f}".removesuffix(".0000") for key, value in result.items()))


def load_eval_items(name, load):
    """load(), the items of an eval; None, after a warning, if a process cannot have them: the run goes on."""
    items, why = None, "another process has none"
    try:
        items = local_first(load)
    except (Exception, SystemExit) as e:
        why = e
    if all_agree(items):
        return items
    print0(f"warning: this run goes without {name}: {why}")


def score(script, kind, items, model, enc, autocast, ranks, with_items, run, log):
    """An eval, the module of its script, as `kind` in the logs; with_items: each item's numbers too."""
    with autocast, any_shape():
        result = script.evaluate(model, enc, items, **ranks)
    print0(f"step {run.step:5d} | {script.summary(result)}")
    numbers = result.pop("items", [])
    log.record(run.step, kind, result[script.SCORE], **result)
    for item in numbers if with_items else []:
        log.note(run.step, f"{kind}_item", **item)
    return result


def time_left(step, last, every, seconds):
    """Seconds from the update of `step` to the end at `last`; None while no update has been timed.

    seconds: {"train" or what is done once in a while: how long it took each time lately}; every: {the latter: steps}.
    """
    left = {kind: last // n - step // n + (last % n > 0) if n else 0 for kind, n in every.items()}
    left["train"] = last - step - 1
    if seconds.get("train"):
        total = sum(left[kind] * statistics.median_low(took) for kind, took in seconds.items())
        return min(total, 1e10)  # which datetime can still say


def write_sample(model, enc, prompt, max_new_tokens, seed, autocast, run, log):
    if is_rank_0() and (run.step > 0 or run.settings["init_from"]):  # of fresh weights it would be noise
        how = {"top_k": 50, "generator": torch.Generator(model.lm_head.weight.device).manual_seed(seed)}
        with autocast, any_shape():
            pieces = stream_text(model, enc, prompt, max_new_tokens, **how)
            text = prompt + "".join(piece for (piece,) in pieces)
        log.note(run.step, "sample", text=text)
        print(f"step {run.step:5d} | sample:\n{text}\n")


def write_exposure(order, run, log):
    if is_rank_0():
        for read in order.exposure(run.exposed // order.T, run.tokens // order.T):
            log.note(run.step, "exposure", **read)
