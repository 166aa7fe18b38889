"""The acceptance of a GPU: what only real hardware can show, in under five minutes.

    python -m pytest tests/test_cuda.py

Skipped where there is no CUDA. A failure says what it means, and what to type or to report. The
data are random tokens, made on the spot, so that nothing is downloaded. One test has the GPU at a
time, whatever -n is.
"""

import base64
import json
import signal
import subprocess
import time
import warnings

from conftest import MODERN_PARTS, command, read_jsonl, read_log
from data.tokenizer import load_tokenizer
from device import eager_mode, peak_flops, pick_autocast
import hellaswag
from model import GPT, GPTConfig
import sample
from training.optimizers import configure_optimizers

import filelock
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")

VOCAB = 50257
PARTS = {
    "gpt2": {},
    "modern": MODERN_PARTS,
    "swiglu": MODERN_PARTS | {"mlp": "swiglu", "norm": "rmsnorm"},
}


@pytest.fixture(autouse=True)
def alone(tmp_path_factory):
    with filelock.FileLock(tmp_path_factory.getbasetemp().parent / "cuda.lock"):
        torch.cuda.empty_cache()
        yield


def small(parts, T=256, device="cuda"):
    torch.manual_seed(0)
    return GPT(GPTConfig(T, VOCAB, 3, 4, 256, **PARTS[parts])).to(device)


def tokens(*shape):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


def gradients(model, device, dtype="float32"):
    """(loss, {name: gradient}) of a batch, on the CPU."""
    x, y = tokens(2, 4, 256).to(device)
    with pick_autocast(dtype, device):
        loss = model(x, y)
    loss.backward()
    return loss.detach().cpu(), {name: p.grad.cpu() for name, p in model.named_parameters()}


def distance(a, b):
    """The largest relative distance between two dicts of tensors, and whose it is."""
    return max(
        (((a[name] - b[name]).norm() / b[name].norm().clamp(min=1e-9)).item(), name) for name in b
    )


# -- the model ----------------------------------------------------------------------
@pytest.mark.parametrize("parts", PARTS)
def test_logits_loss_and_gradients_are_the_cpus(parts):
    there, here = small(parts), small(parts, device="cpu")
    x = tokens(2, 200)
    with torch.no_grad():
        torch.testing.assert_close(there(x.cuda()).cpu(), here(x), atol=2e-3, rtol=1e-3)
    (loss, grads), (true_loss, true_grads) = gradients(there, "cuda"), gradients(here, "cpu")
    assert abs(loss - true_loss) < 1e-4 and distance(grads, true_grads)[0] < 1e-2, distance(
        grads, true_grads
    )
    there.zero_grad()
    loss, grads = gradients(there, "cuda", "auto")  # bfloat16, or float16 on older cards
    assert abs(loss - true_loss) < 1e-2 and distance(grads, true_grads)[0] < 0.1, distance(
        grads, true_grads
    )


@pytest.mark.parametrize("parts", PARTS)
def test_compiled_is_eager(parts):
    model = small(parts)
    loss, grads = gradients(model, "cuda", "auto")
    model.zero_grad()
    model.compile()
    compiled_loss, compiled_grads = gradients(model, "cuda", "auto")
    assert abs(loss - compiled_loss) < 5e-3 and distance(compiled_grads, grads)[0] < 0.05, distance(
        compiled_grads, grads
    )


def test_attention_for_changing_shapes_is_not_cudnns():
    """cuDNN plans anew for each shape, 20 to 40 ms: too long for samples and scoring."""
    q = torch.zeros(1, 12, 37, 64, device="cuda", dtype=torch.float16)
    with eager_mode():
        chosen = SDPBackend(torch._fused_sdp_choice(q, q, q, None, 0.0, True))
    assert chosen in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION), chosen


# -- a run --------------------------------------------------------------------------
@pytest.fixture
def data(tmp_path):
    """A folder of random tokens from a made-up tokenizer of GPT-2's size; items for the evals."""
    ids = [bytes([i]) for i in range(256)] + [
        bytes([i // 256, i % 256]) for i in range(VOCAB - 257)
    ]
    state = {
        "name": "made-up",
        "pat_str": r"(?s:.{1,64})",
        "special_tokens": {"<|endoftext|>": VOCAB - 1},
    }
    state["tokens"] = [base64.b64encode(token).decode() for token in ids]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(state))
    shards = [
        {"file": f"x_{split}_{i:06d}.npy", "split": split}
        for i, split in enumerate(("val", "train"))
    ]
    for shard, size in zip(shards, (100_000, 3_000_000), strict=True):
        rng = np.random.default_rng(size)
        np.save(folder / shard["file"], (rng.random(size) ** 4 * VOCAB).astype(np.uint16))
    (folder / "meta.json").write_text(
        json.dumps({"tokenizer": "tokenizer.json", "complete": True, "shards": shards})
    )
    (tmp_path / "hellaswag").mkdir()
    (tmp_path / "hellaswag" / "hellaswag_val.jsonl").write_text(
        "".join(json.dumps(x) + "\n" for x in items(40))
    )
    (tmp_path / "ewok_fast").mkdir()
    ewok = {
        "Context1": "It rained.",
        "Context2": "It was dry.",
        "Target1": "The road is wet.",
        "Target2": "Dust flew.",
    }
    (tmp_path / "ewok_fast" / "x.jsonl").write_text(
        (json.dumps(ewok | {"Domain": "weather"}) + "\n") * 9
    )
    return folder


def items(n):
    """HellaSwag items of many lengths."""
    rng = np.random.default_rng(0)

    def text(least, most):
        return " ".join(
            rng.choice(
                ["a", "house", "green", "went", "slowly", "of", "seven"], rng.integers(least, most)
            )
        )

    keys = ("ctx", "ctx_a", "ctx_b", "activity_label")
    return [
        {key: text(4, 40) for key in keys}
        | {"endings": [text(3, 20) for _ in range(4)], "label": int(rng.integers(4))}
        for _ in range(n)
    ]


RUN = """--data_dir=data --max_steps=20 --T=1024 --total_batch_size=65536 --warmup_steps=4
    --eval_every=5 --val_tokens=65536 --hellaswag_every=5 --ewok_every=5 --sample_every=5
    --save_every=10""".split()


def test_a_run_of_124m_stopped_and_resumed(data, spawn, tmp_path, monkeypatch):
    """The same log; one training and one validation graph."""
    monkeypatch.setenv("TORCH_LOGS", "recompiles,graph_breaks")
    whole = spawn("train_gpt2.py", *RUN, "--log_dir=whole")
    assert whole.returncode == 0, whole.stderr
    assert "Graph break" not in whole.stderr, (
        "torch.compile gave up on a part: please report the lines above"
    )
    assert whole.stderr.count("Recompiling") <= 1, (
        "a graph too many, besides training's and validation's"
    )
    assert (
        len(read_log(tmp_path / "whole", "hella")) == len(read_log(tmp_path / "whole", "ewok")) == 5
    )

    process = subprocess.Popen(
        command("train_gpt2.py", *RUN, "--log_dir=parts"), cwd=tmp_path, text=True
    )
    log = tmp_path / "parts" / "log.txt"
    while process.poll() is None and not (log.exists() and "\n7 train" in log.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 0
    rest = spawn("train_gpt2.py", "--resume", "--log_dir=parts")
    assert rest.returncode == 0, rest.stderr
    again = spawn("train_gpt2.py", *RUN, "--log_dir=again")
    assert again.returncode == 0, again.stderr
    a, b, c = ((tmp_path / name / "log.txt").read_text() for name in ("whole", "parts", "again"))
    if a != c:
        pytest.xfail(
            "two runs from the start differ already, by kernels that are not deterministic: "
            f"{unsteady()}"
        )
    assert a == b, "a resumed run is not the run that was not stopped: please report both log.txt"


def unsteady():
    """What torch knows to be not deterministic in a training step."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gradients(small("gpt2"), "cuda", "auto")
    finally:
        torch.use_deterministic_algorithms(False)
    return (
        sorted({str(w.message).partition(" does not have")[0][:80] for w in caught})
        or "none that torch names"
    )


def step(B, T=1024, turns=8):
    """(tokens/s, peak bytes) of training steps of GPT-2 124M, as train_gpt2.py makes them."""
    torch.set_float32_matmul_precision("high")
    torch.cuda.reset_peak_memory_stats()
    model = GPT(GPTConfig(T, VOCAB)).cuda()
    model.compile()
    optimizers = configure_optimizers(model, 0.1, 6e-4)
    x, y = tokens(2, B, T).cuda()
    for turn in range(turns):
        if turn == 2:  # the first two compile and allocate
            torch.cuda.synchronize()
            start = time.perf_counter()
        with pick_autocast("auto", "cuda", cache_weights=False):
            loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    speed = (turns - 2) * B * T / (time.perf_counter() - start)
    return speed, torch.cuda.max_memory_allocated(), model.flops_per_token(T)


def test_memory_and_speed_of_124m():
    free = torch.cuda.mem_get_info()[0]
    B = max(b for b in (1, 2, 4, 8, 16, 32, 64) if b == 1 or 3e9 + b * 0.4e9 < free)
    speed, peak, flops = step(B)
    predicted = (
        2.0e9 + 1.8e9 + B * 0.318e9
    )  # weights, gradients, moments; a chunk of logits; a sequence (README)
    name, full = peak_flops("cuda", torch.bfloat16)
    mfu = speed * flops / full if full else None
    print(
        f"\n{name}: 124M, B={B}: {speed:,.0f} tokens/s, MFU {mfu and round(100 * mfu, 1)}%, "
        f"peak {peak / 1e9:.1f} GB"
    )
    assert peak < 1.15 * predicted, (
        f"{peak / 1e9:.1f} GB, predicted {predicted / 1e9:.1f}: README is wrong"
    )
    if "H100" in name:
        assert mfu > 0.39, (
            "slower than the 450,000 tokens/s expected of an H100: is anything else on this card?"
        )


def test_out_of_memory_halves_B(data, tmp_path):
    """Beside something that leaves too little for --B=64."""
    free = torch.cuda.mem_get_info()[0]
    ballast = torch.empty(max(0, free - int(9e9)), dtype=torch.uint8, device="cuda")
    args = [
        *RUN,
        "--max_steps=1",
        *(f"--{x}_every=0" for x in ("eval", "hellaswag", "ewok", "sample")),
    ]
    result = subprocess.run(
        command("train_gpt2.py", *args), cwd=tmp_path, capture_output=True, text=True
    )
    del ballast
    assert result.returncode == 0, result.stderr
    assert "out of memory with --B=64: halving it" in result.stdout, result.stdout
    assert read_log(tmp_path / "log", "train")


def test_float16(data, spawn, tmp_path):
    result = spawn(
        "train_gpt2.py", *RUN, "--dtype=float16", "--n_layer=2", "--B=8", "--hellaswag_every=0"
    )
    assert result.returncode == 0, result.stderr
    losses = list(read_log(tmp_path / "log", "train").values())
    assert np.isfinite(losses).all() and losses[-1] < losses[0], (
        "float16 does not train: use --dtype=float32"
    )
    assert (
        sum("loss_scale" in record for record in read_jsonl(tmp_path / "log" / "metrics.jsonl"))
        < 10
    )


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_gpus_make_the_run_of_one(data, spawn, tmp_path, fsdp):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU only")
    args = [*RUN, "--n_layer=2", "--hellaswag_every=0", "--B=8"]
    for nproc, name in ((1, "one"), (2, "two")):
        result = spawn(
            "train_gpt2.py", *args, f"--fsdp={fsdp and nproc > 1}", f"--log_dir={name}", nproc=nproc
        )
        assert result.returncode == 0, result.stderr
    one, two = (
        np.array(list(read_log(tmp_path / name, "train").values())) for name in ("one", "two")
    )
    assert abs(one - two).max() < 0.02, f"two GPUs differ from one by {abs(one - two).max()}"


# -- scores and samples ---------------------------------------------------------------
def test_hellaswag_is_the_cpus():
    enc, found, scores = load_tokenizer("bytes"), items(200), []
    for device in ("cuda", "cpu"):
        scores.append(hellaswag.predict(small("gpt2", 1024, device).eval(), enc, found))
    same = np.mean([np.array(a) == np.array(b) for a, b in zip(*scores, strict=True)])
    assert same > 0.98, f"only {same:.1%} of the choices are the CPU's"


def test_samples_three_times_as_fast_as_transformers():
    transformers = pytest.importorskip("transformers")
    ours = sample.prepare_for_sampling(GPT(GPTConfig()).cuda(), "auto", "cuda")
    theirs = (
        transformers.GPT2LMHeadModel(transformers.GPT2Config())
        .to("cuda", ours.lm_head.weight.dtype)
        .eval()
    )
    idx, times = torch.arange(16, device="cuda")[None], {}

    def made_by(name):
        torch.cuda.synchronize()
        start = time.perf_counter()
        if name == "ours":
            with eager_mode(), torch.inference_mode():
                for _ in ours.generate(idx, 128, temperature=0.8, top_k=200):
                    pass
        else:
            theirs.generate(
                idx,
                max_new_tokens=128,
                min_new_tokens=128,
                do_sample=True,
                top_k=200,
                pad_token_id=0,
            )
        torch.cuda.synchronize()
        times.setdefault(name, []).append(time.perf_counter() - start)

    for name in ["ours", "theirs"] * 4:
        made_by(name)
    ratio = min(times["theirs"][1:]) / min(times["ours"][1:])
    print(
        f"\nsampling: {128 / min(times['ours'][1:]):,.0f} tokens/s, {ratio:.2f} times transformers'"
    )
    assert ratio > 3, f"only {ratio:.2f} times transformers': please report the card"
