"""Train a GPT-2 on token shards, on one device or many.

    python train_gpt2.py                                  # no shards yet: a demo of a minute or two on a laptop
    python train_gpt2.py --data_dir=my_shards --B=16      # one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --max_steps=57219
    python train_gpt2.py --preset=modern                  # what came after GPT-2, at its size
    python train_gpt2.py --resume                         # go on where log/ stopped, or start
    python train_gpt2.py --init_from=gpt2 --max_lr=3e-5 --min_lr=3e-6 --warmup_steps=50   # fine-tune
    python train_gpt2.py --eval_only=True --ckpt=gpt2     # validation loss of any model

The defaults are the run of build-nanogpt: GPT-2 124M, 0.5M tokens a step, GPT-3's schedule. Writes to
log/: log.txt ("<step> <kind> <value>" lines), metrics.jsonl (everything else), model_<step>.pt (the
model) and resume.pt (what only training needs). Which tokens are in a step is the same for any number
of processes and any B: see order.py. Step s is logged before its update, so model_00250.pt has had
250 updates and `250 val` is its loss.
"""

import dataclasses
import errno
import functools
import math
import os
import re
import shlex
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import ewok
import hellaswag
import logdir
import parallel
from configurator import configure, current_settings, read_settings
from device import peak_flops, pick_autocast, pick_compile, pick_dtype
from fineweb import write_demo_shards
from model import GPT, GPTConfig, load_model, stream_text
from order import Mixture, TrainOrder, parse_mixture, read_windows, val_windows
from shards import Shards, has_shards, read_meta
from tokenizer import token_byte_lengths, tokenizer_state

# -- settings: override any with --key=value --------------------------------------
preset = "auto"  # tiny, gpt2, modern, gpt2-medium, -large or -xl; auto: gpt2 if there are shards, else tiny
data_dir = "edu_fineweb10B"  # folder of .npy shards written by fineweb.py; a mixture is a:0.7,b:0.3
log_dir = "log"  # where logs and checkpoints go
resume = False  # go on with the run in log_dir, if there is one, with its settings
init_from = ""  # start from these weights: latest, a .pt file, gpt2 ... gpt2-xl, or a Hugging Face folder
eval_only = False  # print the validation loss of ckpt and stop
ckpt = "latest"  # the model to evaluate, in the forms of init_from
seed = 1337  # of the weights and the order of the data
# model
n_layer = 12  # blocks
n_head = 12  # attention heads a block; n_embd / 64 in GPT-2
n_embd = 768  # width
pos = "learned"  # positions: learned or rope
norm = "layernorm"  # or rmsnorm
mlp = "gelu"  # or swiglu (of as many parameters), relu2
qk_norm = False  # RMSNorm on queries and keys
bias = True  # in linear layers and LayerNorms
# batch
B = 64  # micro-batch: sequences a device holds at a time; changes memory and speed, not the result
T = 1024  # context: tokens a sequence
total_batch_size = 524_288  # tokens a step, over all devices and micro-batches
# optimizer and schedule
optimizer = "adamw"  # or muon, for the matrices of the blocks (and AdamW for the rest)
schedule = "cosine"  # or wsd: max_lr, then a cooldown to min_lr; plateau: wsd that ends when it stalls
cooldown_steps = 1900  # of wsd and plateau: linear from max_lr to min_lr
patience = 8  # of plateau: the cooldown begins when so many validation losses have brought no gain of 0.002
max_steps = 19_073  # 1 epoch of 10B tokens at 0.5M tokens a step
warmup_steps = 715  # GPT-3's 375M tokens
max_lr = 6e-4  # GPT-3 124M's
min_lr = 6e-5  # a tenth of it
weight_decay = 0.1  # on matrices and embeddings
beta1 = 0.9  # decay of AdamW's mean of the gradients
beta2 = 0.95  # decay of its mean of their squares
grad_clip = 1.0  # largest norm of the gradient; 0: no limit
# every so many steps; 0: never
eval_every = 250  # validation loss
hellaswag_every = 250  # HellaSwag, as python hellaswag.py scores it
hellaswag_limit = 0  # on only the first so many of its items; 0: all
ewok_every = 250  # EWoK, as python ewok.py scores it
val_tokens = 10_485_760  # tokens it is measured on: the first of the validation shards, or all if fewer
sample_every = 250  # text from the model
sample_prompt = "Hello, I'm a language model,"  # how it starts; empty: <|endoftext|>
sample_tokens = 48  # how long it is
save_every = 5000  # checkpoints
exposure_every = 0  # log/exposure.jsonl: which tokens the model has seen
# what can go wrong
save_minutes = 60.0  # a checkpoint as well when the last one is this old; 0: never
keep_checkpoints = 0  # keep this many model_*.pt, the newest, and the best by validation loss; 0: all
max_bad_steps = 10  # end after so many steps in a row whose loss or gradient is not finite
data_timeout = 60.0  # end when shards are missing and fineweb.py has been silent for so many minutes
# machine
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # bfloat16 where the hardware has it, else float16 on CUDA, else float32
compile = "auto"  # torch.compile: true, false, or auto, which is true on CUDA
fsdp = False  # divide weights, gradients and optimizer among the processes: for models too large for a card
activation_checkpointing = False  # keep less for the backward pass and compute it again: less memory, slower

MODERN = dict(
    pos="rope", norm="rmsnorm", qk_norm=True, bias=False,
    optimizer="muon", schedule="wsd", min_lr=0.0,
)  # fmt: skip

# Sizes from the GPT-2 paper; learning rates from the GPT-3 paper (table 2.1) for the nearest size.
PRESETS = {
    "tiny": MODERN | dict(  # with ReLU^2, since torch's tanh-GELU is slow on CPUs
        n_layer=3, n_head=4, n_embd=128, mlp="relu2", B=16, T=128, total_batch_size=2048,
        max_steps=1100, warmup_steps=20, max_lr=5e-3, schedule="cosine", beta2=0.99,
        eval_every=275, hellaswag_every=0, ewok_every=0, save_every=275,
        sample_every=275, sample_prompt="\n", sample_tokens=160,
    ),
    "modern": MODERN | dict(max_lr=2e-3),
    "gpt2": {},
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, B=32, max_lr=3e-4, min_lr=3e-5),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, B=16, max_lr=2.5e-4, min_lr=2.5e-5),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, B=8, max_lr=2e-4, min_lr=2e-5),
}  # fmt: skip

DEMO_DIR = "demo_data"


def default_settings(given):
    """The settings below the command line's: those of the run to resume, or of the preset."""
    name = given.get("preset", "auto")
    if name not in ("auto", *PRESETS):
        sys.exit(f"--preset={name}: choose auto, {', '.join(PRESETS)}")
    saved = logdir.load_resume(given.get("log_dir", log_dir), mmap=True) if given.get("resume") else None
    if saved:
        return logdir.resumed_settings(saved, given, file_settings)
    found = has_shards(given.get("data_dir", data_dir))
    if name == "auto":
        name = "gpt2" if found or "data_dir" in given else "tiny"
    settings = PRESETS[name] | {"preset": name}
    if name == "tiny" and not found and "data_dir" not in given:
        settings["data_dir"] = DEMO_DIR
    return settings


def file_settings(name):
    """The settings as this file has them, under a preset."""
    return {key: value for key, (value, _) in read_settings(__file__).items()} | PRESETS[name]


def get_lr(step, last_step):
    """The learning rate of a step of a run that ends at last_step: linear warmup, then the schedule.

    wsd is warmup, stable, decay (https://arxiv.org/abs/2404.06395).
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    if step >= last_step:
        return min_lr
    if schedule == "cosine":
        ratio = (step - warmup_steps) / (last_step - warmup_steps)
        return min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (max_lr - min_lr)
    return min_lr + min(1, (last_step - step) / max(1, cooldown_steps)) * (max_lr - min_lr)


def stalled(losses):
    """Whether the best of the last `patience` validation losses is no better, by 0.002, than the best before.

    It is the best of them that counts, so that a spike, or one lucky loss, decides nothing.
    """
    before, recent = losses[:-patience], losses[-patience:]
    return bool(before) and min(recent) > min(before) - 0.002


@torch.no_grad()
def evaluate(model, shards, B, T, max_tokens, autocast, rank=0, world_size=1):
    """Validation loss over the first max_tokens validation tokens, the batches divided among ranks.

    Returns {"loss", "perplexity", "bpb", "tokens"}: nats a token, its exp, bits a UTF-8 byte of the
    text, and how many tokens were predicted.
    """
    device = next(model.parameters()).device
    byte_lengths = np.array(token_byte_lengths(shards.enc))
    windows = val_windows(shards, T, max_tokens)
    if not windows:
        sys.exit(f"{shards.data_dir} has no validation tokens to measure the loss on")
    sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    starts = range(rank * B, len(windows), world_size * B)
    for i in tqdm(starts, desc="validation", leave=False, disable=rank != 0):
        x, y = read_windows(shards, windows[i : i + B], B, T)
        tokens = y[y >= 0]
        with autocast:
            loss = model(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device))
        sums += torch.tensor([loss.item() * len(tokens), len(tokens), byte_lengths[tokens].sum()])
    if world_size > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    nats, tokens, size = sums.tolist()
    loss = nats / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bpb": nats / math.log(2) / max(size, 1),
        "tokens": int(tokens),
    }


def evaluate_sources(model, sources, weights, *args, **ranks):
    """evaluate() on each of the Shards in sources; of a mixture, its mean by weight and all {folder: loss}."""
    results = [evaluate(model, shards, *args, **ranks) for shards in sources]
    if len(results) == 1:
        return results[0]
    mean = {
        key: sum(float(w) * r[key] for w, r in zip(weights, results, strict=True)) for key in ("loss", "bpb")
    }
    return {
        "loss": mean["loss"],
        "perplexity": math.exp(min(mean["loss"], 700)),
        "bpb": mean["bpb"],
        "tokens": sum(r["tokens"] for r in results),
        "sources": {shards.data_dir: r["loss"] for shards, r in zip(sources, results, strict=True)},
    }


# -- the run ------------------------------------------------------------------------


def check_settings():
    """Exit with one line if a number makes no sense."""
    positive = """n_layer n_head n_embd B T total_batch_size patience val_tokens sample_tokens
        max_bad_steps""".split()
    for key, value in current_settings(globals()).items():
        least = 1 if key in positive else 0
        if not isinstance(value, str) and not value >= least:  # which is also true of nan
            sys.exit(f"--{key}={value}: must be at least {least}")
    if seed >= 1 << 63:
        sys.exit(f"--seed={seed}: must be less than 2^63")
    for key, known in (("optimizer", ("adamw", "muon")), ("schedule", ("cosine", "wsd", "plateau"))):
        if globals()[key] not in known:
            sys.exit(f"--{key}={globals()[key]}: choose {', '.join(known)}")
    if schedule == "plateau" and not eval_every:
        sys.exit("--schedule=plateau judges validation losses: it needs --eval_every=")
    if min_lr > max_lr:
        sys.exit(f"--min_lr={min_lr}: is more than --max_lr={max_lr}; use --min_lr={max_lr / 10:g}")
    if max(beta1, beta2) >= 1:
        sys.exit(f"--beta1={beta1} --beta2={beta2}: must be less than 1")


def fit_micro_batch(world_size, given, say):
    """Lower B, unless the command line gives it, until it divides the batch; exits if none does."""
    unit = B * T * world_size
    if total_batch_size % unit == 0:
        return
    fits = [b for b in range(1, B + 1) if total_batch_size % (b * T * world_size) == 0]
    if fits and "B" not in given:
        globals()["B"] = fits[-1]
        return say(f"--B={fits[-1]}, which divides the {total_batch_size} tokens of a step evenly")
    hint = f"--B={fits[-1]}" if fits else f"--total_batch_size={max(1, round(total_batch_size / unit)) * unit}"
    shape = f"B x T x processes = {B} x {T} x {world_size}"
    sys.exit(f"--total_batch_size={total_batch_size} is not a multiple of {shape} = {unit}; try {hint}")


def make_demo_data():
    """Shards to train on where there are none; a run that goes on, or an evaluation, keeps those it has."""
    made = (resume or eval_only) and (read_meta(DEMO_DIR) or {}).get("complete")
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not made:
        print("there are no shards in edu_fineweb10B/ (python fineweb.py makes them), so this is a demo")
        print(f"on {write_demo_shards(DEMO_DIR)['dataset']}")


def load_eval_items(name, load, where, say):
    """The items of an eval; None, after a warning, if a process cannot have them: the run goes on."""
    items, why = None, "another process has none"
    try:
        items = parallel.local_first(load)
    except SystemExit as e:
        why = e
    if not parallel.all_agree(items, where):
        say(f"warning: this run goes without {name}: {why}")
        return None
    return items


def check_tokenizer(name, enc, shards):
    """Exit if the tokenizer enc of `name` is not that of the shards."""
    if tokenizer_state(enc) != tokenizer_state(shards.enc):
        sys.exit(
            f"{name} has the tokenizer {enc.name} ({enc.n_vocab} tokens), {shards.data_dir} has "
            f"{shards.enc.name} ({shards.enc.n_vocab}): make shards with the model's own"
        )


def resume_command(world_size):
    """What to type to go on with this run."""
    script = "train_gpt2.py --resume" + (f" --log_dir={shlex.quote(log_dir)}" if log_dir != "log" else "")
    if world_size == 1:
        return f"python {script}"
    if world_size == int(os.environ["LOCAL_WORLD_SIZE"]):
        return f"torchrun --standalone --nproc_per_node={world_size} {script}"
    return f"the same torchrun command with {script}"


def main(given):
    check_settings()
    rank, world_size, where = parallel.start_processes(device)
    ranks, master = {"rank": rank, "world_size": world_size}, rank == 0
    say = print if master else lambda *args, **kwargs: None
    device_type = where.split(":")[0]
    precision, autocast = pick_dtype(dtype, where), pick_autocast(dtype, where)
    torch.set_float32_matmul_precision("high")

    def to_device(array):
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(where, non_blocking=True) if device_type == "cuda" else tensor.to(where)

    # Data
    if eval_only:
        model, enc = load_model(ckpt, where, log_dir)
    if data_dir == DEMO_DIR and "data_dir" not in given:
        parallel.local_first(make_demo_data)
    mixture = parse_mixture(data_dir)
    sources, weights = [Shards(folder) for folder in mixture], list(mixture.values())
    shards = sources[0]
    for other in sources[1:]:
        check_tokenizer(shards.data_dir, shards.enc, other)
    if eval_only:
        check_tokenizer(ckpt, enc, shards)
        context = min(T, model.config.block_size)
        result = evaluate_sources(model, sources, weights, B, context, val_tokens, autocast, **ranks)
        say(f"{ckpt} on {data_dir}, context {context}:")
        result |= result.pop("sources", {})
        say(" | ".join(f"{key} {value:,.4f}".removesuffix(".0000") for key, value in result.items()))
        return
    fit_micro_batch(world_size, given, say)
    orders = [TrainOrder(source, T, seed) for source in sources]
    order = orders[0] if len(orders) == 1 else Mixture(orders, weights)
    sequences = total_batch_size // T  # in a step
    grad_accum_steps = sequences // (B * world_size)

    # Model and optimizer: of the run to resume, around given weights, or fresh
    torch.manual_seed(seed)
    saved = logdir.load_resume(log_dir) if resume else None
    source = logdir.model_path(log_dir, saved["step"]) if saved else init_from
    if source:
        raw_model, enc = load_model(source, "cpu" if fsdp else where, log_dir)
        check_tokenizer(source, enc, shards)
        if raw_model.config.block_size < T:
            sys.exit(f"--T={T} is more than {source}'s context: use --T={raw_model.config.block_size}")
    else:
        enc = shards.enc
        config = GPTConfig(T, enc.n_vocab, n_layer, n_head, n_embd, pos, norm, mlp, qk_norm, bias)
        raw_model = GPT(config)
    compiled, sharded = pick_compile(compile, where), fsdp and world_size > 1
    if sharded:
        if precision == torch.float16:
            sys.exit("--fsdp=True: not in float16; use --dtype=bfloat16 or float32")
        parallel.shard(raw_model, precision, compiled)  # which takes it to the device as well
    raw_model.to(where).train()
    raw_model.activation_checkpointing = activation_checkpointing
    optimizers = raw_model.configure_optimizers(weight_decay, max_lr, (beta1, beta2), optimizer)
    scaler = torch.amp.GradScaler(device_type, enabled=precision == torch.float16)
    start_step, evaluated_step = 0, None
    first_sequence = 0  # of the data, for start_step
    exposed = 0  # sequences in exposure.jsonl
    bad_steps = 0  # in a row, whose loss or gradient was not finite
    last_step = max_steps  # of the run; plateau can make it an earlier one
    val_losses = []  # for plateau
    if saved:
        logdir.check_resumption(log_dir, saved, mixture, sources, None if "dtype" in given else str(precision))
        start_step, evaluated_step, bad_steps = saved["step"], saved["evaluated_step"], saved["bad_steps"]
        first_sequence, exposed = -(-saved["tokens"] // T), -(-saved["exposed"] // T)
        logdir.restore_optimizers(log_dir, optimizers, saved["optimizers"])
        last_step, val_losses = min(max_steps, saved["last_step"] or max_steps), saved["val_losses"]
        if saved["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"])
        say(f"resuming {log_dir} at step {start_step}{logdir.changes(saved, given)}")
    if not parallel.all_agree(start_step == parallel.from_rank_0(start_step, where), where):
        sys.exit(f"{log_dir}: is at step {start_step} for process {rank}, which not all processes have")
    model = torch.compile(raw_model) if compiled and not sharded else raw_model
    train_model = model
    if world_size > 1 and not sharded:
        train_model = DDP(model, device_ids=[where] if device_type == "cuda" else None)

    name, peak = peak_flops(where, precision)
    flops_per_token = raw_model.flops_per_token(T)
    say(f"{world_size} x {name}, {str(precision)[6:]}, compile {'on' if compiled else 'off'}")
    say(f"{raw_model.num_params() / 1e6:.2f}M parameters, context {T}, tokenizer {enc.name}")
    say(f"{total_batch_size:,} tokens a step ({grad_accum_steps} x {B} x {T} on each device)")
    for source, weight in zip(orders, weights, strict=True):
        share = f", {float(weight):.2%} of the tokens" if len(orders) > 1 else ""
        steps = source.per_epoch / sequences / float(weight)
        say(f"{steps:,.1f} steps an epoch of {source.shards.data_dir}{share}")

    # What to evaluate on, the log, and how to stop
    hellaswag_items, ewok_items = None, None
    if hellaswag_every:
        load = functools.partial(hellaswag.load_items, limit=hellaswag_limit)
        hellaswag_items = load_eval_items("HellaSwag", load, where, say)
    if ewok_every:
        ewok_items = load_eval_items("EWoK", ewok.load_items, where, say)
    log = logdir.LogDir(log_dir, saved, resume) if master else None
    record = log.record if master else lambda *args, **kwargs: None
    settings = current_settings(globals())
    if master and not saved:
        about = {
            "tokenizer": enc.name,
            "dataset": " + ".join(str(source.dataset) for source in sources),
            "parameters": raw_model.num_params(),
        }
        log.note(0, "run", **about, settings={key: settings[key] for key in logdir.LEARNING})
    last_save, saved_at = (start_step, evaluated_step) if saved else None, time.monotonic()
    del saved

    def due(every, step):
        return every > 0 and (step % every == 0 or step == last_step)

    stop_requests = []  # (signal, when): Ctrl-C, a scheduler's SIGTERM or, ahead of it, SIGUSR1

    def request_stop(signum, frame):
        stop_requests.append((signum, time.monotonic()))
        times = [at for number, at in stop_requests if number == signal.SIGINT]
        if signum == signal.SIGINT and times[-1] - times[0] > 1:  # sooner, it may be torchrun that passes it on
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        if master:  # print() must not be called again while it is at work
            os.write(1, b"\nstopping after this step; a second Ctrl-C stops at once\n")

    def asked_to_stop():
        return not parallel.all_agree(not stop_requests, where)

    def all_complete():
        return parallel.all_agree(all(source.complete for source in sources), where)

    for signal_name in {"SIGINT", "SIGTERM", "SIGUSR1"} & set(dir(signal)):
        signal.signal(getattr(signal, signal_name), request_stop)
    stopping, save_now = False, False
    waiting = not all_complete()  # for more shards to come
    for source in sources:
        if not source.complete:
            found = f"{len(source.train)} training shards now, more as fineweb.py goes on"
            say(f"{source.data_dir} is not complete: {found}")

    if start_step > max_steps:
        say(f"nothing to do: the run is at step {start_step}, --max_steps={max_steps}")
    for step in range(start_step, max_steps + 1):
        sequence = first_sequence + (step - start_step) * sequences  # the first of this step
        abandoned = False
        if waiting and not stopping and step < max_steps:
            last, told = sequence + sequences - 1, False
            while not (parallel.all_agree(order.has(last), where) or stopping):  # none waits alone
                if not told:
                    there = ", ".join(f"{len(s.train)} in {s.data_dir}" for s in sources if not s.complete)
                    say(f"waiting for fineweb.py to write the next training shard: there are {there}")
                told = True
                time.sleep(5)
                stopping = asked_to_stop()
                abandoned = not stopping and not parallel.all_agree(order.silence() < 60 * data_timeout, where)
                stopping = stopping or abandoned
            waiting = not all_complete()
        val_loss = None  # of this step, if it is measured

        # Once in a while: the validation loss, the evals, a sample, what has been read
        kinds = (eval_every, hellaswag_every, ewok_every, sample_every, exposure_every)
        if evaluated_step != step and not stopping and any(due(every, step) for every in kinds):
            parallel.gather(raw_model)
            if due(eval_every, step) and all(source.val for source in sources):
                result = evaluate_sources(model, sources, weights, B, T, val_tokens, autocast, **ranks)
                val_loss, each = result["loss"], result.get("sources", {})
                parts = "".join(f" | {folder} {loss:.4f}" for folder, loss in each.items())
                say(f"step {step:5d} | val loss {val_loss:.4f} | {result['bpb']:.4f} bits per byte{parts}")
                record(step, "val", val_loss, **result)
                stopping = asked_to_stop()
            if due(hellaswag_every, step) and hellaswag_items and not stopping:
                with autocast:
                    result = hellaswag.evaluate(raw_model, enc, hellaswag_items, **ranks)
                say(f"step {step:5d} | HellaSwag {result['acc_norm']:.2%} acc_norm | {result['acc']:.2%} acc")
                record(step, "hella", result["acc_norm"], **result)
                stopping = asked_to_stop()
            if due(ewok_every, step) and ewok_items and not stopping:
                with autocast:
                    result, _ = ewok.evaluate(raw_model, enc, ewok_items, **ranks)
                say(f"step {step:5d} | EWoK {result['context']:.4f} | {result['target_mean']:.4f} target_mean")
                record(step, "ewok", result["context"], **result)
                stopping = asked_to_stop()
            if not stopping:  # else all of it is done again when the run goes on
                if due(sample_every, step) and master:
                    how = {"top_k": 50, "generator": torch.Generator(where).manual_seed(seed)}
                    with autocast:
                        pieces = stream_text(raw_model, enc, sample_prompt, sample_tokens, **how)
                        text = sample_prompt + "".join(piece for (piece,) in pieces)
                    log.note(step, "sample", text=text)
                    say(f"step {step:5d} | sample:\n{text}\n")
                if due(exposure_every, step) and master and step:
                    for read in order.exposure(exposed, sequence):
                        log.note(step, "exposure", file="exposure.jsonl", **read)
                    exposed = sequence
                if val_loss is not None:
                    val_losses.append(val_loss)
                    cooling = step >= last_step - cooldown_steps
                    if schedule == "plateau" and step >= warmup_steps and not cooling and stalled(val_losses):
                        last_step = step + cooldown_steps
                        say(f"step {step:5d} | val loss has stalled: cooling down until step {last_step}")
                evaluated_step = step
            parallel.release(raw_model)

        # Save what the next process needs to go on as if nothing had happened
        save_now = save_now or stopping or step == last_step or (step and due(save_every, step))
        if save_now and (step, evaluated_step) != last_save:
            logdir.check_finite(log_dir, step, parallel.all_finite(raw_model.parameters(), where))
            weights_now, optimizers_now = parallel.state_dicts(raw_model, optimizers)
            if master:
                model_state = {
                    "model": weights_now,
                    "config": dataclasses.asdict(raw_model.config),
                    "step": step,
                    "val_loss": val_loss,
                    "settings": settings,
                    "tokenizer": tokenizer_state(enc),
                }
                resume_state = {
                    "step": step,
                    "evaluated_step": evaluated_step,
                    "tokens": sequence * T,
                    "exposed": exposed * T,
                    "bad_steps": bad_steps,
                    "data": logdir.describe_data(mixture, sources),
                    "settings": settings,
                    "defaults": file_settings(preset),
                    "precision": str(precision),
                    "optimizers": optimizers_now,
                    "last_step": last_step if last_step < max_steps else None,
                    "val_losses": val_losses,
                    "scaler": scaler.state_dict(),
                    "rng": torch.get_rng_state(),
                }
                say(f"step {step:5d} | saved {log.save(model_state, resume_state, keep_checkpoints)}")
            last_save, saved_at = (step, evaluated_step), time.monotonic()
        save_now = False
        if stopping or step == last_step:
            parallel.wait_for_all()  # gloo aborts a process that ends while rank 0 still saves
            if abandoned:
                sys.exit(
                    f"{data_dir}: no sign of fineweb.py for {data_timeout:g} minutes; the run is saved: start "
                    f"fineweb.py again, then {resume_command(world_size)}"
                )
            if stopping:
                say(f"stopped; go on with: {resume_command(world_size)}")
            else:
                say(f"done; see what it writes: python sample.py --log_dir={log_dir}")
            break

        # The update: forward and backward for each micro-batch, then one step of the optimizers
        t0 = time.perf_counter()
        lr = get_lr(step, last_step)
        sums = torch.zeros(3, device=where)  # of the loss, of requests to stop, of wishes to save
        for micro_step, rows in enumerate(order.batches(sequence, sequences, B, rank, world_size)):
            rows = to_device(rows)  # (B, T + 1)
            train_model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            with pick_autocast(dtype, where, cache=False):
                loss = train_model(rows[:, :-1], rows[:, 1:])
            sums[0] += loss.detach()
            scaler.scale(loss / grad_accum_steps).backward()
        for opt in optimizers:
            scaler.unscale_(opt)
        grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
        grad_norm = (grad_norm.full_tensor() if sharded else grad_norm).item()
        sums[1] = len(stop_requests)
        sums[2] = master and save_minutes > 0 and time.monotonic() - saved_at >= 60 * save_minutes
        if world_size > 1:
            dist.all_reduce(sums)
        loss, stops, saves = sums.tolist()
        loss /= grad_accum_steps * world_size
        stopping, save_now = stops > 0, saves > 0
        bad = not (math.isfinite(loss) and math.isfinite(grad_norm))
        bad_steps = bad_steps + 1 if bad else 0
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = lr
            if not bad:
                parallel.step_optimizer(opt, scaler)
            opt.zero_grad(set_to_none=True)
        scaler.update()

        seconds = time.perf_counter() - t0
        speed = total_batch_size / seconds
        seen = sequence + sequences
        more = {"tokens": seen * T, "epoch": order.epochs(seen)}
        mfu = ""
        if peak:
            more["mfu"] = flops_per_token * speed / (peak * world_size)
            mfu = f" | mfu {100 * more['mfu']:.1f}%"
        say(
            f"step {step:5d} | loss {loss:.6f} | lr {lr:.4e} | norm {grad_norm:.4f} | "
            f"{1000 * seconds:.0f}ms | {speed:,.0f} tok/s{mfu}"
        )
        if bad:
            more["skipped"] = list(order.exposure(sequence, seen))
            data = ", ".join(
                f"epoch {r['epoch']} {r['shard']} tokens {r['tokens'][0][0]} to {r['tokens'][-1][1]} "
                f"({len(r['tokens'])} ranges, in metrics.jsonl)"
                for r in more["skipped"]
            )
            say(f"step {step:5d} | not finite: no update, {bad_steps} in a row; the data: {data}")
        more |= {"loss": loss, "lr": lr, "grad_norm": grad_norm, "seconds": seconds, "tokens_per_second": speed}
        record(step, "train", loss, **more)
        if bad_steps >= max_bad_steps:
            sys.exit(
                f"step {step}: {bad_steps} steps in a row were not finite, the last on {data}; "
                f"{logdir.last_good(log_dir)}; try a lower --max_lr, or other data with --seed="
            )


def explain(e):
    """The line for an error that is no fault of the code, None for others."""
    if isinstance(e, RuntimeError) and re.search("out of memory|can't allocate|not enough memory", str(e)):
        hint = f"try --B={B // 2}" if B > 1 else "it needs a smaller model or --T"
        return f"out of memory with --B={B}: {hint}; total_batch_size, and so the result, stays the same"
    if isinstance(e, dist.DistError) or (isinstance(e, RuntimeError) and "gloo" in str(e)):
        return f"process {os.environ.get('RANK')} lost the others: {str(e).partition(chr(10))[0]}"
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
        return f"{e.filename or log_dir}: {e.strerror}; what was saved before is whole: mend it, then --resume"


if __name__ == "__main__":
    try:
        try:
            main(configure(globals(), default_settings))
        except Exception as e:
            line = explain(e)
            if not line:
                raise
            sys.exit(line)
    except SystemExit as e:
        if e.code and int(os.environ.get("RANK", 0)) > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)  # most likely rank 0 says why, and torchrun ends this one: one line is enough
        raise
    parallel.end_processes()
