"""Train a GPT-2 on token shards, on one device or many.

    python train_gpt2.py                                  # no shards yet: a demo, 1 to 2 minutes
    python train_gpt2.py --data_dir=my_shards --B=16      # one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --max_steps=57219
    python train_gpt2.py --preset=modern                  # what came after GPT-2, at its size
    python train_gpt2.py --resume                         # continue the run in log/, or start one
    python train_gpt2.py --init_from=gpt2 --max_lr=3e-5 --min_lr=3e-6   # fine-tune
    python train_gpt2.py --eval_only=True --ckpt=gpt2     # the validation loss of any model

The defaults are build-nanogpt's run: GPT-2 124M, 0.5M tokens per step, GPT-3's schedule. Writes
log/: log.txt ("<step> <kind> <value>" lines), metrics.jsonl (everything else), model_<step>.pt (the
model) and resume.pt (what only training needs). The tokens of a step are the same for any number of
processes and any B, see data/loader.py. A loss logged for step s is that of the weights after s
updates: `250 val` is the loss of model_00250.pt.
"""

import collections
import dataclasses
import datetime
import math
import shlex
import time

from configurator import check_command_line, configure, current_settings, read_settings
from training.presets import PRESETS

if __name__ == "__main__":
    check_command_line(__file__, PRESETS)  # before torch is imported, which takes seconds

from data.loader import MixtureLoader, ShardLoader, format_ranges, open_sources
from device import peak_flops, pick_autocast, pick_compile, pick_dtype
import ewok
from fineweb import make_demo_shards
import hellaswag
from model import GPT, GPTConfig, load_model
from script import DISK_ERRORS, UserError, is_out_of_memory, print0
from training import checkpoint, distributed, evals
from training.logdir import open_log
from training.micro_batch import BatchReader, fit_memory, largest_micro_batch
from training.optimizers import configure_optimizers
from training.schedule import describe_schedule, get_lr
from training.settings import DEMO_DIR, check_settings, resolve_settings
from weights import last_checkpoint_message, model_path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

# -- settings: override any with --key=value --------------------------------------
# configure() sets these globals before main(). run.settings is a copy of them, for checkpoints and
# other files; in it B is the micro-batch that fits, and the architecture is that of loaded weights.
# what most people change
preset = "auto"  # tiny, gpt2, modern, gpt2-medium, -large, -xl; auto: gpt2 if data_dir has shards
data_dir = "edu_fineweb10B"  # the folder of token shards; a mixture of folders is a:0.7,b:0.3
log_dir = "log"  # the folder for logs and checkpoints
max_steps = 19_073  # length of the run; 19,073 is 1 epoch of 10B tokens at 0.5M tokens per step
B = 64  # micro-batch: sequences on a device at a time; changes memory and speed, not the result
# where to start
resume = False  # continue the run in log_dir, if there is one, with its settings
resume_step = -1  # resume from the checkpoint of this step; later ones are moved to old_N/
init_from = ""  # start from these weights: a .pt file, a hub name (gpt2, owner/name) or its folder
eval_only = False  # print the validation loss of ckpt, and stop
ckpt = "latest"  # with eval_only, the model: latest, best, or one of the forms of init_from
seed = 1337  # seed of the weights and of the order of the data
# model
depth = 0  # with --preset=modern, one dial for size, batch and length: the number of blocks; 0: off
n_layer = 12  # number of blocks
n_head = 12  # attention heads per block; n_embd / 64 in GPT-2
n_embd = 768  # width of the model
pos = "learned"  # positions: learned or rope
norm = "layernorm"  # layernorm, rmsnorm or rmsnorm_noaffine (RMSNorm without weights)
mlp = "gelu"  # gelu, swiglu (with the same number of parameters) or relu2
qk_norm = False  # normalize queries and keys (RMSNorm)
bias = True  # biases in linear layers and LayerNorms
embd_norm = False  # normalize the embedding output
softcap = 0.0  # cap the logits at +-softcap with tanh; 0: no cap
zero_init = False  # initialize the residual projections (c_proj) to zero
tie_embeddings = True  # the output layer shares the weights of the token embedding
# batch
T = 1024  # context: tokens per sequence
total_batch_size = 524_288  # tokens per step, over all devices and micro-batches
# optimizer and schedule
optimizer = "adamw"  # adamw, or muon for the matrices of the blocks (with AdamW for the rest)
schedule = "cosine"  # cosine, or wsd: max_lr, then a cooldown to min_lr
cooldown_steps = 1900  # length of wsd's cooldown, linear from max_lr to min_lr
warmup_steps = 715  # length of the warmup; 715 is GPT-3's 375M tokens
max_lr = 6e-4  # highest learning rate (GPT-3 124M's); muon's default is scaled by n_embd^-0.5
min_lr = 6e-5  # learning rate at the end of the run
weight_decay = 0.1  # of AdamW's matrices and embeddings, or only of Muon's; more in short runs
beta1 = 0.9  # decay of AdamW's mean of gradients
beta2 = 0.95  # decay of AdamW's mean of squared gradients
grad_clip = 1.0  # largest norm of the gradient; 0: no limit
# evaluations, samples and logs
eval_every = 250  # measure the validation loss every N steps; 0: never
hellaswag_every = 250  # run HellaSwag (hellaswag.py) every N steps; 0: never
hellaswag_limit = 0  # use only the first N items of HellaSwag; 0: all
ewok_every = 250  # run EWoK (ewok.py) every N steps; 0: never
ewok_items = False  # log the scores of each EWoK item, to log/ewok_items.jsonl
val_dir = ""  # other shards to measure the validation loss on; empty: those of data_dir
val_tokens = 10_485_760  # measure the validation loss on the first N validation tokens
sample_every = 250  # generate a sample of text every N steps; 0: never
sample_prompt = "Hello, I'm a language model,"  # prompt of the samples; empty: <|endoftext|>
sample_tokens = 48  # length of the samples in tokens
save_every = 5000  # save a checkpoint every N steps; 0: only at the end
plot_every = -1  # draw log/plot.png every N steps; -1: at each checkpoint; 0: never
print_every = 1  # print a line every N steps; 0: never; log.txt has every step
exposure_every = 0  # every N steps, log which tokens were read to log/exposure.jsonl; 0: never
wandb = ""  # project at Weights & Biases to log to as well
wandb_name = ""  # the run's name at Weights & Biases
tensorboard = False  # write TensorBoard logs to log/tensorboard as well
# what can go wrong
save_every_minutes = 60.0  # also save a checkpoint when the last one is this old; 0: never
keep_checkpoints = 0  # keep only the newest N model_*.pt and the best by validation loss; 0: all
max_bad_steps = 10  # end the run after N steps in a row whose loss or gradient is not finite
data_timeout = 60.0  # end the run if fineweb.py has not touched meta.json for this many minutes
# machine
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # bfloat16 where the hardware has it, else float16 on CUDA, else float32
compile = "auto"  # torch.compile: true, false, or auto, which means true on CUDA
fsdp = False  # shard weights, gradients and optimizer over processes, for large models
activation_checkpointing = False  # recompute all activations in the backward pass: less memory

# To add an eval: its script here, and the setting <script>_every above; see training/evals.py.
EVALS = (hellaswag, ewok)
# The settings that are fields of GPTConfig; the other two come from T and from the tokenizer.
NOT_SETTINGS = ("block_size", "vocab_size")
MODEL_KEYS = [f.name for f in dataclasses.fields(GPTConfig) if f.name not in NOT_SETTINGS]
IMMUTABLE = [
    "preset",
    "depth",
    *MODEL_KEYS,
    "optimizer",
    "init_from",
]  # a resumed run cannot change these


# -- before the first step ----------------------------------------------------------
def preset_settings(name):
    """The settings of this file, with those of a preset."""
    settings = {key: default for key, (default, _) in read_settings(__file__).items()}
    return {**settings, **PRESETS[name]}


def initial_settings(overrides):
    """All settings of this command; overrides: those on the command line."""
    return resolve_settings(overrides, preset_settings, IMMUTABLE)


@dataclasses.dataclass
class Setup:
    """The objects that a training step uses. What resume.pt stores is in a Run."""

    model: GPT
    train_model: torch.nn.Module  # computes the gradients of model: model itself, or DDP
    optimizers: list
    scaler: torch.amp.GradScaler
    loader: MixtureLoader
    reader: BatchReader
    device: str
    B: int  # the micro-batch
    world_size: int = 1


def open_model(shards, saved, overrides, compute_dtype, device):
    """The GPT to train, on its device: the resumed run's, with given weights, or fresh."""
    torch.manual_seed(seed)
    source = init_from
    if saved:
        source = model_path(log_dir, saved["step"])
    # Loaded weights decide the architecture: a setting that contradicts them is a mistake.
    if source:
        model, enc = load_model(source, "cpu" if fsdp else device, log_dir)
        shards.check_tokenizer(source, enc)
        block_size = model.config.block_size
        if block_size < T:
            raise UserError(f"--T={T} is more than {source}'s context: use --T={block_size}")
        for key in MODEL_KEYS:
            value = getattr(model.config, key)
            if overrides.get(key, value) != value:
                given = f"--{key}={overrides[key]}"
                raise UserError(f"{given}: {source} has {key}={value}; leave it out")
    else:
        fields = {key: globals()[key] for key in MODEL_KEYS}
        model = GPT(GPTConfig(block_size=T, vocab_size=shards.enc.n_vocab, **fields))
    # With FSDP each block is compiled on its own, since communication happens between them.
    compiled = pick_compile(compile, device)
    if fsdp and dist.is_initialized():
        if compute_dtype == torch.float16:
            raise UserError("--fsdp=True: not in float16; use --dtype=bfloat16 or float32")
        distributed.apply_fsdp(model, compute_dtype, compiled)
    elif compiled:
        model.compile()
    model.activation_checkpointing = activation_checkpointing
    return model.to(device).train()


def print_summary(setup, run, compute_dtype):
    """Print the machine, the model, the schedule and the data, a line each."""
    name, _ = peak_flops(setup.device, compute_dtype)
    compiled = "on" if pick_compile(compile, setup.device) else "off"
    dtype_name = str(compute_dtype).removeprefix("torch.")
    print0(f"{setup.world_size} x {name}, {dtype_name}, compile {compiled}")
    millions = setup.model.num_params() / 1e6
    print0(f"{millions:.2f}M parameters, context {T}, tokenizer {setup.loader.enc.name}")
    print0(describe_schedule(run.settings, run.rewarm_from))
    grad_accum_steps = total_batch_size // (setup.B * T * setup.world_size)
    shape = f"{grad_accum_steps} x {setup.B} x {T} on each device"
    tokens = max_steps * total_batch_size
    flops = tokens * setup.model.flops_per_token(T)
    print0(
        f"{total_batch_size:,} tokens per step ({shape}), {tokens:.3g} in all, {flops:.2g} FLOPs"
    )
    for line in setup.loader.describe(total_batch_size // T):
        print0(line)


def peak_tokens_per_sec(setup, compute_dtype):
    """The tokens/s of all devices at an MFU of 1; None if the devices' FLOP/s are not known."""
    _, peak = peak_flops(setup.device, compute_dtype)
    if peak is None:
        return None
    return setup.world_size * peak / setup.model.flops_per_token(T)


def should_save(run, log):
    """Whether to save: every save_every steps or save_every_minutes (rank 0's), and at the end."""
    minutes = (time.monotonic() - log.saved_at) / 60
    overdue = distributed.broadcast_int(int(0 < save_every_minutes <= minutes))
    is_due = run.step == max_steps or evals.is_due(save_every, run)
    return run.step > 0 and (is_due or overdue > 0)


# -- a step -------------------------------------------------------------------------
def train_step(setup, run):
    """Forward and backward for each micro-batch, then one step of the optimizers.

    Returns {"loss", "lr", "grad_norm", "seconds"}, with the lower "loss_scale" if float16 has
    overflowed, and whether loss and gradient are finite. If they are not, the weights stay as they
    are.
    """
    # Each rank reads its own part of the step's sequences, B at a time.
    start = time.perf_counter()
    sequences = total_batch_size // T
    grad_accum_steps = sequences // (setup.B * setup.world_size)
    batches = setup.reader.read(run.tokens // T, sequences, setup.B)
    total_loss = torch.zeros((), device=setup.device)
    # Gradients add up over the micro-batches.
    for micro_step, batch in enumerate(batches):
        batch = batch.to(setup.device, non_blocking=True)  # (B, T + 1)
        # DDP (others ignore this) averages the gradients over ranks in the last backward pass.
        setup.train_model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
        with pick_autocast(dtype, setup.device, cache_weights=False):
            loss = setup.train_model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        total_loss += loss.detach()
        setup.scaler.scale(loss / grad_accum_steps).backward()

    # The norm of the gradient, and the loss, over all ranks.
    for opt in setup.optimizers:
        setup.scaler.unscale_(opt)
    grad_norm = torch.nn.utils.clip_grad_norm_(setup.model.parameters(), grad_clip or math.inf)
    if distributed.is_dtensor(grad_norm):
        grad_norm = grad_norm.full_tensor()
    grad_norm = grad_norm.item()
    loss = distributed.sum_over_ranks(total_loss).item() / (grad_accum_steps * setup.world_size)
    finite = math.isfinite(loss) and math.isfinite(grad_norm)

    # One update, unless something is not finite. A group can have a factor of the learning rate.
    lr = get_lr(run.settings, run.step, run.rewarm_from)
    for opt in setup.optimizers:
        for group in opt.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1)
            group.update(opt.hyperparameters_at(run.step))
        if finite:
            setup.scaler.step(opt)
        opt.zero_grad(set_to_none=True)
    # float16 only: the scale falls after an overflow, and rises after many good steps. Below 1,
    # something else is wrong.
    old_scale = setup.scaler.get_scale()
    setup.scaler.update()
    new_scale = setup.scaler.get_scale()
    result = {"loss": loss, "lr": lr, "grad_norm": grad_norm}
    result["seconds"] = time.perf_counter() - start
    if math.isfinite(loss) and 1 <= new_scale < old_scale:
        result["loss_scale"] = new_scale
    return result, finite


def log_step(result, finite, run, loader, peak_speed, eta, log):
    """Print and log a step; result, finite: what train_step() returned.

    Raises UserError after max_bad_steps steps that were not finite.
    """
    # The numbers of this step, for metrics.jsonl and the terminal.
    step = run.step
    seq_before = run.tokens // T
    seq_after = (run.tokens + total_batch_size) // T
    speed = total_batch_size / result["seconds"]
    result["tokens"] = seq_after * T
    result["epoch"] = loader.epochs(seq_after)
    result["tokens_per_second"] = speed
    line = f"step {step:5d} | loss {result['loss']:.6f} | lr {result['lr']:.4e}"
    line += f" | norm {result['grad_norm']:.4f} | {1000 * result['seconds']:.0f}ms"
    line += f" | {speed:,.0f} tok/s"
    if peak_speed is not None:
        result["mfu"] = speed / peak_speed
        line += f" | mfu {100 * result['mfu']:.1f}%"
    if eta is not None:
        line += f" | eta {datetime.timedelta(seconds=round(eta))}"
    is_last = step == max_steps - 1
    if print_every and (step % print_every == 0 or is_last or not finite):
        print0(line)

    # A step without an update: say why, and which data it had.
    bad_data = ""
    if "loss_scale" in result:
        scale = f"loss scale {result['loss_scale']:g} from now on"
        print0(f"step {step:5d} | float16 overflow: no update, {scale}")
    elif not finite:
        result["skipped"] = list(loader.exposure(seq_before, seq_after))
        bad_data = format_ranges(result["skipped"])
        count = f"{run.bad_steps} in a row"
        print0(f"step {step:5d} | not finite: no update, {count}; the data: {bad_data}")
    # Log it before the run may end, so that the reason is in the log.
    log.log_metric(step, "train", result["loss"], result)
    if run.bad_steps >= max_bad_steps:
        raise UserError(
            f"step {step}: {run.bad_steps} steps in a row were not finite, the last on {bad_data}; "
            f"{last_checkpoint_message(log_dir)}; try a lower --max_lr, or other data with --seed="
        )


# -- the run ------------------------------------------------------------------------
def explain(error):
    """One line for an error that is not a bug, None for others."""
    if is_out_of_memory(error):
        hint = "try a smaller --B; total_batch_size, and so the result, stays the same"
        return f"out of memory: {hint}; at --B=1 it needs a smaller model or --T"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        reason = f"{error.filename or log_dir}: {error.strerror}"
        return f"{reason}; earlier checkpoints are complete: fix this, then run with --resume"
    return distributed.explain_distributed_error(error)


def finish(stop_reason, log):
    """Print the final message, after the last checkpoint."""
    distributed.barrier()  # gloo aborts a process whose peer is gone: rank 0 may still save
    if plot_every:
        log.plot(timeout=60 if stop_reason == "finished" else 0)
    log.close()
    resume_cmd = checkpoint.resume_command(log.path)
    if stop_reason == "data_timeout":
        raise UserError(
            f"{data_dir}: no sign of fineweb.py for {data_timeout:g} minutes; the run is saved: "
            f"start fineweb.py again, then {resume_cmd}"
        )
    if stop_reason == "finished":
        print0(f"done; generate text: python sample.py --log_dir={shlex.quote(log.path)}")
    else:
        print0(f"stopped; resume with: {resume_cmd}")


def main(overrides):
    """overrides: the settings on the command line."""
    check_settings(current_settings(globals()))
    rank, world_size, device_name = distributed.init_distributed(device)
    compute_dtype = pick_dtype(dtype, device_name)
    autocast = pick_autocast(dtype, device_name)
    torch.set_float32_matmul_precision("high")

    # The data: the demo makes its own.
    if data_dir == DEMO_DIR and "data_dir" not in overrides:
        keep = resume or eval_only
        distributed.local_main_process_first(lambda: make_demo_shards(DEMO_DIR, keep))
    sources = open_sources(data_dir)
    val_sources = evals.validation_sources(sources, val_dir, val_tokens)
    if eval_only:
        validation = evals.Validation(val_sources, B, T, val_tokens)
        evals.print_validation(ckpt, log_dir, device_name, validation, autocast, rank, world_size)
        return
    # The micro-batch: as given, or the largest below it that divides the step.
    max_B = B
    if device_name == "cpu" and "B" not in overrides:
        max_B = min(B, max(1, 8192 // T))  # larger batches are no faster on a CPU
    micro_B = largest_micro_batch(max_B, "B" in overrides, T, total_batch_size, world_size)
    loaders = [ShardLoader(shards, T, seed) for shards in sources]
    loader = MixtureLoader(loaders, list(sources.values()))

    # Run, model, optimizers and scaler: from resume.pt, or new.
    saved = checkpoint.load_resume(log_dir, resume_step) if resume else None
    settings = current_settings(globals())
    run = checkpoint.init_run(
        log_dir, saved, overrides, loader, settings, preset_settings(preset), str(compute_dtype)
    )
    model = open_model(loaders[0].shards, saved, overrides, compute_dtype, device_name)
    optimizers = configure_optimizers(model, weight_decay, max_lr, (beta1, beta2), optimizer)
    is_float16 = compute_dtype == torch.float16
    scaler = torch.amp.GradScaler(device_name.split(":")[0], enabled=is_float16)
    if saved:
        checkpoint.restore(log_dir, model, optimizers, scaler, saved)
    # DDP averages the gradients over ranks, in the last backward pass of a step.
    train_model = model
    if world_size > 1 and not fsdp:
        device_ids = [device_name] if device_name.startswith("cuda") else None
        train_model = DDP(model, device_ids=device_ids, gradient_as_bucket_view=True)
    reader = BatchReader(loader, device_name, rank, world_size)
    setup = Setup(
        model, train_model, optimizers, scaler, loader, reader, device_name, micro_B, world_size
    )
    # FSDP communicates in every block: one rank without memory would hang the others.
    if "B" not in overrides and device_name != "cpu" and not fsdp:
        fit_memory(setup, T, total_batch_size, dtype)
    run.settings["B"] = setup.B
    for key in MODEL_KEYS:
        run.settings[key] = getattr(model.config, key)  # loaded weights decide the architecture
    print_summary(setup, run, compute_dtype)
    if run.step > max_steps:
        print0(f"nothing to do: the run is at step {run.step}, --max_steps={max_steps}")
        return

    # Evaluations and other periodic tasks, and the log.
    context = evals.TaskContext(model, loader.enc, autocast, rank, world_size)
    validation = evals.Validation(val_sources, setup.B, T, val_tokens)
    tasks = evals.periodic_tasks(run.settings, EVALS, context, validation, loader)
    log = open_log(run, saved, loader, model, writes=rank == 0)
    del saved  # the optimizers have it now
    stop = distributed.StopRequests()
    peak_speed = peak_tokens_per_sec(setup, compute_dtype)
    train(setup, run, tasks, context, log, stop, peak_speed)


def train(setup, run, tasks, context, log, stop, peak_speed):
    """The training loop. A step: the tasks that are due, perhaps a checkpoint, the update."""
    # The first step includes compilation, so it is left out of the ETA.
    compile_step = run.step if pick_compile(compile, setup.device) else None
    recent_times = collections.defaultdict(lambda: collections.deque(maxlen=20))
    intervals = {kind: every for kind, (every, _) in tasks.items()}
    intervals["save"] = save_every
    stop_reason = ""  # "finished", "interrupted" or "data_timeout"
    while True:
        val_loss = None
        # 1. Wait until the data of this step is there: fineweb.py may still be writing it.
        if run.step < max_steps:
            last = (run.tokens + total_batch_size) // T - 1  # the last sequence of this step
            with log.save_before_error(run, setup):
                stop_reason = distributed.wait_for_data(setup.loader, last, stop, data_timeout)
            if stop_reason:
                break
        # 2. A checkpoint, when it is due: before evaluations, in which a run can be killed.
        save_is_due = should_save(run, log)
        if save_is_due:
            log.save(run, setup)
        # 3. Evaluations, samples and plots that are due, with the weights after run.step updates.
        if run.evaluated_step != run.step:
            with log.save_before_error(run, setup):
                val_loss, interrupted = evals.run_due_tasks(
                    tasks, context, run, log, stop, recent_times
                )
            if interrupted:
                stop_reason = "interrupted"
                break
        if run.step == max_steps:
            stop_reason = "finished"
            break
        # Again, now with the validation loss, and without repeating the evaluations on a resume.
        if save_is_due:
            log.save(run, setup, val_loss)
            recent_times["save"].append(log.save_seconds)
            if plot_every < 0:
                log.plot()

        # 4. The update.
        with log.save_before_error(run, setup):
            result, is_finite = train_step(setup, run)
        if "loss_scale" not in result:  # an overflow of float16 is no sign of bad data
            run.bad_steps = 0 if is_finite else run.bad_steps + 1
        if run.step != compile_step:
            recent_times["train"].append(result["seconds"])
        eta = evals.estimate_eta(run.step, max_steps, intervals, recent_times)
        log_step(result, is_finite, run, setup.loader, peak_speed, eta, log)
        # 5. On to the next step, or stop after this one.
        run.step += 1
        run.tokens += total_batch_size
        if stop.any_rank_requested():
            stop_reason = "interrupted"
            val_loss = None  # it was that of the step before
            break
    log.save(run, setup, val_loss)
    setup.reader.close()
    finish(stop_reason, log)


if __name__ == "__main__":
    with distributed.run_as_distributed_script(explain):
        main(configure(globals(), initial_settings))
