"""To Hugging Face and back, by transformers and onnxruntime; tokenizers of one's own."""

import collections
import copy
import itertools
import json
import re
import sys

from conftest import GPT2, MODERN_PARTS, TEXT, read_log
from data import tokenizer as tokenizer_module
from data.tokenizer import EOT, PATTERNS, load_tokenizer, tokenizer_state
from model import GPT, GPTConfig, load_model
from script import UserError
from test_model import hf_model
from train_tokenizer import train

import numpy as np
import pytest
import torch
import transformers

ODD = [
    *TEXT.splitlines(keepends=True)[:5],
    f"{EOT}One{EOT}{EOT} two\n",
    "naïve café e\u0301 日本語のテキスト 한국어 🙂👩‍👩‍👧‍👦 \u200b\u00a0x",
    "I'LL we've O'Neil's ſ İstanbul Σίσυφος ǅ ʼn",
    "def f(x):\n\treturn x**2  # 12345 ½ ٣٤ Ⅷ\r\n\r\n\n \n  end   ",
    "\x00\x07 control \ufeff bom \uffff",
    "",
    " ",
    "a" * 3000,
]


@pytest.fixture(scope="module", params=["gpt2", "gpt4"])
def own(request):
    """A tokenizer of 600 tokens, trained on the tests' text and this file."""
    return train([TEXT, open(__file__).read(), *ODD], 600, PATTERNS[request.param])


@pytest.fixture
def checkpoint(tmp_path):
    """checkpoint(enc, n_layer, ...): save a random model as log/model_00007.pt; returns it."""

    def save(enc, block_size=24, n_layer=2, n_head=2, n_embd=32, **parts):
        torch.manual_seed(3)
        model = GPT(GPTConfig(block_size, enc.n_vocab, n_layer, n_head, n_embd, **parts)).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        state = {
            "model": model.state_dict(),
            "config": vars(model.config),
            "step": 7,
            "val_loss": None,
        }
        (tmp_path / "log").mkdir()
        torch.save(
            state | {"settings": {}, "tokenizer": tokenizer_state(enc)},
            tmp_path / "log" / "model_00007.pt",
        )
        return model

    return save


def assert_round_trip(folder, model, enc):
    """transformers, without our code, and load_model find the same model and tokenizer in it."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs) is transformers.GPT2LMHeadModel and theirs.config.vocab_size == enc.n_vocab
    again, enc_again = load_model(str(folder))
    x = torch.randint(0, enc.n_vocab, (2, model.config.block_size))
    with torch.no_grad():
        expected = model(x)[..., : enc.n_vocab]
        torch.testing.assert_close(theirs(x).logits, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(again(x), expected)
    assert tokenizer_state(enc_again) == tokenizer_state(enc)
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    assert tok.eos_token_id == enc.eot_token and len(tok) == enc.n_vocab
    for text in ODD:
        ids = enc.encode(text, allowed_special={EOT})
        assert tok(text).input_ids == enc_again.encode(text, allowed_special={EOT}) == ids
        assert tok.decode(ids) == enc.decode(ids) == text


@pytest.mark.parametrize("shape", [dict(), dict(n_layer=1, n_head=3, n_embd=48, block_size=40)])
@pytest.mark.parametrize("name", ["bytes", "gpt2", "own"])
def test_export_and_back(run, checkpoint, tmp_path, own, gpt2, name, shape):
    enc = {"bytes": load_tokenizer("bytes"), "gpt2": gpt2, "own": own}[name]
    model = checkpoint(enc, **shape)
    out = run("export.py", "--ckpt", "--out_dir=hf")
    assert f"tokenizer {enc.name}" in out
    assert_round_trip(tmp_path / "hf", model, enc)
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip


@pytest.mark.parametrize("shape", ["small", "padded"])
def test_from_transformers_to_transformers(run, tmp_path, gpt2, shape):
    """transformers' folder -> ours -> a bfloat16 .pt and a folder -> transformers."""
    reference = hf_model(shape)
    reference.save_pretrained(tmp_path / "theirs")
    enc = gpt2 if shape == "padded" else load_tokenizer("bytes")
    run("export.py", "--ckpt=theirs", "--out_dir=ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    x = torch.randint(0, enc.n_vocab, (2, 16))
    with torch.no_grad():
        expected = reference(x).logits[..., : enc.n_vocab]
        torch.testing.assert_close(again(x).logits, expected, atol=1e-4, rtol=1e-4)
    assert again.config.vocab_size == enc.n_vocab, "without the padding"

    run("export.py", "--ckpt=theirs", "--format=pt", "--out=small.pt")
    small, _ = load_model(str(tmp_path / "small.pt"))
    assert (
        small.lm_head.weight.dtype == torch.float32
        and small.lm_head.weight is small.transformer.wte.weight
    )
    for name, p in load_model(str(tmp_path / "theirs"))[0].named_parameters():
        assert torch.equal(small.get_parameter(name), p.bfloat16().float())
    size = (tmp_path / "small.pt").stat().st_size
    assert size < 2.2 * sum(p.numel() for p in small.parameters()) + 30_000

    run("export.py", "--ckpt=small.pt", "--out_dir=half", "--dtype=bfloat16")
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16


def test_pipeline(run, checkpoint, tmp_path, own):
    model = checkpoint(own)
    run("export.py", "--out_dir=hf")
    generate = transformers.pipeline("text-generation", model=str(tmp_path / "hf"))
    text = generate("The old train", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    ids = own.encode_ordinary("The old train")
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert text == own.decode(ids)


@pytest.mark.parametrize("parts", [{}, MODERN_PARTS], ids=["gpt2", "modern"])
def test_onnx(run, checkpoint, tmp_path, parts):
    import onnxruntime

    model = checkpoint(load_tokenizer("bytes"), **parts)
    out = run("export.py", "--format=onnx")
    assert "model.onnx: input_ids (batch, length) -> logits; length up to 24" in out
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    for B, T in ((1, 1), (1, 7), (3, 24), (5, 12)):
        x = torch.randint(0, 257, (B, T))
        (logits,) = session.run(None, {"input_ids": x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(logits, model(x).numpy(), atol=1e-4)


def test_mistakes(run, checkpoint, tmp_path, own):
    checkpoint(own)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    for args, message in (
        (["--out_dir=full"], r"--out_dir=full: exists already; choose another, or delete it"),
        (
            ["--format=pt", "--out=full/x"],
            r"--out=full/x: exists already; choose another, or delete it",
        ),
        (["--format=gguf"], r"--format=gguf: choose hf, onnx or pt"),
        (["--dtype=int8"], r"--dtype=int8: choose float32, bfloat16 or float16"),
        (["--ckpt=gone"], r"gone: no such checkpoint"),
        (["--format=pt", "--out=gone/model.pt"], r"gone/model\.pt: cannot be written"),
    ):
        with pytest.raises(SystemExit, match=message) as e:
            run("export.py", *args)
        assert "\n" not in e.value.code


def test_which_tokenizer_a_folder_has(run, tmp_path, gpt2):
    """With vocab.json alone, as older versions of transformers save it: GPT-2's, or an error."""
    hf_model("padded").save_pretrained(tmp_path / "old")
    characters = tokenizer_module.byte_to_char()
    vocab = {"".join(characters[b] for b in token): i for token, i in gpt2._mergeable_ranks.items()}
    (tmp_path / "old" / "vocab.json").write_text(json.dumps(vocab))
    assert load_model(str(tmp_path / "old"))[1] is gpt2
    (tmp_path / "old" / "vocab.json").write_text(
        json.dumps({token: 50255 - i for token, i in vocab.items()})
    )
    with pytest.raises(
        UserError, match=r"vocab\.json: not GPT-2's vocabulary; save the tokenizer as"
    ):
        load_model(str(tmp_path / "old"))


def test_a_tokenizer_that_cannot_be_exported(run, checkpoint, tmp_path, own):
    """$ is the end of the text to tiktoken's engine, the end of a line to Hugging Face's."""
    state = copy.deepcopy(tokenizer_state(own))
    state["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"[^\n]+$|\n|[^\n]"}
    checkpoint(load_tokenizer(state))
    with pytest.raises(
        SystemExit,
        match=r"the tokenizer bpe-600-\w+ cannot be exported: Hugging Face's tokenizers read",
    ):
        run("export.py")
    assert not (tmp_path / "hf_model").exists()


# -- training a tokenizer -----------------------------------------------------------


def brute_force_bpe(text, vocab_size):
    """The number of tokens by the textbook algorithm: merge the most frequent pair repeatedly."""
    pieces = collections.Counter(
        tuple(piece.encode()) for piece in re.findall(r" ?[a-zA-Z]+|[^a-zA-Z]", text)
    )
    for new in range(256, vocab_size):
        pairs = collections.Counter()
        for piece, n in pieces.items():
            for pair in itertools.pairwise(piece):
                pairs[pair] += n
        pair = min(pairs, key=lambda p: (-pairs[p], p))
        merged = collections.Counter()
        for piece, n in pieces.items():
            out, i = [], 0
            while i < len(piece):
                if piece[i : i + 2] == pair:
                    out.append(new)
                    i += 2
                else:
                    out.append(piece[i])
                    i += 1
            merged[tuple(out)] += n
        pieces = merged
    return sum(len(piece) * n for piece, n in pieces.items())


def test_training_compresses_as_the_algorithm_does():
    pattern = r" ?[a-zA-Z]+|[^a-zA-Z]"
    enc = train([TEXT], 340, pattern)
    assert enc.n_vocab == 340 and enc.eot_token == 339
    tokens = len(enc.encode_ordinary(TEXT))
    assert tokens == pytest.approx(brute_force_bpe(TEXT, 339), rel=0.01)
    for text in ODD:
        assert enc.decode(enc.encode_ordinary(text)) == text


def test_the_whole_chain(run, tmp_path):
    """Text -> tokenizer -> shards -> a model -> a sample -> a folder that transformers reads."""
    texts = [json.dumps({"text": line * 3}) for line in TEXT.splitlines(keepends=True)]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    out = run("train_tokenizer.py", "--data=texts.jsonl", "--vocab_size=400", "--out=own.json")
    assert "own.json: 400 tokens, from" in out
    rate = float(re.search(r"9 held-out documents:\n +bpe-400-\w{8} +([\d.]+)\n", out)[1])
    assert 3 < rate < 12
    run("fineweb.py", "--dataset=texts.jsonl", "--tokenizer=own.json", "--out_dir=shards")
    small = "--preset=tiny --data_dir=shards --n_layer=1 --n_embd=32 --T=16 --B=8"
    small += " --total_batch_size=256"
    run(
        "train_gpt2.py",
        *small.split(),
        "--max_steps=60",
        "--eval_every=30",
        "--dtype=float32",
        *GPT2,
    )
    losses = read_log(tmp_path / "log", "val")
    assert losses[60] < losses[0] - 1
    assert run("sample.py", "--prompt=The old", "--max_new_tokens=20").startswith("The old")
    run("export.py", "--out_dir=hf")
    model, enc = load_model("latest", log_dir=str(tmp_path / "log"))
    assert enc.n_vocab == 400 and enc.name.startswith("bpe-400-")
    assert_round_trip(tmp_path / "hf", model, enc)


def test_max_bytes(run, tmp_path):
    texts = [json.dumps({"text": line}) for line in TEXT.splitlines(keepends=True)]
    (tmp_path / "texts.jsonl").write_text("\n".join([*texts, "{"]))
    out = run(
        "train_tokenizer.py",
        "--data=texts.jsonl",
        "--vocab_size=300",
        "--max_bytes=5e3",
        "--pattern=gpt2",
    )
    size = int(re.search(r"from ([\d,]+) bytes", out)[1].replace(",", ""))
    assert 5000 <= size < 5200 and "left out" not in out
    out = run("train_tokenizer.py", "--data=texts.jsonl", "--vocab_size=300", "--out=all.json")
    assert (
        f"left out of {len(texts) + 1} rows: 1 unreadable (texts.jsonl line {len(texts) + 1}: "
        in out
    )


def test_mistakes_in_training(run, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("abc")
    for args, message in (
        (["--vocab_size=256"], r"--vocab_size=256: must be at least 257"),
        (["--pattern=gpt5"], r"--pattern=gpt5: choose gpt2 or gpt4"),
        (["--out=gone/t.json"], r"--out=gone/t\.json: there is no folder gone"),
        (["--data=gone"], r"gone: no data files here|no such file"),
        (["--out=a.txt"], r"--out=a\.txt: exists already; choose another, or delete it"),
    ):
        with pytest.raises(SystemExit, match=message) as e:
            run("train_tokenizer.py", "--data=a.txt", *args)
        assert "\n" not in e.value.code
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    with pytest.raises(
        SystemExit, match=r"training a tokenizer needs rustbpe: pip install rustbpe"
    ):
        run("train_tokenizer.py", "--data=a.txt")
    assert not (tmp_path / "tokenizer.json").exists()


def test_other_tokenizers_of_hugging_face_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    split = {"type": "Split", "pattern": {"String": " "}}
    good = {"added_tokens": [{"content": EOT, "id": 0}], "pre_tokenizer": byte_level}
    vocab = {character: 256 - b for b, character in tokenizer_module.byte_to_char().items()}
    good |= {"model": {"type": "BPE", "vocab": vocab, "merges": []}}
    path.write_text(json.dumps(good))
    assert load_tokenizer(str(path)).encode_ordinary("aa") == [256 - 97] * 2
    for state in (
        {},
        {"model": {"type": "Unigram"}},
        good | {"normalizer": {"type": "NFC"}},
        good | {"pre_tokenizer": None},
        good | {"pre_tokenizer": byte_level | {"add_prefix_space": True}},
        good | {"pre_tokenizer": {"pretokenizers": [split, byte_level]}},
        good
        | {
            "model": {
                "type": "BPE",
                "vocab": vocab | {"aaa": 300, "aa": 301},
                "merges": ["a a", "aa a"],
            }
        },
        good
        | {"model": {"type": "BPE", "vocab": {"a": 1}, "merges": []}},  # which tiktoken panics at
        good | {"added_tokens": [{"content": EOT, "id": 0, "lstrip": True}]},
        good
        | {
            "pre_tokenizer": {"pretokenizers": [split | {"pattern": {"Regex": "x"}}, byte_level]}
        },  # cuts twice
    ):
        path.write_text(json.dumps(state))
        with pytest.raises(
            UserError, match=r"tokenizer\.json: not a (byte-level BPE that can be read|tokenizer)"
        ):
            load_tokenizer(str(path))
