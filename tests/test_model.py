"""The model against transformers' GPT-2, its cache against a plain forward, damaged files."""

import itertools
import json
import os
import re
import shutil
from unittest import mock

from conftest import MODERN_PARTS
from data.tokenizer import load_tokenizer
from device import pick_device, pick_dtype
import kernels
from kernels import LinearCrossEntropy, RMSNormalize
from model import (
    GPT,
    GPTConfig,
    load_model,
    sample_token,
)
from sample import stream_text
from script import UserError
from training.optimizers import configure_optimizers
from weights import load_checkpoint

import pytest
import torch
from torch.nn import functional as F
import transformers

SHAPES = {
    "small": dict(n_layer=2, n_head=2, n_embd=64, n_positions=48, vocab_size=257),
    "wide": dict(n_layer=3, n_head=4, n_embd=96, n_positions=20, vocab_size=50257),
    "padded": dict(n_layer=1, n_head=3, n_embd=48, n_positions=16, vocab_size=50304),
}


def hf_model(shape, cls=transformers.GPT2LMHeadModel):
    """A transformers model with weights far from their initial zeros and ones."""
    torch.manual_seed(0)
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = cls(
        transformers.GPT2Config(**SHAPES[shape], **no_dropout, bos_token_id=0, eos_token_id=0)
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module", params=list(SHAPES))
def pair(request, tmp_path_factory):
    """(transformers' model, ours from the folder it saved)."""
    folder = tmp_path_factory.mktemp(request.param)
    reference = hf_model(request.param)
    reference.save_pretrained(folder)
    return reference, GPT.from_pretrained(str(folder))


def random_ids(model, B, T):
    return torch.randint(
        0, model.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(1)
    )


def test_logits_loss_and_gradients_equal_transformers(pair):
    reference, model = pair
    T = model.config.block_size
    x = random_ids(model, 3, T)
    targets = x.roll(-1, dims=1)
    expected = reference(x).logits
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)

    expected_loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    loss = model(x, targets)
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)

    model.zero_grad()
    reference.zero_grad()
    loss.backward()
    expected_loss.backward()
    theirs = dict(reference.named_parameters())
    ours = dict(model.named_parameters())
    assert theirs.keys() == ours.keys()
    for name, p in ours.items():
        expected = theirs[name].grad
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            expected = expected.t()  # Conv1D
        torch.testing.assert_close(
            p.grad[: len(expected)], expected, atol=1e-4, rtol=1e-4, msg=name
        )


def test_targets_of_minus_one_do_not_count(pair):
    _, model = pair
    x = random_ids(model, 2, 8)
    y = x.roll(-1, dims=1)
    y[1] = -1
    torch.testing.assert_close(model(x, y), model(x[:1], y[:1]))


def test_greedy_generation_equals_transformers_and_no_cache(pair):
    reference, model = pair
    prompt = random_ids(model, 2, 5)
    n = model.config.block_size - 5
    ours = torch.stack(list(model.generate(prompt, n, temperature=0)), dim=1)
    theirs = reference.generate(
        prompt,
        max_new_tokens=n,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        attention_mask=prompt * 0 + 1,
    )
    assert torch.equal(ours, theirs[:, 5:])
    idx = prompt
    for _ in range(n):
        idx = torch.cat((idx, model(idx)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(ours, idx[:, 5:])


def test_cache_in_pieces_equals_one_forward(pair):
    _, model = pair
    x = random_ids(model, 2, 16)
    expected = model(x)
    for cuts in ([0, 16], [0, 7, 16], [0, 1, 2, 9, 10, 16]):
        cache = model.new_cache(2, 16)
        with torch.no_grad():
            parts = [
                model.logits(model.hidden(x[:, a:b], cache, a)) for a, b in itertools.pairwise(cuts)
            ]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_generation_past_the_context(pair):
    """When the context is full its newer half is read again: against that rule without a cache."""
    _, model = pair
    size = model.config.block_size
    prompt = random_ids(model, 1, size + 3)  # of a prompt that is too long the end counts
    ours = torch.cat(list(model.generate(prompt, 2 * size, temperature=0))).tolist()
    context, expected = prompt[0].tolist()[-size:], []
    for _ in range(2 * size):
        if len(context) > size:
            context = context[-(size // 2 + 1) :]
        token = model(torch.tensor([context]))[0, -1].argmax().item()
        expected.append(token)
        context.append(token)
    assert ours == expected


def test_samples_share_a_prompt_and_differ(pair):
    _, model = pair
    prompt = random_ids(model, 1, 4)

    def draw(num_samples, seed):
        rng = torch.Generator().manual_seed(seed)
        return torch.stack(list(model.generate(prompt, 6, num_samples, generator=rng)), dim=1)

    assert draw(3, 1).shape == (3, 6)
    assert torch.equal(draw(3, 1), draw(3, 1)) and not torch.equal(draw(3, 1), draw(3, 2))
    greedy = torch.stack(list(model.generate(prompt, 6, 3, temperature=0)), dim=1)
    alone = torch.stack(list(model.generate(prompt, 6, temperature=0)), dim=1)
    assert torch.equal(greedy, alone.expand(3, -1))


def test_sample_token_draws_what_it_should():
    probs = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
    logits = probs.log()[torch.tensor([3, 0, 4, 1, 2])]  # not in order
    order = [1, 3, 4, 0, 2]  # where each of probs went
    rng = torch.Generator().manual_seed(0)
    for settings, kept in (
        (dict(), 5),
        (dict(top_k=2), 2),
        (dict(top_k=9), 5),
        (dict(top_p=0.5), 1),
        (dict(top_p=0.51), 2),
        (dict(top_p=0.9), 3),
        (dict(top_k=3, top_p=0.8), 2),  # of the renormalised three: 0.56, 0.28, 0.17
        (dict(temperature=0), 1),
        (dict(top_p=1e-9), 1),
    ):
        draws = sample_token(logits.repeat(20000, 1), **settings, generator=rng)
        found = torch.bincount(draws, minlength=5)[order] / 20000
        expected = torch.where(torch.arange(5) < kept, probs, 0.0)
        torch.testing.assert_close(
            found, expected / expected.sum(), atol=0.015, rtol=0, msg=str(settings)
        )
    hot = sample_token(logits.repeat(20000, 1), temperature=2.0, generator=rng)
    expected = probs.sqrt() / probs.sqrt().sum()
    torch.testing.assert_close(torch.bincount(hot)[order] / 20000, expected, atol=0.015, rtol=0)


def test_ids_behind_the_tokenizer_are_never_drawn(pair):
    _, model = pair
    rng = torch.Generator().manual_seed(0)
    draws = torch.cat(
        list(model.generate(random_ids(model, 1, 3), 10, 8, vocab_size=5, generator=rng))
    )
    assert draws.max() < 5


def test_stream_text_ends_at_endoftext_and_joins_split_characters():
    enc = load_tokenizer("bytes")
    script = [*"é".encode(), *"日".encode(), 256, 65], [65, 66, 67, 68, 69, 70, 71]

    class Scripted:
        transformer = torch.nn.ModuleDict({"wte": torch.nn.Embedding(1, 1)})

        def generate(self, idx, max_new_tokens, num_samples, vocab_size):
            assert idx.tolist() == [[256]] and vocab_size == 257
            yield from torch.tensor(script).T[:max_new_tokens]

    pieces = list(stream_text(Scripted(), enc, "", 7, num_samples=2))
    assert ["".join(column) for column in zip(*pieces, strict=True)] == ["é日", "ABCDEFG"]
    assert [p[0] for p in pieces[:3]] == ["", "é", ""]
    cut = list(stream_text(Scripted(), enc, "", 3, num_samples=2))
    assert ["".join(column) for column in zip(*cut, strict=True)] == ["é\ufffd", "ABC"]


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "count"),
    [(12, 12, 768, 124_439_808), (24, 16, 1024, 354_823_168), (48, 25, 1600, 1_557_611_200)],
)
def test_sizes_are_the_released_ones(n_layer, n_head, n_embd, count):
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    assert model.num_params() == count
    assert model.transformer.wte.num_embeddings == 50304


def test_flops_are_what_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = GPT(GPTConfig(block_size=128, vocab_size=512, n_layer=3, n_head=4, n_embd=128))
    x = random_ids(model, 2, 128)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, x).backward()
    assert counter.get_total_flops() == pytest.approx(
        model.flops_per_token(128) * x.numel(), rel=0.02
    )


def test_initialisation():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_head=4, n_embd=256, vocab_size=1000))
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / 4, rel=0.05)  # 2 * 8 additions
        elif p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.05)
        else:
            assert torch.all(
                p == (1 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0)
            )
    x = random_ids(model, 4, 64)
    assert model(x, x.roll(-1, 1)).item() == pytest.approx(
        torch.tensor(1000.0).log().item(), abs=0.1
    )
    assert model.lm_head.weight is model.transformer.wte.weight


def test_weight_decay_is_on_matrices_only():
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=100))
    (adamw,) = configure_optimizers(model, 0.1, 1e-3)
    decayed, other = adamw.param_groups
    assert (decayed["weight_decay"], other["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        n for n in names.values() if n.endswith(".weight") and ".ln_" not in n
    }
    assert len(decayed["params"]) + len(other["params"]) == len(names)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        MODERN_PARTS | {"zero_init": False},
        {"norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recomputing_changes_no_gradient(settings, dtype, monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 100, n_layer=1, n_head=2, n_embd=128, **settings))
    x = random_ids(model, 270, 64)  # large enough for kernels.run_block
    checkpoint = mock.Mock(wraps=torch.utils.checkpoint.checkpoint)
    gradients = []
    for stand_in in (checkpoint, lambda function, *args, **_: function(*args)):
        monkeypatch.setattr(kernels, "checkpoint", stand_in)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False):
            loss = model(x[:, :-1], x[:, 1:])
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert checkpoint.call_count == 1  # of one block
    torch.testing.assert_close(*gradients, atol=0, rtol=0)


def test_rms_normalize():
    """Of heads as slices of a fused product, one zero, against autograd and finite differences."""
    x = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x[..., 8:].view(2, 5, 2, 8).transpose(1, 2)
    assert torch.autograd.gradcheck(RMSNormalize.apply, (x.detach().requires_grad_(), 1e-6))
    x[0, 0, 0] = 0
    x.requires_grad_()
    both = (RMSNormalize.apply(x, 1e-6), F.rms_norm(x, x.shape[-1:], None, 1e-6))
    results = [(y, *torch.autograd.grad((y * y.detach().cos()).sum(), x)) for y in both]
    torch.testing.assert_close(*results, atol=1e-12, rtol=1e-9)


def test_the_loss_in_float16_sums_many_rows():
    """4,096 rows of one target: their gradients add up to more than float16 holds."""
    torch.manual_seed(0)
    x, weight = torch.full((4096, 8), 40.0) + torch.randn(4096, 8), torch.randn(64, 8) * 0.02
    targets, gradients = torch.full((4096,), 3), []
    for dtype in (torch.float32, torch.float16):
        w = weight.clone().requires_grad_()
        loss, _ = LinearCrossEntropy.apply(x.to(dtype).requires_grad_(), w, targets, 60, 0, True)
        gradients.append(torch.autograd.grad(loss, w)[0])
    assert gradients[0].abs().max() * 4096 > 65504
    torch.testing.assert_close(*gradients, atol=0.05, rtol=0.01)


# -- Hugging Face folders and checkpoints ------------------------------------------


def test_every_form_of_hugging_face_folder(tmp_path):
    reference = hf_model("small")
    x = torch.arange(40)[None]
    expected = reference(x).logits
    reference.save_pretrained(tmp_path / "whole")
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="100kB")
    reference.transformer.save_pretrained(tmp_path / "bare")
    for name in ("bin", "bin_sharded"):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
    state = {k: v.clone() for k, v in reference.state_dict().items()}
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 48, 48)  # as old versions saved the mask
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    names = sorted(state)
    parts = {"a.bin": names[::2], "b.bin": names[1::2]}
    for part, keys in parts.items():
        torch.save({k: state[k] for k in keys}, tmp_path / "bin_sharded" / part)
    index = {"weight_map": {k: part for part, keys in parts.items() for k in keys}}
    (tmp_path / "bin_sharded" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for name in ("whole", "sharded", "bare", "bin", "bin_sharded"):
        model, enc = load_model(str(tmp_path / name))
        assert enc.name == "bytes" and not model.training
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4, msg=name)


class Evil:
    def __reduce__(self):
        return (open, ("pwned", "w"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "model_type",
            "gpt_neo",
            r"model_type=gpt_neo in config\.json; known are gpt2, ",
        ),
        (
            "activation_function",
            "relu",
            r"activation_function=relu; this project supports gelu_new",
        ),
        ("n_inner", 7, r"n_inner=7; this project supports None"),
        ("n_layer", 3, r"its weights are not those of a GPT-2 with"),
        ("n_embd", 32, r"its weights are not those of a GPT-2 with"),
    ],
)
def test_other_hugging_face_models_are_refused(tmp_path, key, value, message):
    hf_model("small").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path))


def test_damaged_hugging_face_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        load_model(str(tmp_path))
    hf_model("small").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no model\.safetensors or pytorch_model\.bin"):
        load_model(str(tmp_path))
    torch.save({"x": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: refused"):
        load_model(str(tmp_path))
    assert not (tmp_path / "pwned").exists()


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """huggingface_hub's cache with a tiny gpt2-medium in it; the hub itself does not answer."""
    snapshot = tmp_path / "hub" / "models--openai-community--gpt2-medium" / "snapshots" / "abc"
    hf_model("padded").save_pretrained(snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_openai_names(hub_cache, run, gpt2, tmp_path):
    """From the cache without a network; what is missing is named, and where it was looked for."""
    assert load_model("gpt2-medium")[0].config.n_head == SHAPES["padded"]["n_head"]
    assert run("sample.py", "--ckpt=gpt2-medium", "--prompt=Hi", "--max_new_tokens=3").startswith(
        "Hi"
    )
    texts = "\n".join(json.dumps({"text": f"Some text {i} of many."}) for i in range(200))
    (tmp_path / "t.jsonl").write_text(texts)
    run("fineweb.py", "--dataset=t.jsonl", "--out_dir=shards")
    args = ["--data_dir=shards", "--B=2", "--T=16"]
    evaluated = run("train_gpt2.py", *args, "--eval_only=True", "--ckpt=gpt2-medium")
    assert evaluated.startswith("gpt2-medium on shards, context 16:")
    args += [
        "--init_from=gpt2-medium",
        "--total_batch_size=64",
        "--max_steps=1",
        "--hellaswag_every=0",
    ]
    tuned = run(
        "train_gpt2.py", *args, "--ewok_every=0", "--sample_every=0", "--max_lr=0", "--min_lr=0"
    )
    loss = re.search(r"loss ([\d.]+) \|", evaluated)[1]
    assert f"step     0 | val loss {loss} |" in tuned
    with pytest.raises(UserError) as e:
        load_model("gpt2")
    assert re.match(
        rf"cannot get openai-community/gpt2: not in {tmp_path}/hub, and the hub cannot "
        r"be reached or has no safetensors of it \(\w+\): go online once, or name a folder",
        str(e.value),
    )
    (hub_cache / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot get openai-community/gpt2-medium"):
        load_model("gpt2-medium")


def checkpoint(path, **changes):
    torch.manual_seed(0)
    config = dict(block_size=16, vocab_size=257, n_layer=1, n_head=2, n_embd=32)
    model = GPT(GPTConfig(**config))
    state = {
        "model": model.state_dict(),
        "config": config,
        "step": 1,
        "tokenizer": "bytes",
    } | changes
    torch.save(state, path)
    return model


def test_latest_is_the_last_checkpoint_and_best_the_one_of_the_lowest_loss(tmp_path, capsys):
    """Whatever the time of a file is, and other files beside them; which it was is told."""
    for step, loss in ((99, 3.0), (100_000, None), (5000, 2.0), (40, float("nan"))):
        checkpoint(tmp_path / f"model_{step:05d}.pt", step=step, val_loss=loss)
    checkpoint(tmp_path / "model_best.pt", step=7, val_loss=1.0)
    os.utime(tmp_path / "model_100000.pt", (1, 1))
    for ckpt, step in (("latest", 100_000), ("best", 5000)):
        found, _ = load_model(ckpt, log_dir=str(tmp_path))
        assert capsys.readouterr().err == f"{tmp_path}/model_{step:05d}.pt: step {step}\n"
        assert found.lm_head.weight is found.transformer.wte.weight
    (tmp_path / "model_05000.pt").unlink()
    (tmp_path / "model_00099.pt").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* has a validation loss"):
        load_model("best", log_dir=str(tmp_path))


def test_damaged_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.pt"

    def fails(message, ckpt=str(path)):
        with pytest.raises(UserError, match=message) as e:
            load_model(ckpt, log_dir="nowhere")
        assert "\n" not in str(e.value)

    fails(r"c\.pt: no such checkpoint; use latest, best, gpt2 ")
    fails(r"no checkpoint in nowhere/: python train_gpt2\.py makes one", "latest")
    checkpoint(path)
    path.write_bytes(path.read_bytes()[:5000])
    fails(r"c\.pt: not a complete checkpoint file")
    path.write_bytes(b"")
    fails(r"c\.pt: not a complete checkpoint file")
    torch.save({"model": {}, "x": Evil()}, path)
    fails(r"c\.pt: refused, it holds something other than tensors and plain values")
    assert not (tmp_path / "pwned").exists()
    torch.save({"model": {}}, path)
    fails(r"c\.pt: not a checkpoint of this project's GPT-2")
    checkpoint(path, config={"n_layer": 1, "rotary": True})
    fails(r"c\.pt: not a checkpoint of this project's GPT-2 .*rotary")
    config = dict(block_size=16, vocab_size=257, n_head=2, n_embd=32)
    for wrong in (dict(n_layer=2, **config), dict(n_layer=1, **config | {"n_embd": 48})):
        checkpoint(path, config=wrong)
        fails(r"c\.pt: its weights are not those of a GPT-2 with GPTConfig")
    torch.save([1, 2], path)
    fails(r"c\.pt: not a checkpoint of this project's GPT-2")


def test_load_checkpoint_reads_what_was_saved(tmp_path):
    model = checkpoint(tmp_path / "c.pt")
    for mmap in (False, True):
        state = load_checkpoint(str(tmp_path / "c.pt"), mmap=mmap)
        assert state["step"] == 1
        assert all(torch.equal(state["model"][k], v) for k, v in model.state_dict().items())


def test_device_and_dtype():
    assert pick_device("cpu") == "cpu"
    assert pick_dtype("float16", "cpu") == torch.float16
    assert pick_dtype("auto", "cpu") in (torch.float32, torch.bfloat16)
    with pytest.raises(UserError, match=r"--dtype=int8: choose auto, float32, bfloat16, float16"):
        pick_dtype("int8", "cpu")
    with pytest.raises(UserError, match=r"--device=quantum: not on this machine"):
        pick_device("quantum")


@pytest.mark.parametrize("T", [20, 256, 257])  # 257: torch's own
@pytest.mark.parametrize("kind", ["causal", "masked", "all"])
def test_attention_in_bfloat16(T, kind):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, T, 16).bfloat16()
    seen = torch.ones(2, 1, T, T, dtype=torch.bool)
    if kind == "causal":
        seen = seen.tril()
    if kind == "masked":
        seen = (torch.rand(2, 1, T, T) < 0.5) | torch.eye(T, dtype=torch.bool)
    scores = q.double() @ k.double().transpose(2, 3) / 4
    expected = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ v.double()
    y = kernels.attention(q, k, v, seen if kind == "masked" else None, is_causal=kind == "causal")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, atol=0.02, rtol=0.02)
