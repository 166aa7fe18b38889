"""Train a GPT-2 on token shards, on one device or many.

    python train_gpt2.py                                  # no shards yet: a demo of a minute or two on a laptop
    python train_gpt2.py --data_dir=my_shards --B=16      # one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --max_steps=57219
    python train_gpt2.py --preset=modern                  # what came after GPT-2, at its size
    python train_gpt2.py --resume                         # go on where log/ stopped, or start
    python train_gpt2.py --init_from=gpt2 --max_lr=3e-5 --min_lr=3e-6 --warmup_steps=50   # fine-tune
    python train_gpt2.py --eval_only=True --ckpt=gpt2     # validation loss of any model

The defaults are the run of build-nanogpt: GPT-2 124M, 0.5M tokens a step, GPT-3's schedule. Writes to log/: log.txt
("<step> <kind> <value>" lines), metrics.jsonl (everything else), model_<step>.pt (the model) and resume.pt (what only
training needs). Which tokens are in a step is the same for any number of processes and any B: see order.py. Step s is
logged before its update, so model_00250.pt has had 250 updates and `250 val` is its loss.
"""

import collections
import dataclasses
import datetime
from functools import partial
import math
import shlex
import sys
import time

from configurator import check_numbers, configure, current_settings, read_settings
import evals
import ewok
from fineweb import make_demo_shards
import hellaswag
import logdir
from model import GPT, GPTConfig, load_model
from optimizers import configure_optimizers
from order import Mixture, TrainOrder, in_words, micro_batch, open_mixture, wait_for
import parallel
from parallel import pick_autocast, pick_compile, pick_dtype, print0
from schedule import check_schedule, describe_schedule, get_lr, keep_shares, stalled
from shards import has_shards

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

# -- settings: override any with --key=value --------------------------------------
preset = "auto"  # tiny, gpt2, modern, gpt2-medium, -large or -xl; auto: gpt2 if there are shards, else tiny
data_dir = "edu_fineweb10B"  # folder of .npy shards written by fineweb.py; a mixture is a:0.7,b:0.3
val_dir = ""  # other shards to validate on; empty: those of data_dir
log_dir = "log"  # where logs and checkpoints go
resume = False  # go on with the run in log_dir, if there is one, with its settings
resume_step = -1  # the same from an earlier checkpoint, of this step; what came behind it is set aside
init_from = ""  # start from these weights: a .pt file, a name on the hub (gpt2, owner/name), or Hugging Face's folder
eval_only = False  # print the validation loss of ckpt and stop
ckpt = "latest"  # the model to evaluate, in the forms of init_from
seed = 1337  # of the weights and the order of the data
# model
n_layer = 12  # blocks
n_head = 12  # attention heads a block; n_embd / 64 in GPT-2
n_embd = 768  # width
pos = "learned"  # positions: learned or rope
norm = "layernorm"  # or rmsnorm, weightless (RMSNorm without weights)
mlp = "gelu"  # or swiglu (of as many parameters), relu2
qk_norm = False  # RMSNorm on queries and keys
bias = True  # in linear layers and LayerNorms
embd_norm = False  # a norm behind the embeddings
softcap = 0.0  # logits go no further than this, by tanh; 0: no limit
zero_init = False  # the layers that lead back into the stream begin at zero
tied = True  # the output layer is the embedding
# batch
B = 64  # micro-batch: sequences a device holds at a time; changes memory and speed, not the result
T = 1024  # context: tokens a sequence
total_batch_size = 524_288  # tokens a step, over all devices and micro-batches
# optimizer and schedule
optimizer = "adamw"  # or muon, for the matrices of the blocks (and AdamW for the rest); muon1: as it was before
schedule = "cosine"  # or wsd: max_lr, then a cooldown to min_lr; plateau: wsd that ends when it stalls
cooldown_steps = 1900  # of wsd and plateau: linear from max_lr to min_lr
patience = 8  # of plateau: the cooldown begins when so many validation losses have brought no gain of 0.002
max_steps = 19_073  # 1 epoch of 10B tokens at 0.5M tokens a step
warmup_steps = 715  # GPT-3's 375M tokens
max_lr = 6e-4  # GPT-3 124M's
min_lr = 6e-5  # a tenth of it
weight_decay = 0.1  # on matrices and embeddings; of muon on matrices, and the larger the shorter the run
beta1 = 0.9  # decay of AdamW's mean of the gradients
beta2 = 0.95  # decay of its mean of their squares
grad_clip = 1.0  # largest norm of the gradient; 0: no limit
# every so many steps; 0: never
eval_every = 250  # validation loss
hellaswag_every = 250  # HellaSwag, as python hellaswag.py scores it
hellaswag_limit = 0  # on only the first so many of its items; 0: all
ewok_every = 250  # EWoK, as python ewok.py scores it
ewok_items = False  # the numbers of each of its items too, in log/ewok_items.jsonl
val_tokens = 10_485_760  # tokens it is measured on: the first of the validation shards, or all if fewer
sample_every = 250  # text from the model
sample_prompt = "Hello, I'm a language model,"  # how it starts; empty: <|endoftext|>
sample_tokens = 48  # how long it is
save_every = 5000  # checkpoints
plot_every = -1  # log/plot.png, where matplotlib is installed; -1: at each checkpoint and at the end
print_every = 1  # a line on the terminal; log.txt has every step
exposure_every = 0  # log/exposure.jsonl: which tokens the model has seen
wandb = ""  # the project of Weights & Biases that gets the records too
wandb_name = ""  # the name of the run there
tensorboard = False  # the records in log/tensorboard too
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

# NanoChat, as transformers has it, by the recipe of modded-nanogpt and nanochat: README.md has the sources.
MODERN = dict(
    pos="rope", norm="weightless", qk_norm=True, bias=False, mlp="relu2", embd_norm=True, softcap=15.0, zero_init=True,
    tied=False, optimizer="muon", schedule="wsd", min_lr=0.0, beta1=0.8,
)  # fmt: skip

# Sizes from the GPT-2 paper; learning rates from the GPT-3 paper (table 2.1) for the nearest size.
PRESETS = {
    "tiny": MODERN | dict(
        n_layer=3, n_head=2, n_embd=128, softcap=0.0, zero_init=False, B=16, T=128, total_batch_size=2048,
        max_steps=1250, warmup_steps=20, cooldown_steps=1125, max_lr=7e-3, beta2=0.99, hellaswag_every=0, ewok_every=0,
        eval_every=625, save_every=625, sample_every=625, sample_prompt="\n", sample_tokens=160, print_every=25,
    ),
    "modern": MODERN | dict(n_head=6, max_lr=3.6e-3, warmup_steps=40, cooldown_steps=11_444, weight_decay=0.04),
    "gpt2": {},
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, B=32, max_lr=3e-4, min_lr=3e-5),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, B=16, max_lr=2.5e-4, min_lr=2.5e-5),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, B=8, max_lr=2e-4, min_lr=2e-5),
}  # fmt: skip

DEMO_DIR = "demo_data"
ARCHITECTURE = [f.name for f in dataclasses.fields(GPTConfig) if f.name in globals()]  # the settings it has


def default_settings(given):
    """The settings below the command line's: those of the run to resume, or of the preset."""
    if given.get("preset") == "auto":
        del given["preset"]
    name = given.get("preset", "auto")
    if name not in ("auto", *PRESETS):
        sys.exit(f"--preset={name}: choose auto, {', '.join(PRESETS)}")
    back = given.get("resume_step", resume_step)
    resuming = given.get("resume", resume) or back >= 0
    saved = logdir.load_resume(given.get("log_dir", log_dir), back, mmap=True) if resuming else None
    if saved:
        fixed = ["preset", *ARCHITECTURE, "optimizer", "init_from"]
        settings = logdir.resumed_settings(saved, given, file_settings, fixed) | {"resume": True}
        if (saved.get("last_step") or 0) > saved["step"]:  # a plateau whose cooldown has begun
            return settings
        base = settings if settings["max_steps"] else file_settings(settings["preset"])  # no steps have no shares
        share = keep_shares(base, given.get("max_steps", settings["max_steps"]), given)
        return settings | (share if base is not settings else {"cooldown_steps": share["cooldown_steps"]})
    found = has_shards(given.get("data_dir", data_dir))
    if name == "auto":
        name = "gpt2" if found or "data_dir" in given else "tiny"
    settings = PRESETS[name] | {"preset": name}
    run = logdir.load_resume(given.get("log_dir", log_dir), mmap=True) if given.get("eval_only") else None
    if run and given.get("ckpt", ckpt) in ("latest", "best"):
        given = {"data_dir": run["settings"]["data_dir"]} | given  # what it has been trained on
        settings["data_dir"] = given["data_dir"]
    defaults = file_settings(name) | {key: given[key] for key in ("optimizer",) if key in given}
    settings |= keep_shares(defaults, given.get("max_steps", defaults["max_steps"]), given)
    if name == "tiny" and not found and "data_dir" not in given:
        settings["data_dir"] = DEMO_DIR
    return settings


def file_settings(name):
    """The settings as this file has them, under a preset."""
    return {key: value for key, (value, _) in read_settings(__file__).items()} | PRESETS[name]


# -- before the first step ----------------------------------------------------------
def check_settings():
    """Exit with one line if a number makes no sense."""
    positive = "n_layer n_head n_embd B T total_batch_size patience val_tokens sample_tokens max_bad_steps".split()
    for key, value in current_settings(globals()).items():
        if not isinstance(value, str):
            check_numbers(1 if key in positive else -1 if key in ("plot_every", "resume_step") else 0, **{key: value})
    if seed >= 1 << 63:
        sys.exit(f"--seed={seed}: must be less than 2^63")
    for key, known in (("optimizer", ("adamw", "muon", "muon1")), ("schedule", ("cosine", "wsd", "plateau"))):
        if globals()[key] not in known:
            sys.exit(f"--{key}={globals()[key]}: choose {', '.join(known)}")
    if schedule == "plateau" and not eval_every:
        sys.exit("--schedule=plateau judges validation losses: it needs --eval_every=")
    check_schedule(current_settings(globals()))
    if ckpt != "latest" and not eval_only:
        sys.exit("--ckpt= is for --eval_only=True; --init_from= starts from weights, --resume_step= goes back")
    if min_lr > max_lr:
        sys.exit(f"--min_lr={min_lr}: is more than --max_lr={max_lr}; use --min_lr={max_lr / 10:g}")
    if max(beta1, beta2) >= 1:
        sys.exit(f"--beta1={beta1} --beta2={beta2}: must be less than 1")


def open_model(shards, saved, given, precision, where):
    """The GPT to train, on its device: of the run to resume, with given weights, or fresh."""
    torch.manual_seed(seed)
    source = logdir.model_path(log_dir, saved["step"]) if saved else init_from
    if source:
        model, enc = load_model(source, "cpu" if fsdp else where, log_dir)
        shards.check_tokenizer(source, enc)
        if model.config.block_size < T:
            sys.exit(f"--T={T} is more than {source}'s context: use --T={model.config.block_size}")
        for key, value in ((key, getattr(model.config, key)) for key in ARCHITECTURE):
            if given.get(key, value) != value:
                sys.exit(f"--{key}={given[key]}: {source} has {key}={value}; leave it out")
            globals()[key] = value
    else:
        parts = {key: globals()[key] for key in ARCHITECTURE}
        model = GPT(GPTConfig(block_size=T, vocab_size=shards.enc.n_vocab, **parts))
    compiled = pick_compile(compile, where)
    if fsdp and dist.is_initialized():
        if precision == torch.float16:
            sys.exit("--fsdp=True: not in float16; use --dtype=bfloat16 or float32")
        parallel.shard(model, precision, compiled)
    elif compiled:
        model.compile()
    model.activation_checkpointing = activation_checkpointing
    return model.to(where).train()


def fit_memory(model, train_model, room, world_size, where):
    """Halve B until a micro-batch fits the memory of every process, beside `room` floats a parameter.

    It is tried eagerly first, which tells in a second what a compiled model needs a minute for.
    """

    def micro_step():
        kept = [torch.empty_like(p) for p in model.parameters() for _ in range(room)]
        rows = torch.zeros(B, T, dtype=torch.long, device=where)
        with pick_autocast(dtype, where, cache=False):
            train_model(rows, rows.clone()).backward()  # one tensor for both would be another graph
        del kept  # until here

    train_model.require_backward_grad_sync = False  # DDP's processes need not all get so far
    for stance in ("force_eager", "default"):
        with torch.compiler.set_stance(stance):
            while B > 1 and not parallel.fits_memory(micro_step, model):
                print0(f"out of memory with --B={B}: it is halved, and the result stays the same")
                globals()["B"] = micro_batch(B // 2, False, T, total_batch_size, world_size)


def describe(model, order, run, precision, where, world_size):
    """Print what is trained, on what; returns the tokens/s at an MFU of 1, None where that is not known."""
    name, peak = parallel.peak_flops(where, precision)
    compiled = "on" if pick_compile(compile, where) else "off"
    grad_accum_steps = total_batch_size // (B * T * world_size)
    print0(f"{world_size} x {name}, {str(precision)[6:]}, compile {compiled}")
    print0(f"{model.num_params() / 1e6:.2f}M parameters, context {T}, tokenizer {order.enc.name}")
    print0(describe_schedule(run.settings, run.lengthened))
    print0(f"{total_batch_size:,} tokens a step ({grad_accum_steps} x {B} x {T} on each device)")
    for line in order.describe(total_batch_size // T):
        print0(line)
    return world_size * peak / model.flops_per_token(T) if peak else None


# -- once in a while ----------------------------------------------------------------
def end_of(run):
    """The step at which the run ends: max_steps, or where plateau has seen it end."""
    return min(max_steps, run.last_step or max_steps)


def due(every, run):
    """Whether something is to be done at this step: every so many steps, and at the end."""
    return every > 0 and (run.step % every == 0 or run.step == end_of(run))


def evaluations(model, validation, order, autocast, ranks):
    """{kind: (every so many steps, function of (run, log))}: what is done once in a while, in this order."""
    tasks, enc = {}, order.enc
    if validation:
        tasks["val"] = eval_every, partial(evals.validate, model, validation, B, T, val_tokens, autocast, ranks)
    for kind, name, every, script, limit, with_items in (
        ("hella", "HellaSwag", hellaswag_every, hellaswag, hellaswag_limit, False),
        ("ewok", "EWoK", ewok_every, ewok, 0, ewok_items),
    ):
        items = every and evals.load_eval_items(name, partial(script.load_items, limit=limit))
        if items:
            tasks[kind] = every, partial(evals.score, script, kind, items, model, enc, autocast, ranks, with_items)
    sample = partial(evals.write_sample, model, enc, sample_prompt, sample_tokens, seed, autocast)
    tasks["sample"] = sample_every, sample
    tasks["exposure"] = exposure_every, partial(evals.write_exposure, order)
    tasks["plot"] = plot_every, lambda run, log: log.draw()
    return tasks


def evaluate_due(tasks, run, model, log, stop, seconds):
    """Do what is due at this step; seconds[kind] gets the time that it took.

    Returns (the validation loss if it was measured, "asked" if a process has been asked to stop). If that leaves
    something out, all of it is done again when the run goes on.
    """
    now = {kind: task for kind, (every, task) in tasks.items() if due(every, run)}
    if not now:
        return None, ""
    results, ending = {}, ""
    parallel.gather(model)
    for kind, task in now.items():
        start = time.monotonic()
        results[kind] = task(run, log)
        seconds[kind].append(time.monotonic() - start)
        if stop.anywhere():
            ending = "asked"
            break
    parallel.release(model)
    val_loss = results["val"]["loss"] if "val" in results else None
    if len(results) == len(now):
        run.evaluated_step = run.step
        run.exposed = run.tokens if "exposure" in now else run.exposed
        if val_loss is not None:
            run.val_losses.append(val_loss)
            cool_down_if_stalled(run)
    return val_loss, ending


def save_due(run, log):
    """Whether a checkpoint is: every so many steps and, by rank 0's clock, minutes."""
    overdue = save_minutes > 0 and time.monotonic() - log.saved_at >= 60 * save_minutes
    return run.step > 0 and (due(save_every, run) or parallel.from_rank_0(int(overdue)) > 0)


def cool_down_if_stalled(run):
    """plateau: give the run its last step."""
    cooling = run.step >= end_of(run) - cooldown_steps
    if schedule == "plateau" and run.step >= warmup_steps and not cooling and stalled(run.val_losses, patience):
        run.last_step = run.step + cooldown_steps
        print0(f"step {run.step:5d} | val loss has stalled: cooling down until step {run.last_step}")


# -- a step -------------------------------------------------------------------------
def update(model, train_model, optimizers, scaler, order, run, rank, world_size):
    """The update of this step: forward and backward for each micro-batch, then one step of the optimizers.

    train_model is what makes the gradients of model: itself or DDP. Returns {"loss", "lr", "grad_norm", "seconds",
    "finite"} and, if float16 has overflowed, the lower "loss_scale"; if it is not finite, the weights stay as they are.
    """
    start, where = time.perf_counter(), model.lm_head.weight.device
    lr, sequences = get_lr(run.settings, run.step, end_of(run), run.lengthened), total_batch_size // T
    grad_accum_steps = sequences // (B * world_size)
    losses = torch.zeros((), device=where)
    for micro_step, rows in enumerate(order.batches(run.tokens // T, sequences, B, rank, world_size)):
        rows = torch.from_numpy(rows)  # (B, T + 1)
        rows = rows.pin_memory().to(where, non_blocking=True) if where.type == "cuda" else rows.to(where)
        train_model.require_backward_grad_sync = micro_step == grad_accum_steps - 1  # which DDP looks at
        with pick_autocast(dtype, str(where), cache=False):
            loss = train_model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        losses += loss.detach()
        scaler.scale(loss / grad_accum_steps).backward()
    for opt in optimizers:
        scaler.unscale_(opt)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    grad_norm = (grad_norm.full_tensor() if parallel.is_divided(grad_norm) else grad_norm).item()
    loss = parallel.sum_over_ranks(losses).item() / (grad_accum_steps * world_size)
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    for opt in optimizers:
        for group in opt.param_groups:
            group["lr"] = lr * group.get("lr_share", 1)
            if "parts" in group:
                group["momentum"] = 0.85 + 0.1 * min(1, run.step / 300)  # as in modded-nanogpt
        if finite:
            parallel.step_optimizer(opt, scaler)
        opt.zero_grad(set_to_none=True)
    scale = scaler.get_scale()
    scaler.update()
    result = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "seconds": time.perf_counter() - start, "finite": finite}
    overflow = math.isfinite(loss) and 1 <= scaler.get_scale() < scale
    return result | ({"loss_scale": scaler.get_scale()} if overflow else {})


def report(result, run, order, full_speed, left, log):
    """Print and record a step, whose update returned `result`; ends the run after too many that were not finite."""
    step, loss, seconds, finite = run.step, result["loss"], result["seconds"], result.pop("finite")
    read, seen = run.tokens // T, (run.tokens + total_batch_size) // T  # sequences, before and after this step
    speed = total_batch_size / seconds
    result |= {"tokens": seen * T, "epoch": order.epochs(seen), "tokens_per_second": speed}
    result |= {"mfu": speed / full_speed} if full_speed else {}
    mfu = f" | mfu {100 * result['mfu']:.1f}%" if full_speed else ""
    eta = f" | eta {datetime.timedelta(seconds=round(left))}" if left is not None else ""
    if print_every and (step % print_every == 0 or step == end_of(run) - 1 or not finite):
        print0(
            f"step {step:5d} | loss {loss:.6f} | lr {result['lr']:.4e} | norm {result['grad_norm']:.4f} | "
            f"{1000 * seconds:.0f}ms | {speed:,.0f} tok/s{mfu}{eta}"
        )
    if "loss_scale" in result:
        print0(f"step {step:5d} | float16 overflow: no update, loss scale {result['loss_scale']:g} from now on")
    elif not finite:
        result["skipped"] = list(order.exposure(read, seen))
        data = in_words(result["skipped"])
        print0(f"step {step:5d} | not finite: no update, {run.bad_steps} in a row; the data: {data}")
    log.record(step, "train", loss, **result)
    if run.bad_steps >= max_bad_steps:
        hint = f"{logdir.last_good(log_dir)}; try a lower --max_lr, or other data with --seed="
        sys.exit(f"step {step}: {run.bad_steps} steps in a row were not finite, the last on {data}; {hint}")


# -- the run ------------------------------------------------------------------------
def finish(ending, log):
    """The last words, when all is saved."""
    parallel.wait_for_all()  # gloo aborts a process that ends while rank 0 still saves
    if plot_every:
        log.draw(wait=60 if ending == "done" else 0)
    log.dashboards.close()
    again = logdir.resume_command(log.path)
    if ending == "silent":
        said = f"{data_dir}: no sign of fineweb.py for {data_timeout:g} minutes; the run is saved"
        sys.exit(f"{said}: start fineweb.py again, then {again}")
    done = f"done; see what it writes: python sample.py --log_dir={shlex.quote(log.path)}"
    print0(done if ending == "done" else f"stopped; go on with: {again}")


def main(given):
    """given: the settings on the command line."""
    check_settings()
    rank, world_size, where = parallel.start_processes(device)
    ranks = {"rank": rank, "world_size": world_size}
    precision, autocast = pick_dtype(dtype, where), pick_autocast(dtype, where)
    torch.set_float32_matmul_precision("high")

    # The data, and how to read it
    if data_dir == DEMO_DIR and "data_dir" not in given:
        parallel.local_first(partial(make_demo_shards, DEMO_DIR, keep=resume or eval_only))
    mixture = open_mixture(data_dir)
    validation = evals.sources(mixture, val_dir, val_tokens)
    if eval_only:
        return evals.print_validation(ckpt, log_dir, where, validation, B, T, val_tokens, autocast, ranks)
    if schedule == "plateau" and not validation:
        sys.exit("--schedule=plateau needs validation tokens: --val_dir= names shards that have some")
    most = B if "B" in given or where != "cpu" else min(B, max(1, 8192 // T))  # a processor gains nothing by more
    globals()["B"] = micro_batch(most, "B" in given, T, total_batch_size, world_size)
    order = Mixture([TrainOrder(shards, T, seed) for shards in mixture], list(mixture.values()))

    # The run, the model, and what trains it: as resume.pt has them, or fresh
    saved = logdir.load_resume(log_dir, resume_step) if resume else None
    settings, defaults = current_settings(globals()), file_settings(preset)
    run = logdir.begin(log_dir, saved, given, order, settings, defaults, str(precision))
    model = open_model(next(iter(mixture)), saved, given, precision, where)
    optimizers = configure_optimizers(model, weight_decay, max_lr, (beta1, beta2), optimizer)
    scaler = torch.amp.GradScaler(where.split(":")[0], enabled=precision == torch.float16)
    if saved:
        logdir.restore(log_dir, optimizers, scaler, saved)
    train_model = model
    if world_size > 1 and not fsdp:
        train_model = DDP(model, device_ids=[where] if where.startswith("cuda") else None, gradient_as_bucket_view=True)
    if "B" not in given and where != "cpu" and not fsdp:  # whose processes meet in each block: all get there, or none
        fit_memory(model, train_model, 0 if saved else 2, world_size, where)
    run.settings = current_settings(globals())  # with the weights' own architecture, and B as it fits
    full_speed = describe(model, order, run, precision, where, world_size)

    # What is done besides training, and where it is written down
    tasks = evaluations(model, validation, order, autocast, ranks)
    log = logdir.open_log(run, saved, order, model, writes=rank == 0)
    del saved  # the optimizers have it
    seconds = collections.defaultdict(lambda: collections.deque(maxlen=20))  # {kind of work: what it took lately}
    compiling = run.step if pick_compile(compile, where) else None  # the step whose time tells nothing
    stop = parallel.StopRequests()
    if run.step > max_steps:
        return print0(f"nothing to do: the run is at step {run.step}, --max_steps={max_steps}")

    ending = ""  # why the run ends: "done", "asked" to, or the data's writer is "silent"
    while True:  # a step: what is due before its update, with step updates made so far, and then the update
        val_loss = None
        if not ending and run.step < end_of(run):
            last_sequence = (run.tokens + total_batch_size) // T - 1  # of this step
            ending = wait_for(order, last_sequence, stop, data_timeout)
            run.data = order.contents()
        if not ending and run.evaluated_step != run.step:
            val_loss, ending = evaluate_due(tasks, run, model, log, stop, seconds)
        if not ending and run.step == end_of(run):
            ending = "done"
        if ending or save_due(run, log):
            log.save(run, model, optimizers, scaler, order.enc, val_loss, keep_checkpoints)
            if plot_every < 0 and not ending:
                log.draw()
        if ending:
            break
        result = update(model, train_model, optimizers, scaler, order, run, rank, world_size)
        if "loss_scale" not in result:  # which says nothing of the data
            run.bad_steps = 0 if result["finite"] else run.bad_steps + 1
        if run.step != compiling:
            seconds["train"].append(result["seconds"])
        every = {kind: n for kind, (n, _) in tasks.items()} | {"save": save_every}
        left = evals.time_left(run.step, end_of(run), every, seconds | {"save": [log.save_seconds]})
        report(result, run, order, full_speed, left, log)
        run.step, run.tokens = run.step + 1, run.tokens + total_batch_size
        ending = "asked" if stop.anywhere() else ""
    finish(ending, log)


if __name__ == "__main__":
    parallel.run_script(lambda: main(configure(globals(), default_settings)), lambda e: parallel.explain(e, B, log_dir))
