"""HellaSwag and EWoK against brute force: one row at a time, in float32, sharing nothing."""

import json
import os
import random
import re
import subprocess
import zipfile

from conftest import command, read_jsonl, read_log
from data.tokenizer import load_tokenizer
import ewok
import hellaswag
from model import GPT, GPTConfig, load_model
from scoring import score_completions
from script import UserError
from training.logdir import LogDir

import pytest
import requests
import torch

WORDS = """the a cat dog king tree red old sees runs holds over under and then slowly two houses
    water""".split()


def make_model(vocab_size=257, block_size=96):
    """A model of strong opinions: a fresh one's are too weak to tell right scores from wrong."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size, vocab_size, n_layer=2, n_head=2, n_embd=32)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    return model


def brute_force(model, context, completion):
    """log P(completion | context), a token at a time, each with the longest context that fits."""
    total = 0.0
    for i, token in enumerate(completion):
        seen = [*context, *completion[:i]][-model.config.block_size :]
        total += model(torch.tensor([seen]))[0, -1].log_softmax(-1)[token].item()
    return total


def sentence(rng, n):
    return " ".join(rng.choice(WORDS) for _ in range(n))


def hellaswag_items(n, seed=0):
    rng = random.Random(seed)
    items = []
    for i in range(n):
        a, b = sentence(rng, rng.randint(2, 5)).capitalize() + ".", sentence(rng, rng.randint(0, 2))
        endings = [sentence(rng, rng.randint(1, 4)) + "." for _ in range(4)]
        if i % 3 == 0:  # WikiHow
            a, endings[1] = (
                f"[header] {a} [title] {sentence(rng, 2)}",
                f"[step] {endings[1]} [substeps]  more",
            )
        item = {
            "ctx_a": a,
            "ctx_b": b,
            "ctx": f"{a} {b}".strip(),
            "activity_label": sentence(rng, 2).title(),
        }
        items.append(item | {"endings": endings, "label": rng.randrange(4)})
    return items


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def enc():
    return load_tokenizer("bytes")


# -- scoring ------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
def test_scores_equal_brute_force(model, batch_tokens):
    """Shared contexts, completions of one token, lengths up to and at the context's end."""
    rng = random.Random(1)
    contexts = [[rng.randrange(257) for _ in range(n)] for n in (1, 2, 9, 30, 95, 96, 97, 200)]
    pairs = []
    for context in contexts:
        for n in (1, 2, 2, 7):
            completion = [rng.randrange(257) for _ in range(n)]
            pairs.append((context, completion))
    pairs.append(pairs[5])  # the same twice
    rng.shuffle(pairs)
    sums, counts = score_completions(model, pairs, batch_tokens)
    assert counts.tolist() == [len(completion) for _, completion in pairs]
    for (context, completion), found in zip(pairs, sums.tolist(), strict=True):
        # all tokens of a completion see the same context, cut so that the last one fits
        context = context[-(model.config.block_size + 1 - len(completion)) :]
        assert found == pytest.approx(brute_force(model, context, completion), abs=1e-3)


def test_completions_longer_than_the_context(model):
    """In pieces of half a context, each behind as much as fits."""
    rng = random.Random(2)
    context, completion = ([rng.randrange(257) for _ in range(n)] for n in (10, 150))
    sums, counts = score_completions(model, [(context, completion)])
    expected = 0.0
    for start in range(0, 150, 48):
        piece = completion[start : start + 48]
        expected += brute_force(model, (context + completion[:start])[-(97 - len(piece)) :], piece)
    assert sums[0].item() == pytest.approx(expected, abs=1e-3) and counts[0] == 150


def test_a_long_completion_that_repeats_itself():
    """Its pieces are the same pair of context and completion, in one batch."""
    model = GPT(GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=2, n_embd=16)).eval()
    sums, counts = score_completions(model, [([5], [5] * 40)])
    expected = sum(
        brute_force(model, ([5] * (1 + start))[-5:], [5] * 4) for start in range(0, 40, 4)
    )
    assert sums[0].item() == pytest.approx(expected, abs=1e-3) and counts[0] == 40


def test_scores_of_a_compiled_model_do_not_compile(model):
    pairs = [([1, 2, 3], [4, 5]), ([1], [2])]
    expected, _ = score_completions(model, pairs)

    def backend(*args):
        raise AssertionError("compiled")

    found, _ = score_completions(torch.compile(model, backend=backend), pairs)
    assert torch.equal(found, expected)


# -- HellaSwag ----------------------------------------------------------------------


def brute_force_predictions(model, enc, items, style):
    by_sum, by_norm = [], []
    for item in items:
        if style == "completion":
            context, endings = item["ctx"], item["endings"]
            ids = [enc.encode_ordinary(" " + e) for e in endings]
            lengths = [len(i) for i in ids]
        else:  # lm-evaluation-harness's preprocess, from its description

            def clean(t):
                t = re.sub(r"\[.*?\]", "", t.strip().replace(" [title]", ". "))
                return t.replace("  ", " ")

            context = clean(
                item["activity_label"] + ": " + item["ctx_a"] + " " + item["ctx_b"].capitalize()
            )
            endings = [clean(e) for e in item["endings"]]
            spaces = len(context) - len(context.rstrip())
            ids = [enc.encode_ordinary(context[len(context) - spaces :] + " " + e) for e in endings]
            context, lengths = context.rstrip(), [len(e) for e in endings]
        context = enc.encode_ordinary(context)
        scores = []
        for i in ids:
            cut = context[-(model.config.block_size + 1 - len(i)) :]
            logprobs = model(torch.tensor([cut + i[:-1]]))[0].log_softmax(-1)
            scores.append(sum(logprobs[len(cut) - 1 + k, t].item() for k, t in enumerate(i)))
        by_sum.append(max(range(4), key=scores.__getitem__))
        by_norm.append(max(range(4), key=lambda k, s=scores, n=lengths: s[k] / n[k]))
    return by_sum, by_norm


@pytest.mark.parametrize("style", ["completion", "harness"])
def test_hellaswag_predictions_equal_brute_force(model, enc, style):
    items = hellaswag_items(60)
    expected = brute_force_predictions(model, enc, items, style)
    assert expected[0] != expected[1]
    for batch_tokens in (1, 500, 16384):
        assert hellaswag.predict(model, enc, items, style, batch_tokens) == expected
    result = hellaswag.evaluate(model, enc, items, style)
    for key, predicted in zip(("acc", "acc_norm"), expected, strict=True):
        share = sum(p == item["label"] for p, item in zip(predicted, items, strict=True)) / 60
        assert result[key] == pytest.approx(share)
    p = result["acc_norm"]
    assert result["stderr"] == pytest.approx((p * (1 - p) / 60) ** 0.5) and result["count"] == 60


def test_hellaswag_with_gpt2_tokens(gpt2):
    model = make_model(vocab_size=50257)
    items = hellaswag_items(20)
    for style in hellaswag.STYLES:
        expected = brute_force_predictions(model, gpt2, items, style)
        assert hellaswag.predict(model, gpt2, items, style) == expected


def save_checkpoint(folder, model):
    folder.mkdir(exist_ok=True)
    config = dict(block_size=96, vocab_size=257, n_layer=2, n_head=2, n_embd=32)
    state = {"model": model.state_dict(), "config": config, "tokenizer": "bytes"}
    torch.save(state, folder / "model_00001.pt")


def write_jsonl(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def test_hellaswag_script(run, spawn, model, enc, tmp_path):
    """A table; the same totals for one process and for two."""
    save_checkpoint(tmp_path / "log", model)
    items = hellaswag_items(31)
    write_jsonl(tmp_path / "items.jsonl", items)
    args = ["--ckpt", "--data=items.jsonl", "--style=both", "--dtype=float32"]
    out = run("hellaswag.py", *args)
    for style in hellaswag.STYLES:
        r = hellaswag.evaluate(model, enc, items, style)
        assert re.search(
            rf"latest, {style} +{r['acc']:.2%} +{r['acc_norm']:.2%} +{r['stderr']:.2%} +31 ", out
        )
    assert "GPT-3 124M" in out and "33.7%" in out
    two = spawn("hellaswag.py", *args, nproc=2)
    assert two.returncode == 0, two.stderr

    def numbers(text):
        return [line.split()[:-1] for line in text.splitlines() if line.startswith("latest")]

    assert numbers(two.stdout) == numbers(out) and len(numbers(out)) == 2
    assert " 7 " in run("hellaswag.py", *args, "--limit=7")


def test_hellaswag_is_downloaded_once(run, model, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "log", model)
    asked = []

    def download(url, path):
        asked.append(url)
        write_jsonl(tmp_path / path, hellaswag_items(5))

    monkeypatch.setattr("files.download", download)
    assert (
        run("hellaswag.py", "--split=train", "--ckpt")
        == run("hellaswag.py", "--split=train", "--ckpt")
        or True
    )
    assert asked == [
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_train.jsonl"
    ]

    def offline(url, path):
        raise requests.ConnectionError

    monkeypatch.setattr("files.download", offline)
    with pytest.raises(
        SystemExit,
        match=r"cannot download HellaSwag \(ConnectionError\): put https://.*_val\.jsonl",
    ):
        run("hellaswag.py", "--ckpt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"items\.jsonl line 2: not a HellaSwag item"),
        ('{"ctx": "a"}', r"items\.jsonl line 2: not a HellaSwag item"),
        (
            json.dumps(hellaswag_items(1)[0] | {"endings": ["a"]}),
            r"items\.jsonl line 2: not a HellaSwag item",
        ),
        (
            json.dumps(hellaswag_items(1)[0] | {"label": 4}),
            r"items\.jsonl line 2: not a HellaSwag item",
        ),
    ],
)
def test_damaged_hellaswag_files(tmp_path, line, message):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(hellaswag_items(1)[0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match=message):
        hellaswag.load_items(str(path))
    assert len(hellaswag.load_items(str(path), limit=1)) == 1
    path.write_text("")
    with pytest.raises(UserError, match=r"items\.jsonl: holds no items"):
        hellaswag.load_items(str(path))
    with pytest.raises(UserError, match=r"gone\.jsonl: cannot read this file"):
        hellaswag.load_items("gone.jsonl")


# -- EWoK ---------------------------------------------------------------------------


def ewok_items(n=48):
    """Items over three domains; targets of different lengths, so that sum and mean disagree."""
    rng = random.Random(3)
    items = []
    for i in range(n):
        item = {f"Context{k}": sentence(rng, 4).capitalize() + "." for k in (1, 2)}
        item |= {
            "Target1": sentence(rng, rng.randint(1, 4)) + ".",
            "Target2": sentence(rng, rng.randint(1, 4)) + ".",
        }
        item |= {
            "Domain": ("spatial", "social", "material")[i * i % 3 if i % 5 else 2],
            "ConceptA": "x",
            "ConceptB": "y",
        }
        item |= {
            "ContextType": "direct" if i % 2 else "indirect",
            "ContextDiff": "negation",
            "TargetDiff": "swap",
        }
        items.append(item)
    items[0]["Context2"] = items[0]["Context1"]  # a tie for `context`
    items[1]["Target2"] = items[1]["Target1"]  # a tie for the others
    return items


def half_wins(*comparisons):
    return sum(0.5 if a > b else 0.25 if a == b else 0.0 for a, b in comparisons)


def brute_force_ewok(model, enc, item):
    def score(c, t):
        ids = enc.encode_ordinary(" " + item[f"Target{t}"])
        context = enc.encode_ordinary(item[f"Context{c}"])
        context = context[-(model.config.block_size + 1 - len(ids)) :]
        logprobs = model(torch.tensor([context + ids[:-1]]))[0].log_softmax(-1)
        return sum(logprobs[len(context) - 1 + k, t].item() for k, t in enumerate(ids)), len(ids)

    s = {(c, t): score(c, t) for c in (1, 2) for t in (1, 2)}
    total = {key: a for key, (a, _) in s.items()}
    mean = {key: a / n for key, (a, n) in s.items()}
    return s, {
        "context": half_wins((total[1, 1], total[2, 1]), (total[2, 2], total[1, 2])),
        "target_sum": half_wins((total[1, 1], total[1, 2]), (total[2, 2], total[2, 1])),
        "target_mean": half_wins((mean[1, 1], mean[1, 2]), (mean[2, 2], mean[2, 1])),
    }


def test_ewok_equals_brute_force(model, enc):
    items = ewok_items()
    result = ewok.evaluate(model, enc, items)
    records = result["items"]
    expected = [brute_force_ewok(model, enc, item) for item in items]
    for i, ((numbers, scores), record) in enumerate(zip(expected, records, strict=True)):
        order = [numbers[1, 1], numbers[2, 1], numbers[1, 2], numbers[2, 2]]
        assert record["sums"] == pytest.approx([a for a, _ in order], abs=1e-3)
        assert record["counts"] == [n for _, n in order]
        assert {key: record[key] for key in scores} == scores, i
        assert record["id"] == i and record["domain"] == items[i]["Domain"]
        assert not {"Context1", "Target1"} & record.keys()
    means = {key: sum(s[key] for _, s in expected) / len(items) for key in ewok.SCORES}
    assert len(set(means.values())) == 3, "the three scores differ on these items"
    for key in ewok.SCORES:
        assert result[key] == pytest.approx(means[key])
        domains = {}
        for (_, scores), item in zip(expected, items, strict=True):
            domains.setdefault(item["Domain"], []).append(scores[key])
        averages = {domain: sum(v) / len(v) for domain, v in domains.items()}
        assert {d: r[key] for d, r in result["by_Domain"].items()} == pytest.approx(averages)
        assert result[f"{key}_domain_avg"] == pytest.approx(sum(averages.values()) / 3)
        assert result[f"{key}_domain_avg"] != pytest.approx(result[key])
    assert set(result["by_ContextType"]) == {"direct", "indirect"} and set(
        result["by_TargetDiff"]
    ) == {"swap"}
    assert result["count"] == 48 and sum(r["count"] for r in result["by_Domain"].values()) == 48


def test_a_constant_model_scores_chance(enc):
    model = make_model()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()
    result = ewok.evaluate(model, enc, ewok_items())
    assert all(result[key] == 0.5 for key in ewok.SCORES)


def test_only_contexts_and_targets_are_required(model, enc):
    items = [
        {k: v for k, v in item.items() if k[:-1] in ("Context", "Target")} for item in ewok_items()
    ]
    result = ewok.evaluate(model, enc, items)
    assert not any(key.startswith("by_") for key in result)
    assert result["context_domain_avg"] == result["context"]


def write_zip(path, members, password=None, aes=False):
    if aes:
        import pyzipper

        with pyzipper.AESZipFile(
            path, "w", encryption=pyzipper.WZ_AES, compression=zipfile.ZIP_DEFLATED
        ) as z:
            z.setpassword(password)
            for name, content in members.items():
                z.writestr(name, content)
        return
    with zipfile.ZipFile(path, "w") as z:
        for name, content in members.items():
            z.writestr(name, content)
    if password:
        encrypt_zipcrypto(path, members, password)


def encrypt_zipcrypto(path, members, password):
    """A ZipCrypto archive: zipfile reads them but cannot write them. APPNOTE.TXT, section 6.1."""
    import struct
    import zlib

    def crc_step(crc, byte):
        return (crc >> 8) ^ TABLE[(crc ^ byte) & 0xFF]

    TABLE = []
    for i in range(256):
        for _ in range(8):
            i = (i >> 1) ^ 0xEDB88320 if i & 1 else i >> 1
        TABLE.append(i)

    def encrypt(data):
        keys = [0x12345678, 0x23456789, 0x34567890]

        def update(byte):
            keys[0] = crc_step(keys[0], byte)
            keys[1] = ((keys[1] + (keys[0] & 0xFF)) * 134775813 + 1) & 0xFFFFFFFF
            keys[2] = crc_step(keys[2], keys[1] >> 24)

        for byte in password:
            update(byte)
        out = bytearray()
        for byte in data:
            k = keys[2] | 2
            out.append(byte ^ (((k * (k ^ 1)) >> 8) & 0xFF))
            update(byte)
        return bytes(out)

    body, central = b"", b""
    for name, content in members.items():
        content, raw = content.encode(), name.encode()
        crc = zlib.crc32(content)
        data = encrypt(bytes(11) + bytes([crc >> 24]) + content)
        fields = struct.pack("<HHHHIIIHH", 1, 0, 0, 0x21, crc, len(data), len(content), len(raw), 0)
        central += (
            b"PK\x01\x02"
            + struct.pack("<H", 20)
            + struct.pack(
                "<HHHHHIIIHH", 20, 1, 0, 0, 0x21, crc, len(data), len(content), len(raw), 0
            )
        )
        central += struct.pack("<HHHII", 0, 0, 0, 0, len(body)) + raw
        body += b"PK\x03\x04" + struct.pack("<H", 20) + fields + raw + data
    end = b"PK\x05\x06" + struct.pack(
        "<HHHHIIH", 0, 0, len(members), len(members), len(central), len(body), 0
    )
    path.write_bytes(body + central + end)


def members():
    items = ewok_items()
    lines = [json.dumps(item) + "\n" for item in items]
    return items, {
        "a.jsonl": "".join(lines[:20]),
        "deep/er/b.jsonl": "".join(lines[20:]),
        "README.txt": "no items",
    }


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EWOK_SRC", raising=False)
    monkeypatch.delenv("EWOK_ZIP_PASSWORD", raising=False)
    return tmp_path


@pytest.mark.parametrize("kind", ["plain", "zipcrypto", "aes", "folder"])
def test_every_source_of_ewok(somewhere, monkeypatch, kind):
    items, files = members()
    if kind == "folder":
        for name, content in files.items():
            path = somewhere / "ewok_fast" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    else:
        if kind == "aes":
            pytest.importorskip("pyzipper")
        password = {"plain": None, "zipcrypto": b"ew2026", "aes": b"ew2026"}[kind]
        write_zip(somewhere / "ewok_fast_jsonl.zip", files, password, aes=kind == "aes")
    before = sorted(somewhere.rglob("*"))
    assert ewok.load_items() == items
    assert ewok.load_items(limit=3) == items[:3]
    assert sorted(somewhere.rglob("*")) == before, "nothing is unpacked"
    if kind in ("zipcrypto", "aes"):
        monkeypatch.setenv("EWOK_ZIP_PASSWORD", "wrong")
        with pytest.raises(UserError, match=r"ewok_fast_jsonl\.zip: .*EWOK_ZIP_PASSWORD"):
            ewok.load_items()


def test_ewok_sources_in_order(somewhere, monkeypatch):
    items, files = members()
    for place, content in (("ewok_fast", files["a.jsonl"]), ("mine", files["deep/er/b.jsonl"])):
        (somewhere / place).mkdir()
        (somewhere / place / "x.jsonl").write_text(content)
    write_zip(somewhere / "ewok_fast_jsonl.zip", {"x.jsonl": files["a.jsonl"] * 2})
    assert len(ewok.load_items()) == 40
    monkeypatch.setenv("EWOK_SRC", str(somewhere / "mine"))
    assert ewok.load_items() == items[20:]
    monkeypatch.setenv("EWOK_SRC", "gone.zip")
    with pytest.raises(UserError, match=r"EWOK_SRC=gone\.zip: no such file or folder"):
        ewok.load_items()


def break_member(path):
    raw = path.read_bytes()
    at = raw.index(b"Context1")
    path.write_bytes(raw[:at] + b"XXXXXXXX" + raw[at + 8 :])


def test_damaged_ewok_sources(somewhere, monkeypatch):
    _, files = members()
    path = somewhere / "ewok_fast_jsonl.zip"

    def fails(message):
        with pytest.raises(UserError, match=message) as e:
            ewok.load_items()
        assert "\n" not in str(e.value)

    write_zip(path, files)
    break_member(path)
    fails(
        r"ewok_fast_jsonl\.zip: broken zip, or a wrong EWOK_ZIP_PASSWORD "
        r"\(Bad CRC-32 for file 'a\.jsonl'\)"
    )
    path.write_bytes(b"not a zip")
    fails(r"ewok_fast_jsonl\.zip: broken zip")
    write_zip(path, {"a.jsonl": ""})
    fails(r"ewok_fast_jsonl\.zip: holds no items")
    item = ewok_items()[0]
    write_zip(path, {"a.jsonl": json.dumps(item) + "\n" + json.dumps(item | {"Target2": ""})})
    fails(r"ewok_fast_jsonl\.zip: a\.jsonl line 2: an item without a text in Target2")
    write_zip(path, {"a.jsonl": "{\n"})
    fails(r"ewok_fast_jsonl\.zip: a\.jsonl line 1: not a JSON object")
    path.unlink()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    fails(r"there are no EWoK items: put ewok_fast_jsonl\.zip here, or set EWOK_SRC")


def test_aes_without_its_package(somewhere, monkeypatch):
    pytest.importorskip("pyzipper")
    write_zip(somewhere / "ewok_fast_jsonl.zip", members()[1], b"ew2026", aes=True)
    monkeypatch.setitem(__import__("sys").modules, "pyzipper", None)
    with pytest.raises(UserError, match=r"is encrypted with AES: pip install pyzipper"):
        ewok.load_items()


def test_ewok_from_the_hub(somewhere, monkeypatch):
    items, _ = members()

    def load_dataset(name, split):
        assert (name, split) == ("ewok-core/ewok-core-1.0", "test")
        return items

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert ewok.load_items() == items


def test_ewok_script(run, spawn, model, enc, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "log", model)
    items, files = members()
    write_zip(tmp_path / "ewok_fast_jsonl.zip", files, b"ew2026")
    out = run("ewok.py", "--ckpt", "--items=True", "--dtype=float32")
    result = ewok.evaluate(model, enc, items)
    records = result["items"]
    expected = " +".join(f"{result[key]:.3f}" for key in ewok.SCORES)
    assert re.search(rf"latest, all items +{expected} +48\n", out)
    assert re.search(r"Domain social +[\d.]+ ", out) and re.search(
        r"chance +0\.500 +0\.500 +0\.500", out
    )
    assert read_jsonl(tmp_path / "log" / "ewok_items.jsonl") == records
    text = (tmp_path / "log" / "ewok_items.jsonl").read_text() + out
    assert not any(item[key] in text for item in items for key in ("Context1", "Context2"))
    two = spawn("ewok.py", "--ckpt", "--dtype=float32", nproc=2)
    assert two.returncode == 0, two.stderr

    def table(text):
        return [line for line in text.splitlines() if line[-1:].isdigit()]

    assert table(two.stdout) == table(out)


# -- inside the run -----------------------------------------------------------------


TRAIN = [
    "--preset=tiny",
    "--data_dir=shards",
    "--n_layer=1",
    "--T=64",
    "--B=4",
    "--total_batch_size=512",
]
TRAIN += ["--max_steps=4", "--eval_every=0", "--sample_every=0"]


@pytest.mark.parametrize("compiled", [False, True])
def test_evals_inside_the_run_equal_the_scripts(run, shards, tmp_path, at_step, compiled):
    """Compiled: training's and validation's graphs are made before step 1, and no others later."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    graphs = []
    at_step(1, lambda: graphs.append(counters["stats"]["unique_graphs"]))
    write_jsonl(tmp_path / "h.jsonl", hellaswag_items(40))
    (tmp_path / "hellaswag").mkdir()
    os.rename(tmp_path / "h.jsonl", tmp_path / "hellaswag" / "hellaswag_val.jsonl")
    write_zip(tmp_path / "ewok_fast_jsonl.zip", members()[1])
    run(
        "train_gpt2.py", *TRAIN, "--hellaswag_every=2", "--ewok_every=4", "--hellaswag_limit=30",
        f"--compile={compiled}", "--eval_every=2", "--sample_every=2",
    )  # fmt: skip
    assert [*graphs, counters["stats"]["unique_graphs"]] == ([2, 2] if compiled else [0, 0])
    hella, scores = (read_log(tmp_path / "log", kind) for kind in ("hella", "ewok"))
    assert list(hella) == [0, 2, 4] and list(scores) == [0, 4]

    out = run("hellaswag.py", "--ckpt", "--limit=30")
    assert re.search(rf"latest, completion +[\d.]+% +{hella[4]:.2%} ", out)
    out = run("ewok.py", "--ckpt")
    assert re.search(rf"latest, all items +{scores[4]:.3f} ", out)
    records = {r["kind"]: r for r in read_jsonl(tmp_path / "log" / "metrics.jsonl")}
    assert records["hella"]["count"] == 30 and records["hella"]["acc_norm"] == pytest.approx(
        hella[4], abs=1e-4
    )
    assert records["ewok"]["by_Domain"].keys() == {"social", "spatial", "material"}


def test_processes_share_the_evals_inside_the_run(run, spawn, shards, tmp_path):
    (tmp_path / "hellaswag").mkdir()
    write_jsonl(tmp_path / "hellaswag" / "hellaswag_val.jsonl", hellaswag_items(40))
    write_zip(tmp_path / "ewok_fast_jsonl.zip", members()[1])
    args = [
        *TRAIN,
        "--hellaswag_every=4",
        "--ewok_every=4",
        "--hellaswag_limit=31",
        "--dtype=float32",
    ]
    args += ["--optimizer=adamw", "--ewok_items=True"]
    run("train_gpt2.py", *args)
    result = spawn("train_gpt2.py", *args, "--log_dir=two", nproc=2)
    assert result.returncode == 0, result.stderr
    for kind in ("hella", "ewok"):
        scores = read_log(tmp_path / "log", kind)
        assert list(scores) == [0, 4] and read_log(tmp_path / "two", kind) == pytest.approx(
            scores, abs=0.04
        )
        assert read_log(tmp_path / "two", kind)[0] == scores[0]
    assert len(read_jsonl(tmp_path / "two" / "ewok_items.jsonl")) == 96


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_graphs_in_the_life_of_a_run(shards, tmp_path, monkeypatch, fsdp):
    """Compiled, with several processes: training's and validation's.

    Evals and samples add none and break none.
    """
    monkeypatch.setenv("TORCH_LOGS", "recompiles,graph_breaks")
    (tmp_path / "hellaswag").mkdir()
    write_jsonl(tmp_path / "hellaswag" / "hellaswag_val.jsonl", hellaswag_items(12))
    write_zip(tmp_path / "ewok_fast_jsonl.zip", members()[1])
    args = [
        *TRAIN,
        "--hellaswag_every=2",
        "--eval_every=2",
        "--sample_every=2",
        "--sample_tokens=9",
        "--ewok_every=2",
    ]
    line = command(
        "train_gpt2.py", *args, "--compile=True", f"--fsdp={fsdp}", nproc=2
    )  # torch reads the variable
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    assert (
        "Graph break" not in result.stderr and result.stderr.count("Recompiling") <= 2
    )  # of each process, once
    assert len(read_log(tmp_path / "log", "hella")) == len(read_log(tmp_path / "log", "ewok")) == 3


def test_items_of_ewok_from_inside_the_run(run, shards, tmp_path, at_step, enc, monkeypatch):
    """Appended at each evaluation, rewound when the run is resumed; the script has its own file."""
    items, files = members()
    write_zip(tmp_path / "ewok_fast_jsonl.zip", files)
    args = [
        *TRAIN,
        "--hellaswag_every=0",
        "--ewok_every=2",
        "--ewok_items=True",
        "--dtype=float32",
        "--save_every=1",
    ]
    run("train_gpt2.py", *args)
    records = read_jsonl(tmp_path / "log" / "ewok_items.jsonl")
    assert [r["step"] for r in records] == [0] * 48 + [2] * 48 + [4] * 48
    assert records[-48:] == [
        {"step": 4, "kind": "ewok_item", **r}
        for r in ewok.evaluate(load_model("latest")[0], enc, items)["items"]
    ]
    assert not any(
        item["Context1"] in (tmp_path / "log" / "ewok_items.jsonl").read_text() for item in items
    )
    at_step(3, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("train_gpt2.py", *args, "--log_dir=died", "--save_every=1000")
    at_step(-1, None)
    run("train_gpt2.py", *args, "--resume", "--log_dir=died")
    assert read_jsonl(tmp_path / "died" / "ewok_items.jsonl") == records
    out = run("ewok.py", "--ckpt", "--items=True", "--dtype=float32")
    assert (
        "wrote log/ewok_items_latest.jsonl" in out
        and len(read_jsonl(tmp_path / "log" / "ewok_items.jsonl")) == 144
    )
    sent = []
    monkeypatch.setattr(LogDir, "_send", lambda log, step, kind, values: sent.append(kind))
    run("train_gpt2.py", *args, "--resume", "--max_steps=5")  # beside a file without steps
    assert "ewok" in sent and "ewok_item" not in sent  # dashboards never get the items
    assert len(read_jsonl(tmp_path / "log" / "ewok_items_latest.jsonl")) == 48


@pytest.mark.parametrize("error", [UserError("no items today"), ValueError("no items today")])
def test_a_loader_that_fails_does_not_end_the_run(run, shards, tmp_path, monkeypatch, error):
    def load_items(**how):
        raise error

    monkeypatch.setattr(ewok, "load_items", load_items)
    out = run("train_gpt2.py", *TRAIN, "--hellaswag_every=0", "--ewok_every=2")
    assert out.count("warning: this run continues without EWoK: no items today") == 1
    assert list(read_log(tmp_path / "log", "train")) == [0, 1, 2, 3]


def test_a_run_goes_on_without_the_data(run, shards, tmp_path, monkeypatch):
    def offline(url, path):
        raise requests.ConnectionError

    monkeypatch.setattr("files.download", offline)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.delenv("EWOK_SRC", raising=False)
    out = run("train_gpt2.py", *TRAIN, "--hellaswag_every=2", "--ewok_every=2")
    assert out.count("cannot download HellaSwag") == 1 and out.count("there are no EWoK items") == 1
    assert list(read_log(tmp_path / "log", "train")) == [0, 1, 2, 3]
