"""Periodic measurements during a run: validation loss, evals, samples, tokens read.

The settings decide when, and all ranks call these functions. validate, run_eval, write_sample and
write_exposure print and log their result.

An eval is a script like hellaswag.py that is in train_gpt2.py's EVALS and has a setting there,
<script>_every (<script>_limit and <script>_items, if it has them, are passed on). It has
    NAME, KIND             its name, and its kind in log.txt
    MAIN_METRIC            the key of evaluate()'s result that goes to log.txt
    load_items(limit=)     a list
    evaluate(model, enc, items, rank=, world_size=)
                           a dict of plain values, the same on every rank; "items" can hold a dict
                           for each item; score_on_all_ranks() splits the work
    summary(result)        one line
"""

import contextlib
import dataclasses
from functools import partial
import math
import statistics
import time

from data.loader import open_sources, read_windows, val_windows
from data.tokenizer import encode, token_byte_lengths
from device import eager_mode
from model import GPT, load_model
from script import UserError, is_rank_0, print0
from training.distributed import (
    Interrupted,
    all_true,
    local_main_process_first,
    on_all_ranks,
    reshard,
    sum_over_ranks,
    unshard,
)

import numpy as np
import tiktoken
import torch
from tqdm import tqdm


@dataclasses.dataclass
class TaskContext:
    """What every periodic task of a run needs."""

    model: GPT
    enc: tiktoken.Encoding
    autocast: contextlib.AbstractContextManager
    rank: int = 0
    world_size: int = 1


@dataclasses.dataclass
class Validation:
    """What the validation loss is measured on: max_tokens validation tokens of each source."""

    sources: dict  # {Shards: weight}
    B: int
    T: int
    max_tokens: int


# -- validation loss ----------------------------------------------------------------
@torch.no_grad()
def validation_loss(model, shards, B, T, max_tokens, rank=0, world_size=1):
    """Validation loss over the first max_tokens validation tokens, batches split over ranks.

    Returns {"loss", "accuracy", "bpb", "tokens", "perplexity"}: nats per token, next-token
    accuracy, bits per UTF-8 byte of the text, the number of tokens predicted, and exp(loss). Runs
    under the caller's autocast.
    """
    device = model.lm_head.weight.device
    byte_lengths = np.array(token_byte_lengths(shards.enc))
    # Windows are dealt out to the ranks B at a time.
    windows = val_windows(shards, T, max_tokens)
    sums = torch.zeros(4, dtype=torch.float64)  # nats, correct, tokens, bytes
    starts = range(rank * B, len(windows), world_size * B)

    def add_batches():
        for i in tqdm(starts, desc="validation", leave=False, disable=rank != 0):
            x, y = read_windows(shards, windows[i : i + B], B, T)
            # The last window of a shard is padded with targets of -1.
            targets = y[y >= 0]
            x = torch.from_numpy(x).to(device)
            y = torch.from_numpy(y).to(device)
            # The means of a batch, back to sums: batches differ in size.
            loss, accuracy = model(x, y, with_accuracy=True)
            nats = len(targets) * loss.item()
            correct = len(targets) * accuracy.item()
            sums.add_(torch.tensor([nats, correct, len(targets), byte_lengths[targets].sum()]))

    on_all_ranks(add_batches, is_interruptible=True)
    # Sums over ranks, then means.
    nats, correct, tokens, num_bytes = sum_over_ranks(sums).tolist()
    loss = nats / tokens
    # The exponential of a diverged loss would overflow.
    return {
        "loss": loss,
        "accuracy": correct / tokens,
        "bpb": nats / math.log(2) / max(num_bytes, 1),
        "tokens": int(tokens),
        "perplexity": math.exp(min(loss, 700)),
    }


def mean_validation_loss(model, validation, rank=0, world_size=1):
    """validation_loss() of a Validation.

    With several sources, returns the weighted means, and "sources": {folder: loss}.
    """
    v = validation
    results = {}
    for shards in v.sources:
        result = validation_loss(model, shards, v.B, v.T, v.max_tokens, rank, world_size)
        results[shards.data_dir] = result
    # One folder: its result. Several: the mean by weight, and each folder's loss.
    if len(results) == 1:
        return result
    means = {"loss": 0.0, "accuracy": 0.0, "bpb": 0.0, "tokens": 0}
    for shards, weight in v.sources.items():
        result = results[shards.data_dir]
        for key in ("loss", "accuracy", "bpb"):
            means[key] += float(weight) * result[key]
        means["tokens"] += result["tokens"]
    means["perplexity"] = math.exp(min(means["loss"], 700))
    means["sources"] = {folder: result["loss"] for folder, result in results.items()}
    return means


def validation_sources(train_sources, val_dir, max_tokens):
    """{Shards: weight} to measure the validation loss on: of val_dir, or else of train_sources.

    Warns about sources without validation tokens, and leaves them out.
    """
    candidates = open_sources(val_dir) if val_dir else train_sources
    # The model has the tokenizer of the training shards: the others must have it too.
    first, *_ = train_sources
    next(iter(candidates)).check_tokenizer(first.data_dir, first.enc)
    sources = {}
    for shards, weight in candidates.items():
        if max_tokens > 1 and any(size > 1 for _, size in shards.val):
            sources[shards] = weight
    for shards in candidates:
        if shards not in sources:
            consequence = "there is no validation loss"
            if sources:
                consequence = "the validation loss is that of the others"
            print0(
                f"{shards.data_dir} has no validation tokens: {consequence} "
                "(fineweb.py --val_tokens=, or --val_dir=)"
            )
    total = sum(sources.values())
    return {shards: weight / total for shards, weight in sources.items()}


def validate(context, validation, run, log):
    with context.autocast:
        result = mean_validation_loss(context.model, validation, context.rank, context.world_size)
    line = f"step {run.step:5d} | val loss {result['loss']:.4f}"
    line += f" | accuracy {result['accuracy']:.2%} | {result['bpb']:.4f} bits per byte"
    for folder, loss in result.get("sources", {}).items():
        line += f" | {folder} {loss:.4f}"
    print0(line)
    log.log_metric(run.step, "val", result["loss"], result)
    return result


def print_validation(ckpt, log_dir, device, validation, autocast, rank, world_size):
    """Print the validation loss of a checkpoint."""
    if not validation.sources:
        raise UserError("there is nothing to measure the loss on")
    model, enc = load_model(ckpt, device, log_dir)
    next(iter(validation.sources)).check_tokenizer(ckpt, enc)
    T = min(validation.T, model.config.block_size)
    validation = dataclasses.replace(validation, T=T)
    with autocast:
        result = mean_validation_loss(model, validation, rank, world_size)
    folders = " and ".join(shards.data_dir for shards in validation.sources)
    print0(f"{ckpt} on {folders}, context {T}:")
    for folder, loss in result.pop("sources", {}).items():
        result[folder] = loss
    numbers = [f"{key} {value:,.4f}".removesuffix(".0000") for key, value in result.items()]
    print0(" | ".join(numbers))


# -- evals --------------------------------------------------------------------------
def load_eval_items(script, limit):
    """The items of an eval. Returns None, with a warning, if any rank cannot load them."""
    # The first process of a machine downloads the items; all must have them.
    items = None
    reason = "another process has no items"
    try:
        items = local_main_process_first(lambda: script.load_items(limit=limit))
    except Exception as e:
        reason = e
    if all_true(items):
        return items
    print0(f"warning: this run continues without {script.NAME}: {reason}")
    return None


def run_eval(context, script, items, log_items, run, log):
    """Run an eval (the module of its script); log_items: log each item's numbers too."""
    with context.autocast, eager_mode():
        result = script.evaluate(
            context.model, context.enc, items, rank=context.rank, world_size=context.world_size
        )
    print0(f"step {run.step:5d} | {script.summary(result)}")
    # Per-item results go to their own file, and only if asked for.
    item_results = result.pop("items", [])
    log.log_metric(run.step, script.KIND, result[script.MAIN_METRIC], result)
    if log_items:
        for item in item_results:
            log.log_event(run.step, f"{script.KIND}_item", item)
    return result


def write_sample(context, prompt, max_new_tokens, seed, run, log):
    """Print and log a sample of the model."""
    # Fresh weights would only make noise.
    if run.step == 0 and not run.settings["init_from"]:
        return
    # The same prompt and the same seed each time, so that samples can be compared.
    enc = context.enc
    device = context.model.lm_head.weight.device
    ids = encode(enc, prompt, allow_eot=True).tolist() or [enc.eot_token]
    idx = torch.tensor([ids], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    new_ids = []

    def generate():
        if not is_rank_0():
            return
        with context.autocast, eager_mode():
            for token in context.model.generate(
                idx, max_new_tokens, vocab_size=enc.n_vocab, top_k=50, generator=generator
            ):
                if token.item() == enc.eot_token:
                    break
                new_ids.append(token.item())

    on_all_ranks(generate, is_interruptible=True)
    text = prompt + enc.decode(new_ids)
    log.log_event(run.step, "sample", {"text": text})
    print0(f"step {run.step:5d} | sample:\n{text}\n")


def write_exposure(loader, run, log):
    """Log which tokens the model has seen since the last time."""
    if is_rank_0():
        first = run.exposed_tokens // loader.T
        for ranges in loader.exposure(first, run.tokens // loader.T):
            log.log_event(run.step, "exposure", ranges)


# -- what is due when ---------------------------------------------------------------
def is_due(every, run):
    """Whether something is due at this step of a Run: every N steps, and at the end."""
    return every > 0 and (run.step % every == 0 or run.step == run.settings["max_steps"])


def periodic_tasks(s, eval_scripts, context, validation, loader):
    """{kind: (every N steps, function of (run, log))}: the periodic tasks of a run.

    s: its settings. The tasks are run in this order. To add an eval, see the top of this file.
    """
    tasks = {}
    if validation.sources:
        tasks["val"] = (s["eval_every"], partial(validate, context, validation))
    for script in eval_scripts:
        # The settings of an eval have its script's name in theirs.
        every = s[f"{script.__name__}_every"]
        limit = s.get(f"{script.__name__}_limit", 0)
        log_items = s.get(f"{script.__name__}_items", False)
        items = load_eval_items(script, limit) if every else None
        if items:
            tasks[script.KIND] = (every, partial(run_eval, context, script, items, log_items))
    # Last come those that need no validation data and no items.
    prompt = s["sample_prompt"]
    sample = partial(write_sample, context, prompt, s["sample_tokens"], s["seed"])
    tasks["sample"] = (s["sample_every"], sample)
    tasks["exposure"] = (s["exposure_every"], partial(write_exposure, loader))
    tasks["plot"] = (s["plot_every"], lambda run, log: log.plot())
    return tasks


def run_due_tasks(tasks, context, run, log, stop, recent_times):
    """Run the tasks that are due at this step; recent_times[kind] gets the seconds that each takes.

    Returns (validation loss or None, whether a process has been asked to stop). If that skips a
    task, all of them are repeated when the run is resumed.
    """
    # What is due at this step?
    due = {kind: task for kind, (every, task) in tasks.items() if is_due(every, run)}
    if not due:
        return None, False
    results = {}
    interrupted = False
    unshard(context.model)  # with FSDP, rank 0 generates text alone and needs the whole model
    try:
        for kind, task in due.items():
            start = time.monotonic()
            results[kind] = task(run, log)
            recent_times[kind].append(time.monotonic() - start)
            stop.check()
    except Interrupted:
        interrupted = True
    finally:
        reshard(context.model)
    if len(results) == len(due):
        run.evaluated_step = run.step
        if "exposure" in due:
            run.exposed_tokens = run.tokens
    val_loss = results["val"]["loss"] if "val" in results else None
    return val_loss, interrupted


def times_until(max_steps, step, every):
    """How many times a task is due after `step`: at multiples of `every`, and at max_steps."""
    if every <= 0:
        return 0
    at_end = 1 if max_steps % every else 0
    return max_steps // every - step // every + at_end


def estimate_eta(step, max_steps, intervals, recent_times):
    """Seconds from the update of `step` to max_steps; None before any update is timed.

    recent_times: {"train" or a task: its last durations}; intervals: {task: every N steps}.
    """
    if not recent_times.get("train"):
        return None
    total = 0.0
    for kind, times in recent_times.items():
        if kind == "train":
            count = max_steps - step - 1
        else:
            count = times_until(max_steps, step, intervals[kind])
        total += count * statistics.median_low(times)
    return min(total, 1e10)  # what datetime.timedelta can hold
