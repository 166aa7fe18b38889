"""Train a GPT-2 on token shards, on one device or many.

    python train_gpt2.py                                  # no shards yet: a demo of a minute on a laptop
    python train_gpt2.py --data_dir=my_shards --B=16      # one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --max_steps=57219
    python train_gpt2.py --resume                         # go on where log/ stopped
    python train_gpt2.py --init_from=gpt2 --max_lr=3e-5 --min_lr=3e-6 --warmup_steps=50   # fine-tune
    python train_gpt2.py --eval_only=True --ckpt=gpt2     # validation loss of any model

The defaults are the run of build-nanogpt: GPT-2 124M, 0.5M tokens a step, GPT-3's schedule. Writes to
log/: log.txt ("<step> <kind> <value>" lines), metrics.jsonl (everything else), model_<step>.pt (the
model) and resume.pt (what only training needs). Which tokens are in a step is the same for any number
of processes and any B: see shards.py. Step s is logged before its update, so model_00250.pt has had
250 updates and `250 val` is its loss.
"""

import dataclasses
import functools
import json
import math
import os
import re
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
from configurator import configure, current_settings
from fineweb import write_demo_shards
from model import (
    GPT,
    GPTConfig,
    load_checkpoint,
    load_model,
    local_first,
    pick_autocast,
    pick_dtype,
    start_processes,
    stream_text,
)
from shards import Shards, TrainOrder, has_shards, read_windows, val_windows, write_whole
from tokenizer import token_byte_lengths, tokenizer_state

# -- settings: override any with --key=value --------------------------------------
preset = "auto"  # tiny, gpt2, gpt2-medium, gpt2-large, gpt2-xl; auto: gpt2 if data_dir has shards, else tiny
data_dir = "edu_fineweb10B"  # folder of .npy shards written by fineweb.py
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
# batch
B = 64  # micro-batch: sequences a device holds at a time; changes memory and speed, not the result
T = 1024  # context: tokens a sequence
total_batch_size = 524_288  # tokens a step, over all devices and micro-batches
# optimizer: AdamW, linear warmup, then a cosine from max_lr to min_lr
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
# machine
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # bfloat16 where the hardware has it, else float16 on CUDA, else float32
compile = "auto"  # torch.compile: true, false, or auto, which is true on CUDA

# Sizes from the GPT-2 paper; learning rates from the GPT-3 paper (table 2.1) for the nearest size.
PRESETS = {
    "tiny": dict(
        n_layer=3, n_head=2, n_embd=128, B=12, T=64, total_batch_size=768,
        max_steps=3000, warmup_steps=100, max_lr=4e-3, min_lr=1e-4, beta2=0.99,
        eval_every=500, hellaswag_every=0, ewok_every=0, save_every=1000,
        sample_every=500, sample_prompt="\n", sample_tokens=160,
    ),
    "gpt2": {},
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, B=32, max_lr=3e-4, min_lr=3e-5),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, B=16, max_lr=2.5e-4, min_lr=2.5e-5),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, B=8, max_lr=2e-4, min_lr=2e-5),
}  # fmt: skip

# Dense bfloat16 FLOP/s (float16 before Ampere) from NVIDIA's data sheets, for MFU, by a word of the name.
PEAK_FLOPS = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12,
    "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip

DEMO_DIR = "demo_data"


def default_settings(given):
    """The settings below the command line's: those of the run to resume, or of the preset."""
    resume_path = os.path.join(given.get("log_dir", log_dir), "resume.pt")
    name = given.get("preset", "auto")
    if name not in ("auto", *PRESETS):
        sys.exit(f"--preset={name}: choose auto, {', '.join(PRESETS)}")
    if given.get("resume") and os.path.exists(resume_path):
        saved = load_checkpoint(resume_path, mmap=True)["settings"]
        for key in ("n_layer", "n_head", "n_embd"):
            if given.get(key, saved[key]) != saved[key]:
                sys.exit(f"--{key}={given[key]}: the run to resume has {key}={saved[key]}; leave it out")
        return {key: value for key, value in saved.items() if key not in ("log_dir", "resume")}
    found = has_shards(given.get("data_dir", data_dir))
    if name == "auto":
        name = "gpt2" if found or "data_dir" in given else "tiny"
    settings = PRESETS[name] | {"preset": name}
    if name == "tiny" and not found and "data_dir" not in given:
        settings["data_dir"] = DEMO_DIR
    return settings


# -- parts of a step ----------------------------------------------------------------


def get_lr(step):
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    if step >= max_steps:
        return min_lr
    ratio = (step - warmup_steps) / (max_steps - warmup_steps)
    return min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (max_lr - min_lr)


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


# -- the log folder -----------------------------------------------------------------

LOGS = ("log.txt", "metrics.jsonl", "exposure.jsonl")


def start_log(log_dir):
    """Make the folder; the files of an earlier run in it move to log_dir/old_<n>."""
    os.makedirs(log_dir, exist_ok=True)
    names = os.listdir(log_dir)
    old = [name for name in names if name in (*LOGS, "resume.pt") or name.startswith("model_")]
    if old:
        aside = os.path.join(log_dir, f"old_{1 + sum(name.startswith('old_') for name in names)}")
        os.makedirs(aside)
        for name in old:
            os.rename(os.path.join(log_dir, name), os.path.join(aside, name))
        print(f"{log_dir}/ held an earlier run: moved to {aside}/ (--resume would have gone on with it)")


def rewind_log(log_dir, step, evaluated_step):
    """Drop what was logged behind the state that resume.pt holds: the resumed run writes it again."""

    def comes_before(line):
        try:
            if line.startswith("{"):
                record = json.loads(line)
                at, kind = record["step"], record.get("kind")
            else:
                at, kind, _ = line.split()
            return int(at) < step or (int(at) == step == evaluated_step and kind != "train")
        except ValueError:  # cut short by a crash
            return False

    for path in (os.path.join(log_dir, name) for name in LOGS):
        if os.path.exists(path):
            with open(path) as f:
                lines = [line for line in f if comes_before(line)]
            write_whole(path, lambda f, lines=lines: f.write("".join(lines).encode()))


def check_settings():
    """Exit with one line if a number makes no sense."""
    positive = "n_layer n_head n_embd B T total_batch_size val_tokens sample_tokens".split()
    at_least_0 = (
        "seed max_steps warmup_steps max_lr min_lr weight_decay beta1 beta2 grad_clip eval_every".split()
    )
    at_least_0 += "hellaswag_every hellaswag_limit ewok_every sample_every save_every exposure_every".split()
    for least, keys in ((1, positive), (0, at_least_0)):
        for key in keys:
            if not globals()[key] >= least:  # which is also true of nan
                sys.exit(f"--{key}={globals()[key]}: must be at least {least}")
    if min_lr > max_lr:
        sys.exit(f"--min_lr={min_lr}: is more than --max_lr={max_lr}; use --min_lr={max_lr / 10:g}")
    if max(beta1, beta2) >= 1:
        sys.exit(f"--beta1={beta1} --beta2={beta2}: must be less than 1")


def indivisible_batch(world_size):
    """The message for a total_batch_size that B x T x world_size does not divide."""
    fits = [b for b in range(1, B + 1) if total_batch_size % (b * T * world_size) == 0]
    unit = B * T * world_size
    hint = f"--B={fits[-1]}" if fits else f"--total_batch_size={max(1, round(total_batch_size / unit)) * unit}"
    shape = f"B x T x processes = {B} x {T} x {world_size}"
    return f"--total_batch_size={total_batch_size} is not a multiple of {shape} = {unit}; try {hint}"


def shard_sizes(shards):
    """[file, tokens] of each training shard: enough to notice that a run would go on with other data."""
    return [[os.path.basename(path), size] for path, size in shards.train]


def use_compile(device_type):
    choices = {"auto": device_type == "cuda", "true": True, "1": True, "false": False, "0": False}
    if compile.lower() not in choices:
        sys.exit(f"--compile={compile}: choose auto, true or false")
    return choices[compile.lower()]


def make_demo_data():
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not ((resume or eval_only) and has_shards(DEMO_DIR)):
        print("there are no shards in edu_fineweb10B/ (python fineweb.py makes them), so this is a demo")
        print(f"on {write_demo_shards(DEMO_DIR)['dataset']}")


def all_agree(yes, where):
    """Whether `yes` is true on every rank."""
    yes = torch.tensor(bool(yes), dtype=torch.int, device=where)
    if dist.is_initialized():
        dist.all_reduce(yes, op=dist.ReduceOp.MIN)
    return yes.item() == 1


def load_eval_items(name, load, where, say):
    """The items of an eval; None, after a warning, if a process cannot have them: the run goes on."""
    items, why = None, "another process has none"
    try:
        items = local_first(load)
    except SystemExit as e:
        why = e
    if not all_agree(items, where):
        say(f"warning: this run goes without {name}: {why}")
        return None
    return items


def check_tokenizer(name, enc, shards):
    if tokenizer_state(enc) != tokenizer_state(shards.enc):
        sys.exit(
            f"{name} has the tokenizer {enc.name} ({enc.n_vocab} tokens), {shards.data_dir} has "
            f"{shards.enc.name} ({shards.enc.n_vocab}): make shards with --tokenizer={enc.name}"
        )


# -- the run ------------------------------------------------------------------------


def main(demo):
    check_settings()
    rank, world_size, where = start_processes(device)
    master = rank == 0
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
    if demo:
        local_first(make_demo_data)
    shards = Shards(data_dir)
    if eval_only:
        check_tokenizer(ckpt, enc, shards)
        context = min(T, model.config.block_size)
        result = evaluate(model, shards, B, context, val_tokens, autocast, rank, world_size)
        say(f"{ckpt} on {data_dir}, context {context}:")
        say(" | ".join(f"{key} {value:,.4f}".removesuffix(".0000") for key, value in result.items()))
        return
    if total_batch_size % (B * T * world_size):
        sys.exit(indivisible_batch(world_size))
    order = TrainOrder(shards, T, seed, say)
    sequences = total_batch_size // T  # in a step
    grad_accum_steps = sequences // (B * world_size)

    # Model and optimizer: of the run to resume, around given weights, or fresh
    torch.manual_seed(seed)
    saved = None
    resume_path = os.path.join(log_dir, "resume.pt")
    if resume and os.path.exists(resume_path):
        saved = load_checkpoint(resume_path)
        source = os.path.join(log_dir, f"model_{saved['step']:05d}.pt")
    else:
        source = init_from
    if source:
        raw_model, enc = load_model(source, where, log_dir)
        check_tokenizer(source, enc, shards)
        if raw_model.config.block_size < T:
            sys.exit(f"--T={T} is more than {source}'s context: use --T={raw_model.config.block_size}")
    else:
        enc = shards.enc
        raw_model = GPT(GPTConfig(T, enc.n_vocab, n_layer, n_head, n_embd)).to(where)
    raw_model.train()
    optimizer = raw_model.configure_optimizers(weight_decay, max_lr, (beta1, beta2))
    scaler = torch.amp.GradScaler(device_type, enabled=precision == torch.float16)
    start_step, evaluated_step, saved_step = 0, None, None
    if saved:
        if saved["data"] != shard_sizes(shards)[: len(saved["data"])]:
            sys.exit(
                f"{data_dir}: not the shards that the run in {log_dir} has read; it cannot go on with them"
            )
        start_step = saved_step = saved["step"]
        say(f"resuming {log_dir} at step {start_step}")
        evaluated_step = saved["evaluated_step"]
        optimizer.load_state_dict(saved["optimizer"])
        for group in optimizer.param_groups:  # as the settings say, which the command line may have changed
            group["betas"] = (beta1, beta2)
            group["weight_decay"] = weight_decay if group["params"][0].dim() >= 2 else 0.0
        if saved["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"])
        del saved
    model = torch.compile(raw_model) if use_compile(device_type) else raw_model
    train_model = model
    if world_size > 1:
        train_model = DDP(model, device_ids=[where] if device_type == "cuda" else None)

    name = torch.cuda.get_device_name(where) if device_type == "cuda" else device_type
    flops_per_token = raw_model.flops_per_token(T)
    peaks = [flops for key, flops in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)]
    peak = peaks[0] if peaks and precision != torch.float32 else None
    say(f"{world_size} x {name}, {str(precision)[6:]}, compile {'on' if model is not raw_model else 'off'}")
    say(f"{raw_model.num_params() / 1e6:.2f}M parameters, context {T}, tokenizer {enc.name}")
    say(
        f"{total_batch_size:,} tokens a step ({grad_accum_steps} x {B} x {T} on each device), "
        f"{order.per_epoch / sequences:,.1f} steps an epoch of {data_dir}"
    )

    # What to evaluate on, the log, and how to stop
    hellaswag_items, ewok_items = None, None
    if hellaswag_every:
        load = functools.partial(hellaswag.load_items, limit=hellaswag_limit)
        hellaswag_items = load_eval_items("HellaSwag", load, where, say)
    if ewok_every:
        ewok_items = load_eval_items("EWoK", ewok.load_items, where, say)
    log_files = {}
    if master:
        try:
            if saved_step is None:
                start_log(log_dir)
            else:
                rewind_log(log_dir, start_step, evaluated_step)
            names = LOGS if exposure_every else LOGS[:2]
            log_files = {name: open(os.path.join(log_dir, name), "a", buffering=1) for name in names}
        except OSError as e:
            sys.exit(f"--log_dir={log_dir}: cannot write there ({e.strerror})")
    settings = current_settings(globals())

    def log(step, kind, value, **more):
        if master:
            digits = 6 if kind == "train" else 4
            log_files["log.txt"].write(f"{step} {kind} {value:.{digits}f}\n")
            log_files["metrics.jsonl"].write(json.dumps({"step": step, "kind": kind, **more}) + "\n")

    def due(every, step):
        return every > 0 and (step % every == 0 or step == max_steps)

    stop_requests = []  # when each Ctrl-C (or SIGTERM) came

    def request_stop(signum, frame):
        stop_requests.append(time.monotonic())
        if stop_requests[-1] - stop_requests[0] > 1:  # sooner, it may be torchrun that passes on the first
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        if master:  # print() must not be called again while it is at work
            os.write(1, b"\nstopping after this step; once more stops at once\n")

    signal.signal(signal.SIGINT, request_stop)
    signal.signal(signal.SIGTERM, request_stop)
    stopping = False
    waiting = not all_agree(shards.complete, where)  # for shards that fineweb.py has yet to write

    if start_step > max_steps:
        say(f"nothing to do: the run is at step {start_step}, --max_steps={max_steps}")
    for step in range(start_step, max_steps + 1):
        if waiting and not stopping and step < max_steps:
            # Together, before the step: a rank must not sleep while the others wait for it in a collective.
            found = order.wait_for((step + 1) * sequences - 1, stopped=lambda: stop_requests)
            stopping = not all_agree(found, where)
            waiting = not all_agree(shards.complete, where)
        val_loss = None  # of this step, if it is measured

        # Once in a while: the validation loss, a sample, what has been read
        if evaluated_step != step and not stopping:
            if due(eval_every, step) and shards.val:
                result = evaluate(model, shards, B, T, val_tokens, autocast, rank, world_size)
                val_loss = result["loss"]
                log(step, "val", val_loss, **result)
                say(f"step {step:5d} | val loss {val_loss:.4f} | {result['bpb']:.4f} bits per byte")
            if due(hellaswag_every, step) and hellaswag_items:
                with autocast:
                    result = hellaswag.evaluate(
                        raw_model, enc, hellaswag_items, rank=rank, world_size=world_size
                    )
                log(step, "hella", result["acc_norm"], **result)
                say(f"step {step:5d} | HellaSwag {result['acc_norm']:.2%} acc_norm | {result['acc']:.2%} acc")
            if due(ewok_every, step) and ewok_items:
                with autocast:
                    result, _ = ewok.evaluate(raw_model, enc, ewok_items, rank=rank, world_size=world_size)
                log(step, "ewok", result["context"], **result)
                say(f"step {step:5d} | EWoK {result['context']:.4f} | {result['target_mean']:.4f} target_mean")
            if due(sample_every, step) and master:
                rng = torch.Generator(where).manual_seed(seed)
                with autocast:
                    pieces = stream_text(raw_model, enc, sample_prompt, sample_tokens, top_k=50, generator=rng)
                    text = sample_prompt + "".join(piece for (piece,) in pieces)
                record = {"step": step, "kind": "sample", "text": text}
                log_files["metrics.jsonl"].write(json.dumps(record) + "\n")
                say(f"step {step:5d} | sample:\n{text}\n")
            if due(exposure_every, step) and master and step:
                first = (step - 1) // exposure_every * exposure_every
                for record in order.exposure(first * sequences, step * sequences):
                    log_files["exposure.jsonl"].write(json.dumps({"step": step, **record}) + "\n")
            evaluated_step = step

        # Save: the model first, then resume.pt, which names it by its step
        if step != saved_step and (stopping or step == max_steps or (step and due(save_every, step))):
            if master:
                state = {
                    "model": raw_model.state_dict(),
                    "config": dataclasses.asdict(raw_model.config),
                    "step": step,
                    "val_loss": val_loss,
                    "settings": settings,
                    "tokenizer": tokenizer_state(enc),
                }
                path = os.path.join(log_dir, f"model_{step:05d}.pt")
                write_whole(path, functools.partial(torch.save, state))
                state = {
                    "step": step,
                    "evaluated_step": evaluated_step,
                    "data": shard_sizes(shards),
                    "settings": settings,
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    "rng": torch.get_rng_state(),
                }
                write_whole(resume_path, functools.partial(torch.save, state))
            say(f"step {step:5d} | saved {log_dir}/model_{step:05d}.pt")
            saved_step = step
        if stopping:
            say("stopped; the same command with --resume goes on from here")
        elif step == max_steps:
            say(f"done; see what it writes: python sample.py --log_dir={log_dir}")
        if stopping or step == max_steps:
            if world_size > 1:
                dist.barrier()  # leave together: gloo aborts a process that ends while rank 0 still saves
            break

        # The update: forward and backward for each micro-batch, then one step of AdamW
        t0 = time.perf_counter()
        lr = get_lr(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums = torch.zeros(2, device=where)  # of the loss over micro-batches, of requests to stop
        for micro_step, rows in enumerate(order.batches(step, sequences, B, rank, world_size)):
            rows = to_device(rows)  # (B, T + 1)
            train_model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            with autocast:
                loss = train_model(rows[:, :-1], rows[:, 1:])
            sums[0] += loss.detach()
            scaler.scale(loss / grad_accum_steps).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        sums[1] = len(stop_requests)
        if world_size > 1:
            dist.all_reduce(sums)
        loss = sums[0].item() / (grad_accum_steps * world_size)
        stopping = sums[1].item() > 0

        seconds = time.perf_counter() - t0
        record = {"loss": loss, "lr": lr, "grad_norm": norm.item(), "seconds": seconds}
        record["tokens_per_second"] = total_batch_size / seconds
        record["tokens"] = (step + 1) * total_batch_size
        record["epoch"] = (step + 1) * sequences / order.per_epoch if shards.complete else None
        mfu = ""
        if peak:
            record["mfu"] = flops_per_token * record["tokens_per_second"] / (peak * world_size)
            mfu = f" | mfu {100 * record['mfu']:.1f}%"
        log(step, "train", loss, **record)
        say(
            f"step {step:5d} | loss {loss:.6f} | lr {lr:.4e} | norm {norm:.4f} | "
            f"{1000 * seconds:.0f}ms | {record['tokens_per_second']:,.0f} tok/s{mfu}"
        )


if __name__ == "__main__":
    try:
        try:
            given = configure(globals(), default_settings)
            main(demo=data_dir == DEMO_DIR and "data_dir" not in given)
        except (torch.OutOfMemoryError, RuntimeError) as e:
            if "memory" not in str(e):  # on CPUs and mps it is a RuntimeError
                raise
            hint = f"try --B={B // 2}" if B > 1 else "it needs a smaller model or --T"
            sys.exit(f"out of memory with --B={B}: {hint}; total_batch_size, and so the result, stays the same")
    except SystemExit as e:
        if e.code and int(os.environ.get("RANK", 0)) > 0:
            time.sleep(2)  # most likely rank 0 says the same, and torchrun ends this one: one line is enough
        raise
    if dist.is_initialized():
        dist.destroy_process_group()
