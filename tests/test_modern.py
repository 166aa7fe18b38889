"""The model's optional parts, against transformers and brute force; optimizers and schedules."""

import itertools
import os
import re
import signal

from conftest import MODERN_PARTS, TEXT, read_jsonl, read_log
from data.loader import MixtureLoader, ShardLoader, parse_mixture
from data.shards import Shards
from data.tokenizer import load_tokenizer
import export
from fineweb import write_shards
from model import GPT, GPTConfig
from scoring import score_completions
from script import UserError
from test_train import SMALL, assert_same_run
from training import presets
from training.optimizers import configure_optimizers
from weights import load_checkpoint

import numpy as np
import pytest
import torch
from torch.nn import functional as F
import transformers

CHOICES = {
    "pos": ("learned", "rope"),
    "norm": ("layernorm", "rmsnorm", "rmsnorm_noaffine"),
    "mlp": ("gelu", "swiglu", "relu2"),
    "qk_norm": (False, True),
    "bias": (False, True),
}
COMBINATIONS = [
    dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())
]
# The embedding's norm, the cap of the logits and the output layer touch no other part: in turn.
ENDS = itertools.cycle(itertools.product((False, True), (0.0, 0.5), (False, True)))
COMBINATIONS = [
    c | dict(zip(("embd_norm", "softcap", "tie_embeddings"), next(ENDS), strict=True))
    for c in COMBINATIONS
]


def random_model(block_size=24, n_layer=2, n_head=2, n_embd=32, vocab_size=257, **settings):
    """A model with weights far from their initial zeros and ones."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, **settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def random_ids(B, T):
    return torch.randint(0, 256, (B, T), generator=torch.Generator().manual_seed(1))


NANOCHAT = dict(norm="rmsnorm_noaffine", embd_norm=True, qk_norm=True)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Llama", dict(norm="rmsnorm", mlp="swiglu")),
        ("NanoChat", NANOCHAT | dict(mlp="relu2", softcap=0.5, tie_embeddings=False)),
        ("NanoChat", NANOCHAT | dict(mlp="gelu")),
    ],
)
def test_modern_models_in_transformers(tmp_path, name, settings):
    model = random_model(n_embd=48, n_head=3, pos="rope", bias=False, **settings)
    enc = load_tokenizer("bytes")
    export.write_folder(model, enc, str(tmp_path / "hf"), torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(theirs).__name__ == f"{name}ForCausalLM"
    assert sum(p.numel() for p in theirs.parameters()) == model.num_params()
    x = random_ids(3, 24)
    torch.testing.assert_close(model(x), theirs(x).logits, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        ours = torch.stack(list(model.generate(x[:, :5], 15, temperature=0)), dim=1)
        expected = theirs.generate(
            x[:, :5],
            attention_mask=torch.ones(3, 5),
            max_new_tokens=15,
            do_sample=False,
            eos_token_id=None,
        )
    assert torch.equal(ours, expected[:, 5:])
    model(x, x).backward()
    theirs(input_ids=x, labels=x).logits.log_softmax(-1).gather(
        2, x[..., None]
    ).mean().neg().backward()
    q = theirs.model.layers[1].self_attn.q_proj.weight.grad
    ours = model.transformer.h[1].attn.c_attn.weight.grad[:48]
    torch.testing.assert_close(
        ours.abs(), q.abs(), atol=1e-5, rtol=1e-4
    )  # NanoChat's RoPE turns the other way


def by_hand(model, idx):
    """The logits of one sequence idx (T,), a position and a head at a time, in float64."""
    c, w = model.config, {name: p.detach().double() for name, p in model.named_parameters()}

    def normed(x, name):
        if c.norm == "rmsnorm_noaffine":
            return x / (x.square().mean() + 1e-6).sqrt()
        if c.norm == "rmsnorm":
            return x / (x.square().mean() + 1e-5).sqrt() * w[name + ".weight"]
        x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * w[name + ".weight"]
        return x + w.get(name + ".bias", 0)

    def linear(x, name):
        return w[name + ".weight"] @ x + w.get(name + ".bias", 0)

    def turned(x, position):
        z = torch.complex(*x.view(2, -1))
        angle = torch.tensor(
            [position / 10_000 ** (i / len(z)) for i in range(len(z))], dtype=torch.float64
        )
        z = z * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag))

    xs = [w["transformer.wte.weight"][i] for i in idx]
    if c.pos == "learned":
        xs = [x + w["transformer.wpe.weight"][t] for t, x in enumerate(xs)]
    if c.embd_norm:
        xs = [normed(x, "transformer.ln_e") for x in xs]
    size = c.n_embd // c.n_head
    for layer in range(c.n_layer):
        name = f"transformer.h.{layer}"
        heads = []  # of each position: q, k, v (n_head, size)
        for t, x in enumerate(xs):
            qkv = (
                linear(normed(x, name + ".ln_1"), name + ".attn.c_attn")
                .view(3, c.n_head, size)
                .clone()
            )
            for kind, part in enumerate("qk"):
                for h in range(c.n_head):
                    row = qkv[kind, h]
                    if c.qk_norm and c.norm == "rmsnorm_noaffine":
                        row = normed(row, "")
                    elif c.qk_norm:
                        row = (
                            row
                            / (row.square().mean() + 1e-5).sqrt()
                            * w[f"{name}.attn.{part}_norm.weight"]
                        )
                    qkv[kind, h] = turned(row, t) if c.pos == "rope" else row
            heads.append(qkv)
        for t in range(len(xs)):
            out = []
            for h in range(c.n_head):
                scores = torch.stack(
                    [heads[t][0, h] @ heads[s][1, h] / size**0.5 for s in range(t + 1)]
                )
                out.append(sum(p * heads[s][2, h] for s, p in enumerate(scores.softmax(0))))
            xs[t] = xs[t] + linear(torch.cat(out), name + ".attn.c_proj")
            x = linear(normed(xs[t], name + ".ln_2"), name + ".mlp.c_fc")
            if c.mlp == "swiglu":
                gate, x = x.chunk(2)
                x = gate * gate.sigmoid() * x
            elif c.mlp == "relu2":
                x = x.clamp(min=0) ** 2
            else:
                x = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
            xs[t] = xs[t] + linear(x, name + ".mlp.c_proj")
    head = w["transformer.wte.weight" if c.tie_embeddings else "lm_head.weight"]
    logits = [head[: c.vocab_size] @ normed(x, "transformer.ln_f") for x in xs]
    return torch.stack([c.softcap * torch.tanh(z / c.softcap) if c.softcap else z for z in logits])


@pytest.mark.parametrize("settings", COMBINATIONS, ids=lambda s: "-".join(map(str, s.values())))
def test_every_combination(settings):
    """Against arithmetic by hand; cached and uncached generation; scoring against whole rows."""
    model, (idx,) = random_model(**settings), random_ids(1, 9)
    torch.testing.assert_close(
        model(idx[None])[0].double(), by_hand(model, idx), atol=1e-4, rtol=1e-4
    )

    x = random_ids(2, 6)
    for token in model.generate(x, 14, temperature=0):
        assert torch.equal(token, model(x)[:, -1].argmax(-1))
        x = torch.cat((x, token[:, None]), dim=1)

    pairs = [([1, 2, 3], [4, 5]), ([1, 2, 3], [6]), ([1, 2, 3], [7, 8, 9, 10]), ([11], [12, 13])]
    sums, _ = score_completions(model, pairs)
    for (context, completion), total in zip(pairs, sums.tolist(), strict=True):
        log_probs = model(torch.tensor([context + completion]))[0].log_softmax(-1)
        expected = sum(log_probs[len(context) - 1 + i, token] for i, token in enumerate(completion))
        assert total == pytest.approx(expected.item(), abs=1e-4)


def test_compiled_is_eager():
    """In one graph, with the gradients; by the compiler's own front, which needs no C++."""
    model, x = random_model(**MODERN_PARTS | {"softcap": 0.5}), random_ids(2, 20)
    results = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        loss = forward(x, x.roll(-1, 1))
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)


def test_bfloat16_weights_make_no_noise(recwarn):
    """As sample.py uses them: no warning, and about what float32 says."""
    model, x = random_model(**MODERN_PARTS), random_ids(2, 20)
    expected = model(x)
    assert F.cosine_similarity(model.bfloat16()(x).float(), expected, dim=-1).min() > 0.99
    assert not recwarn.list


def test_swiglu_has_as_many_parameters():
    counts = [
        GPT(GPTConfig(64, 257, 4, 4, 192, mlp=mlp)).num_params() for mlp in ("gelu", "swiglu")
    ]
    assert counts[1] == pytest.approx(counts[0], rel=2e-3)


def test_export_says_what_no_architecture_has(tmp_path):
    model = random_model(pos="rope", mlp="relu2")
    with pytest.raises(UserError, match=r"no architecture .* pos=rope, .*mlp=relu2.*--format=pt"):
        export.write_folder(model, load_tokenizer("bytes"), str(tmp_path / "hf"), torch.float32)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("choice", ["pos=rotary", "norm=batchnorm", "mlp=relu"])
def test_unknown_parts(run, choice):
    with pytest.raises(SystemExit, match=choice + ": choose .* or "):
        run("train_gpt2.py", f"--{choice}", "--preset=tiny", "--max_steps=1")


# -- the loss in parts ---------------------------------------------------------------


@pytest.mark.parametrize("softcap", [0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_in_parts_is_cross_entropy(dtype, softcap):
    """1,300 rows are two and a half parts; some targets are -1; 24 rows are padding."""
    model = random_model(block_size=130, n_layer=1, n_embd=64, vocab_size=1000, softcap=softcap)
    x = torch.randint(1000, (10, 130), generator=torch.Generator().manual_seed(2))
    targets = x.roll(-1, 1).masked_fill(x % 7 == 0, -1)
    results = []
    for whole in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            if whole:
                loss = F.cross_entropy(
                    model(x).float().flatten(0, 1), targets.flatten(), ignore_index=-1
                )
            else:
                loss = model(x, targets)
        (3 * loss).backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (loss, grads), (expected, theirs) = results
    rough = dtype == torch.bfloat16
    torch.testing.assert_close(loss, expected, rtol=2e-3 if rough else 1e-6, atol=0)
    assert torch.all(grads["transformer.wte.weight"][1000:] == 0), "padding learns nothing"
    for name, grad in grads.items():
        error = (grad - theirs[name]).norm() / theirs[name].norm()
        assert error < (0.05 if rough else 1e-5), name
    with torch.no_grad():
        assert model(x, targets).item() == pytest.approx(
            results[0][0].item(), rel=5e-3 if rough else 1e-6
        )


# -- optimizers and schedules ---------------------------------------------------------


def test_muon_has_the_matrices_of_the_blocks():
    model = random_model(qk_norm=True, mlp="swiglu")
    adamw, muon = configure_optimizers(model, 0.1, 1e-3, optimizer="muon")
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert matrices == {
        n
        for n in names.values()
        if ".h." in n and n.endswith("weight") and "_norm" not in n and ".ln_" not in n
    }
    rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert rest | matrices == set(names.values()) and not rest & matrices


def test_muon_orthogonalises():
    """An update is close to U V^T of the gradient, of the size that AdamW's would have."""
    model = random_model(n_embd=64)
    _, muon = configure_optimizers(model, 0.0, 1e-2, optimizer="muon")
    p = model.transformer.h[0].attn.c_proj.weight
    before = p.detach().clone()
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    muon.step()
    update = (before - p.detach()) / (1e-2 * 0.2 * 64**0.5)
    singular = torch.linalg.svdvals(update)
    assert (
        singular[:-2].min() > 0.6 and singular.max() < 1.3
    )  # of a random square, the last are near 0
    U, _, V = torch.linalg.svd(p.grad)
    assert F.cosine_similarity(update.flatten(), (U @ V).flatten(), dim=0) > 0.95
    assert update.square().mean().sqrt() == pytest.approx(64**-0.5, rel=0.15)


def test_muon_is_muon_of_each_matrix():
    """Three steps of every matrix: as torch.optim.Muon and NorMuon make them of q, k, ... alone."""
    model = random_model(mlp="swiglu", n_layer=3)
    _, muon = configure_optimizers(model, 0.1, 1e-2, optimizer="muon")
    parts = {"c_attn": 3, "c_fc": 2, "attn.c_proj": 1, "mlp.c_proj": 1}
    pairs = []  # (a slice of a parameter of ours, torch's)
    for name, p in model.transformer.h.named_parameters():
        for kind, n in parts.items():
            if p.dim() == 2 and kind in name:
                pairs += [
                    (kind, p, i, n, torch.nn.Parameter(x.clone()))
                    for i, x in enumerate(p.detach().chunk(n))
                ]
    assert len(pairs) == 3 * 7
    theirs = {}
    for kind, *_, q in pairs:
        theirs.setdefault(kind, []).append(q)
    how = {"weight_decay": 0.0, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    theirs = [
        torch.optim.Muon(qs, 5e-3 if kind == "mlp.c_proj" else 1e-2, **how)
        for kind, qs in theirs.items()
    ]
    for group in muon.param_groups:
        group["lr"] *= group.get("lr_scale", 1)
    for step in range(3):
        torch.manual_seed(step)
        for p in model.transformer.h.parameters():
            p.grad = torch.randn_like(p)
        for _, p, i, n, q in pairs:
            q.grad = p.grad.chunk(n)[i].clone()
            q.before = q.detach().clone()
        for optimizer in (muon, *theirs):
            optimizer.step()
        for kind, _, _, _, q in pairs:
            change = (q.before - q.detach()).double()
            now = change.square().mean(0 if q.size(0) < q.size(1) else 1, keepdim=True)
            q.squares = 0.95 * getattr(q, "squares", 0) + 0.05 * now
            scaled = change / q.squares.sqrt()
            decayed = q.before * (1 - 0.1 * (5e-3 if kind == "mlp.c_proj" else 1e-2))
            q.data = decayed - (scaled * change.norm() / scaled.norm()).float()
    for kind, p, i, n, q in pairs:
        torch.testing.assert_close(p.chunk(n)[i], q, atol=3e-4, rtol=0, msg=kind)


def rates(run, tmp_path, *args):
    """The learning rate of each step of a run, from metrics.jsonl; the run's output."""
    (tmp_path / "input.txt").write_text(TEXT)
    small = [
        "--n_layer=1",
        "--n_embd=32",
        "--T=16",
        "--B=2",
        "--total_batch_size=32",
        "--sample_every=0",
    ]
    fixed = [
        "--max_lr=1e-2",
        "--min_lr=1e-3",
        "--warmup_steps=4",
        "--save_every=0",
        "--val_tokens=64",
    ]
    out = run("train_gpt2.py", "--preset=tiny", *small, *fixed, *args)
    records = read_jsonl(tmp_path / "log" / "metrics.jsonl")
    return [r["lr"] for r in records if r["kind"] == "train"], out


def test_wsd(run, tmp_path):
    lrs, _ = rates(run, tmp_path, "--schedule=wsd", "--max_steps=20", "--cooldown_steps=9")
    assert lrs == pytest.approx(
        [0.0025, 0.005, 0.0075] + [0.01] * 9 + [0.009 - 0.001 * i for i in range(8)]
    )


# -- processes, resuming ----------------------------------------------------------------

MODERN = [f"--{key}={value}" for key, value in presets.MODERN.items()]


@pytest.mark.parametrize(
    ("optimizer", "schedule"), [("adamw", "wsd"), ("muon", "wsd"), ("muon", "cosine")]
)
def test_resumed_with_every_optimizer_and_schedule(
    run, shards, tmp_path, at_step, optimizer, schedule
):
    args = [
        *SMALL,
        *MODERN,
        f"--optimizer={optimizer}",
        f"--schedule={schedule}",
        "--cooldown_steps=3",
    ]
    args += [
        "--max_steps=14",
        "--eval_every=1",
        "--max_lr=1e-5",
        "--min_lr=0",
        "--sample_every=0",
    ]
    run("train_gpt2.py", *args)
    last = max(read_log(tmp_path / "log", "val"))
    assert last == 14
    for k in (2, last - 2):
        at_step(k, lambda: os.kill(os.getpid(), signal.SIGINT))
        run("train_gpt2.py", *args, f"--log_dir=stopped{k}")
        at_step(-1, None)
        run("train_gpt2.py", "--resume", f"--log_dir=stopped{k}")
        assert_same_run(tmp_path / "log", tmp_path / f"stopped{k}", last)


def test_muon_on_two_ranks_is_muon_on_one(run, spawn, shards, tmp_path):
    """Losses, weights and momenta; and a run goes on from one to two ranks and back."""
    run("train_gpt2.py", *SMALL, *MODERN)
    result = spawn("train_gpt2.py", *SMALL, *MODERN, "--log_dir=two", nproc=2)
    assert result.returncode == 0, result.stderr
    for kind in ("train", "val"):
        assert read_log(tmp_path / "two", kind) == pytest.approx(
            read_log(tmp_path / "log", kind), abs=2e-4
        )
    one, two = (
        load_checkpoint(str(tmp_path / x / "resume.pt"))["optimizers"][1]["state"]
        for x in ("log", "two")
    )
    assert one.keys() == two.keys()
    for i, state in one.items():
        for key, a in state.items():
            assert (a - two[i][key]).norm() < 0.02 * a.norm(), (
                f"every rank's share of {key} is in the checkpoint"
            )
    run("train_gpt2.py", "--resume", "--log_dir=two", "--max_steps=10")
    run("train_gpt2.py", "--resume", "--max_steps=10")
    assert read_log(tmp_path / "two", "train") == pytest.approx(
        read_log(tmp_path / "log", "train"), abs=5e-4
    )


def test_fsdp_in_bfloat16_with_layernorm(run, spawn, shards, tmp_path):
    """The weights of the norms are bfloat16 then, their input may not be."""
    args = [*SMALL, "--dtype=bfloat16", "--max_steps=3"]
    run("train_gpt2.py", *args)
    result = spawn("train_gpt2.py", *args, "--fsdp=True", "--log_dir=two", nproc=2)
    assert result.returncode == 0, result.stderr
    assert read_log(tmp_path / "two", "train") == pytest.approx(
        read_log(tmp_path / "log", "train"), abs=0.02
    )


def test_fsdp_is_ddp_is_one_process(run, spawn, shards, tmp_path):
    """A run goes from one process to FSDP on two and four, to DDP and back: the losses of one."""
    args = [
        *SMALL,
        *MODERN,
        "--max_steps=12",
        "--min_lr=1e-2",
        "--cooldown_steps=0",
        "--sample_every=4",
    ]
    args += ["--activation_checkpointing=True"]
    run("train_gpt2.py", *args)
    for stop, nproc, fsdp in ((3, 1, True), (6, 2, True), (9, 4, True), (12, 2, False)):
        now = [*args, f"--max_steps={stop}", "--log_dir=chain", "--resume", f"--fsdp={fsdp}"]
        if nproc == 1:
            run("train_gpt2.py", *now)
        else:
            result = spawn("train_gpt2.py", *now, nproc=nproc)
            assert result.returncode == 0, result.stderr
            assert "UserWarning" not in result.stderr
    for kind in ("train", "val"):
        # Muon makes the small gradients of the first steps, and their rounding, as large as any
        assert read_log(tmp_path / "chain", kind) == pytest.approx(
            read_log(tmp_path / "log", kind), abs=2e-3
        )
    run("train_gpt2.py", "--resume", "--log_dir=chain", "--max_steps=13")
    run("sample.py", "--log_dir=chain", "--max_new_tokens=3")


# -- mixtures ---------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path):
    """Three folders of byte shards, a, b and c, of texts that differ."""
    for name in "abc":
        texts = [line.replace("e", name) for line in TEXT.splitlines(keepends=True)]
        write_shards(
            texts,
            load_tokenizer("bytes"),
            str(tmp_path / name),
            name,
            2000,
            dataset=name,
            subset=None,
            seed=0,
        )


def mixture(tmp_path, monkeypatch, data_dir, T=32):
    monkeypatch.chdir(tmp_path)
    weights = parse_mixture(data_dir)
    return MixtureLoader(
        [ShardLoader(Shards(folder), T, 7) for folder in weights], list(weights.values())
    )


@pytest.mark.parametrize(
    "data_dir", ["a:0.7,b:0.3", "a:1,b:2,c:3", "a:0.9999,c:0.0001", "a:0.15,b:0.35,c:0.5"]
)
def test_proportions_are_exact_at_every_step(tmp_path, monkeypatch, sources, data_dir):
    loader, weights = (
        mixture(tmp_path, monkeypatch, data_dir),
        list(parse_mixture(data_dir).values()),
    )
    assert sum(weights) == 1
    for n in range(25_000):
        counts = loader.counts_before(n)
        assert sum(counts) == n
        assert all(
            abs(count - n * weight) < 2 for count, weight in zip(counts, weights, strict=True)
        )


def test_a_mixture_reads_each_source_in_its_own_order(tmp_path, monkeypatch, sources):
    loader = mixture(tmp_path, monkeypatch, "a:0.7,b:0.2,c:0.1")
    read = [loader.read(n).tobytes() for n in range(500)]
    for source, count in zip(loader.loaders, loader.counts_before(500), strict=True):
        alone = {source.read(n).tobytes(): n for n in range(count)}
        assert [alone[x] for x in read if x in alone] == list(range(count))
    assert loader.counts_before(500) == [350, 100, 50]
    together = np.concatenate(list(loader.batches(40, 16, 4)))
    ranks = [list(loader.batches(40, 16, 4, rank, 2)) for rank in range(2)]
    assert np.array_equal(
        together, np.concatenate([ranks[0][0], ranks[1][0], ranks[0][1], ranks[1][1]])
    )
    seen = list(loader.exposure(0, 500))
    for name, count in zip("abc", (350, 100, 50), strict=True):
        ranges = [span for r in seen if r["data_dir"] == name for span in r["tokens"]]
        assert sum(end - start for start, end in ranges) == count * 32


def test_a_run_on_a_mixture(run, spawn, sources, tmp_path, at_step):
    """Stopped and resumed bit for bit, elastic, validated on each source and on the mixture."""
    args = [*SMALL, "--data_dir=a:0.7,b:0.3", "--exposure_every=1"]
    out = run("train_gpt2.py", *args)
    assert "steps per epoch of b, 30.00% of the tokens" in out
    val = [r for r in read_jsonl(tmp_path / "log" / "metrics.jsonl") if r["kind"] == "val"][-1]
    assert val["loss"] == pytest.approx(0.7 * val["sources"]["a"] + 0.3 * val["sources"]["b"])
    alone = run(
        "train_gpt2.py",
        "--preset=tiny",
        "--data_dir=b",
        "--eval_only=True",
        "--T=32",
        "--dtype=float32",
    )
    assert float(re.search(r"loss (\d\.\d+)", alone)[1]) == pytest.approx(
        val["sources"]["b"], abs=1e-4
    )
    for k in (2, 5):
        at_step(k, lambda: os.kill(os.getpid(), signal.SIGINT))
        run("train_gpt2.py", *args, f"--log_dir=stopped{k}")
        at_step(-1, None)
        run("train_gpt2.py", "--resume", f"--log_dir=stopped{k}")
        assert_same_run(tmp_path / "log", tmp_path / f"stopped{k}")
    result = spawn("train_gpt2.py", *args, "--log_dir=two", nproc=2)
    assert result.returncode == 0, result.stderr
    assert read_log(tmp_path / "two", "val") == pytest.approx(
        read_log(tmp_path / "log", "val"), abs=2e-4
    )
    assert (tmp_path / "two" / "exposure.jsonl").read_text() == (
        tmp_path / "log" / "exposure.jsonl"
    ).read_text()
    with pytest.raises(SystemExit, match="the run in log has another mixture; leave it out"):
        run("train_gpt2.py", "--resume", "--data_dir=a:0.6,b:0.4")


@pytest.mark.parametrize(
    "data_dir", ["a:0.7,b", "a:x,b:1", ":1,b:1", "a:0.5,a:0.5", "a:0,b:1", "a:1,b:0.333333"]
)
def test_what_is_no_mixture(run, sources, data_dir):
    with pytest.raises(SystemExit, match=r"a mixture such as|names a folder twice|four decimals"):
        run("train_gpt2.py", *SMALL, f"--data_dir={data_dir}")


def test_a_mixture_of_two_tokenizers(run, sources, tmp_path):
    (tmp_path / "b" / "meta.json").write_text(
        (tmp_path / "b" / "meta.json")
        .read_text()
        .replace('"tokenizer": "bytes"', '"tokenizer": "odd"')
    )
    with pytest.raises(SystemExit, match="odd"):
        run("train_gpt2.py", *SMALL, "--data_dir=a:1,b:1")
