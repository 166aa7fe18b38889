"""Benchmark every stage on this machine, next to other projects.

    python dev/bench.py                                      # against what is installed
    python dev/bench.py --what=train,sample --rounds=7
    python dev/bench.py --nanogpt=../nanoGPT --build_nanogpt=../build-nanogpt --gguf=gpt2.gguf

Prints one table of ratios. Each contender runs in its own process, with the same weights and work
(except --preset=modern, which is another model, and --gguf=, whose weights are its own), and takes
turns with ours: a ratio compares medians of the same minutes, after two warm-ups. transformers,
lm_eval, llama.cpp and CTranslate2 are included if they are installed. So is the FLOP/s of a large
matrix product, in tokens.
"""

import ast
import collections
from concurrent.futures import ProcessPoolExecutor
import contextlib
import functools
from functools import partial
import glob
from itertools import islice
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import types

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the root

from configurator import check_command_line, configure, current_settings

if __name__ == "__main__":
    check_command_line(__file__)  # before torch is imported, which takes seconds

from data.documents import Documents
from data.readers import read_text
from data.shard_writer import write_meta
from data.tokenizer import load_tokenizer, to_tokenizer_json
from device import pick_autocast, pick_compile, pick_device, pick_dtype, tune_malloc
import fineweb
import hellaswag
from huggingface import to_hugging_face
from model import GPT, GPTConfig
import sample
from scoring import score_completions
from script import UserError, num_cpus, run_as_script
from sweep import describe_commit
import train_gpt2
from training.optimizers import configure_optimizers

import numpy as np
import torch
from torch.nn import functional as F

# -- settings: override any with --key=value --------------------------------------
what = "train,sample,score,tokenize,start"  # which parts to run
against = ""  # only contenders whose names have one of these words; empty: all
rounds = 5  # turns that each contender takes
nanogpt = ""  # a clone of github.com/karpathy/nanoGPT, to run its model as well
build_nanogpt = ""  # a clone of github.com/karpathy/build-nanogpt, likewise
gguf = ""  # a GPT-2 of this size for llama.cpp (docs/export.md says how to make one)
n_layer = 12  # of the model
n_head = 12
n_embd = 768
B = 4  # micro-batch of a training step
T = 1024  # its context
max_new_tokens = 256  # of a sample
items = 32  # HellaSwag items to score
hellaswag_data = ""  # its .jsonl file; empty: made-up items of about such lengths
data = ""  # texts to tokenize, a file or folder as fineweb.py reads it; empty: Python's own source
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # bfloat16 where the hardware has it, else float16 on CUDA, else float32
compile = "auto"  # torch.compile of our training step: true, false, or auto, which is true on CUDA
scratch = ""  # a folder to work in; empty: a temporary one

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VOCAB = 50257
measured_process = resource.RUSAGE_SELF  # whose memory a contender's is


def new_model(**parts):
    """Our GPT-2 with the weights of all contenders; parts: other fields of GPTConfig."""
    torch.manual_seed(0)
    size = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
    return GPT(GPTConfig(1024, VOCAB, **size | parts))


# -- the contenders ----------------------------------------------------------------
# Functions that return (step, the units of work that a call of step() does).
def training(model, loss, optimizers, autocast):
    """Steps of a model on random tokens: loss(x, y) is its loss."""
    x, y = torch.randint(VOCAB, (2, B, T), device=device)
    model.train()

    def step():
        with autocast:
            value = loss(x, y)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return value.item()

    return step, B * T


def train_ours(preset="gpt2"):
    tune_malloc()
    s = train_gpt2.preset_settings(preset)
    heads = n_head if preset == "gpt2" or n_embd % 128 else n_embd // 128
    parts = {key: s[key] for key in train_gpt2.MODEL_KEYS}
    parts |= {"n_layer": n_layer, "n_head": heads, "n_embd": n_embd}
    model = new_model(**parts).to(device)
    forward = torch.compile(model) if pick_compile(compile, device) else model
    optimizers = configure_optimizers(
        model, s["weight_decay"], s["max_lr"], (s["beta1"], s["beta2"]), s["optimizer"]
    )
    return training(model, forward, optimizers, pick_autocast(dtype, device, cache_weights=False))


def train_transformers(compiled=False):
    model = transformers_model(torch.float32)
    forward = torch.compile(model) if compiled else model

    def loss(x, y):
        return F.cross_entropy(forward(input_ids=x).logits.float().flatten(0, 1), y.flatten())

    optimizer = torch.optim.AdamW(
        model.parameters(), 6e-4, (0.9, 0.95), weight_decay=0.1, fused=True
    )
    return training(model, loss, [optimizer], pick_autocast(dtype, device))


def train_nanogpt():
    """On GPUs nanoGPT trains in bfloat16, compiled; on a CPU in float32 (its README)."""
    theirs, on_gpu = import_definitions(nanogpt, "model.py"), device.startswith("cuda")
    model = theirs.GPT(
        theirs.GPTConfig(1024, 50304, n_layer, n_head, n_embd, dropout=0.0, bias=False)
    ).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.split(":")[0])
    forward = torch.compile(model) if on_gpu else model
    autocast = pick_autocast(dtype, device) if on_gpu else contextlib.nullcontext()
    return training(model, lambda x, y: forward(x, y)[1], [optimizer], autocast)


def train_build_nanogpt():
    """build-nanogpt trains in bfloat16 everywhere, and does not compile."""
    theirs = import_definitions(build_nanogpt, "train_gpt2.py", master_process=False)
    model = theirs.GPT(theirs.GPTConfig(1024, 50304, n_layer, n_head, n_embd)).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, device.split(":")[0])
    autocast = torch.autocast(device.split(":")[0], torch.bfloat16)
    return training(model, lambda x, y: model(x, y)[1], [optimizer], autocast)


drain = partial(collections.deque, maxlen=0)  # exhausts an iterator


def sample_ours():
    model = sample.prepare_for_sampling(new_model().to(device), dtype, device)
    idx = torch.arange(16, device=device)[None]
    kwargs = {"temperature": 0.8, "top_k": 200}
    return lambda: drain(model.generate(idx, max_new_tokens, **kwargs)), max_new_tokens


def sample_transformers():
    model = transformers_model(pick_dtype(dtype, device)).eval()
    idx = torch.arange(16, device=model.device)[None]
    kwargs = {"do_sample": True, "temperature": 0.8, "top_k": 200, "pad_token_id": VOCAB - 1}
    kwargs |= {"max_new_tokens": max_new_tokens, "eos_token_id": None}

    def step():
        out = model.generate(idx, attention_mask=torch.ones_like(idx), **kwargs)
        assert out.size(1) == 16 + max_new_tokens

    return step, max_new_tokens


def sample_llama_cpp():
    from llama_cpp import Llama

    if not gguf:
        raise UserError("there is no model for it: --gguf= names one")
    llm = Llama(gguf, n_ctx=1024, n_threads=num_cpus(), verbose=False)
    kwargs = {"temp": 0.8, "top_k": 200, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
    prompt = list(range(16))
    return lambda: drain(islice(llm.generate(prompt, **kwargs), max_new_tokens)), max_new_tokens


def sample_ctranslate2(weights):
    import ctranslate2

    # Its converter reads a folder with a tokenizer, its generator pieces of text.
    folder = f"{scratch}/ctranslate2-{weights}"
    transformers_model(torch.float32).save_pretrained(f"{folder}/hf")
    with open(f"{folder}/hf/tokenizer.json", "w") as f:
        json.dump(to_tokenizer_json(load_tokenizer("gpt2")), f)
    with open(f"{folder}/hf/tokenizer_config.json", "w") as f:
        special_tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
        json.dump({"tokenizer_class": "PreTrainedTokenizerFast", **special_tokens}, f)
    converter = ctranslate2.converters.TransformersConverter(f"{folder}/hf")
    converter.convert(f"{folder}/model", quantization=weights, force=True)
    generator = ctranslate2.Generator(f"{folder}/model", device, intra_threads=num_cpus())
    kwargs = {"sampling_temperature": 0.8, "sampling_topk": 200, "min_length": max_new_tokens}
    kwargs |= {"max_length": max_new_tokens, "include_prompt_in_result": False}

    def step():
        (result,) = generator.generate_batch([["!"] * 16], **kwargs)
        assert len(result.sequences[0]) == max_new_tokens

    return step, max_new_tokens


@functools.cache
def score_pairs():
    """(context, ending) lists of token ids, four per item: HellaSwag's, or random ones."""
    if hellaswag_data:
        enc = load_tokenizer("gpt2")
        found = hellaswag.load_items(hellaswag_data, limit=items)
        return [pair for item in found for pair in hellaswag.completion_style(item, enc)[0]]
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(items):
        context = rng.integers(VOCAB, size=rng.integers(15, 90)).tolist()
        for _ in range(4):
            pairs.append((context, rng.integers(VOCAB, size=rng.integers(10, 40)).tolist()))
    return pairs


def score_ours():
    tune_malloc()
    model, pairs = new_model().to(device).eval(), score_pairs()

    def step():
        with pick_autocast(dtype, device):
            return score_completions(model, pairs)[0].tolist()

    return step, items


def score_lm_eval(batch_size=4):
    """lm-evaluation-harness, with the tokens given to it: only its model's work is timed."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = transformers_model(pick_dtype(dtype, device))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), eos_token="<|endoftext|>"
    )
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    requests = [(("", str(i)), *pair) for i, pair in enumerate(score_pairs())]
    return lambda: lm._loglikelihood_tokens(requests, disable_tqdm=True), items


def corpus():
    """The path of the texts, or the files of Python's own standard library in a .jsonl file."""
    path = data or f"{scratch}/texts.jsonl"
    if not os.path.exists(path):
        sources = sorted(glob.glob(os.path.join(sysconfig.get_paths()["stdlib"], "*.py")))
        with open(path, "w") as f:
            f.writelines(
                json.dumps({"text": text}) + "\n" for s in sources for text in read_text(s)
            )
    return path


def write_texts(write):
    """write(texts, enc, folder) on the corpus, into a new folder each time."""
    enc = load_tokenizer("gpt2")

    def step():
        with tempfile.TemporaryDirectory() as folder:
            write(Documents(corpus()), enc, folder)

    return step, sum(len(ids) for ids in enc.encode_ordinary_batch(list(Documents(corpus()))))


def tokenize_ours(engine="auto"):
    """fineweb.py's engine "auto" is gigatoken, if it is installed."""
    return write_texts(partial(fineweb.write_shards, prefix="bench", engine=engine))


def encode_for_pool(text):
    """What build-nanogpt's fineweb.py does with a document in a process of its pool."""
    enc = load_tokenizer("gpt2")
    return np.array([enc.eot_token, *enc.encode_ordinary(text)]).astype(np.uint16)


def tokenize_pool():
    """As build-nanogpt's fineweb.py: a pool of half the cores, with pickled texts and arrays."""
    pool = multiprocessing.get_context("fork").Pool(max(1, num_cpus() // 2))

    def write(texts, enc, folder):
        arrays = list(pool.imap(encode_for_pool, texts, chunksize=16))
        np.save(os.path.join(folder, "shard.npy"), np.concatenate(arrays))

    return write_texts(write)


def start_ours(num_shards):
    """A whole run of one step, from Enter to its checkpoint, with shards of 10M zeros (sparse)."""
    global measured_process
    measured_process = resource.RUSAGE_CHILDREN
    folder = f"{scratch}/{num_shards}"
    os.makedirs(folder, exist_ok=True)
    shards = []
    for i in range(num_shards):
        name = f"bench_{'train' if i else 'val'}_{i:06d}.npy"
        np.lib.format.open_memmap(f"{folder}/{name}", "w+", np.uint16, (10_000_000,))
        shards.append({"file": name, "split": "train" if i else "val", "tokens": 10_000_000})
    write_meta(folder, {"tokenizer": "bytes", "complete": True, "shards": shards})
    line = ["train_gpt2.py", "--preset=tiny", "--max_steps=1", "--eval_every=0", "--sample_every=0"]
    line += ["--plot_every=0", f"--data_dir={folder}", f"--log_dir={folder}/log"]
    line += [f"--device={device}"]
    output = subprocess.DEVNULL
    return lambda: subprocess.run([sys.executable, *line], cwd=ROOT, check=True, stdout=output), 1


# -- what the machine can do, in the units of the contenders --------------------------
def matmul():
    """Training tokens whose FLOPs a large matrix product does in the same time."""
    n, times = (8192, 20) if device.startswith("cuda") else (2048, 4)
    a, b = torch.randn(2, n, n, device=device).to(pick_dtype(dtype, device))
    return lambda: [a @ b for _ in range(times)], times * 2 * n**3 / new_model().flops_per_token(T)


# -- other people's code -------------------------------------------------------------
def import_definitions(clone, name, **variables):
    """The imports, classes and functions of a script in a clone; its other lines are not run."""
    if not clone:
        raise UserError("there is no clone of it: --nanogpt= or --build_nanogpt= names one")
    path = os.path.join(clone, name)
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))  # their hellaswag.py, not ours
    for name in ("hellaswag", "model"):
        sys.modules.pop(name, None)
    with open(path) as f:
        tree = ast.parse(f.read())
    kinds = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    tree.body = [node for node in tree.body if isinstance(node, kinds)]
    module = types.ModuleType("theirs")
    sys.modules["theirs"] = module  # dataclasses look there
    module.__dict__.update(variables)
    exec(ast.unparse(tree), module.__dict__)
    return module


def transformers_model(precision):
    """transformers' GPT-2 with our weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config, weights = to_hugging_face(new_model(), VOCAB)
    model = GPT2LMHeadModel(GPT2Config(**config))
    model.load_state_dict(weights, strict=False)  # lm_head is tied to wte
    return model.to(device, precision)


# -- the comparison -----------------------------------------------------------------
PARTS = {  # unit, {contender: function}; the first is ours, a limit is the machine's
    "train": ("tokens", {
        "ours": train_ours,
        "ours, --preset=modern": partial(train_ours, "modern"),
        "transformers": train_transformers,
        "transformers, compiled": partial(train_transformers, compiled=True),
        "nanoGPT": train_nanogpt,
        "build-nanogpt": train_build_nanogpt,
        "limit: matrix product": matmul,
    }),
    "sample": ("tokens", {
        "ours": sample_ours,
        "transformers": sample_transformers,
        "llama.cpp": sample_llama_cpp,
        "CTranslate2, float32": partial(sample_ctranslate2, "float32"),
        "CTranslate2, int8": partial(sample_ctranslate2, "int8"),
    }),
    "score": ("items", {"ours": score_ours, "lm_eval": score_lm_eval}),
    "tokenize": ("tokens", {
        "ours": tokenize_ours,
        "ours, --engine=tiktoken": partial(tokenize_ours, "tiktoken"),
        "pool.imap (build-nanogpt)": tokenize_pool,
    }),
    "start": ("runs", {"2 shards": partial(start_ours, 2), "10,000": partial(start_ours, 10_000)}),
}  # fmt: skip


def prepare(settings, part, name):
    """Set up a contender in its own process; returns the units of work of a turn."""
    global step
    globals().update(settings)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    torch.set_float32_matmul_precision("high")
    step, units = PARTS[part][1][name]()
    return units


def time_once():
    """(seconds, peak memory in bytes so far) of a turn, in a process that prepare() has set up."""
    start = time.perf_counter()
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cuda.max_memory_allocated()
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, resource.getrusage(measured_process).ru_maxrss * unit


class Contender:
    """A contender in its own process, warmed up."""

    def __init__(self, part, name):
        self.process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        settings = current_settings(globals())
        self.units = self.process.submit(prepare, settings, part, name).result()
        self.turns = []  # (seconds, bytes)
        for _ in range(2):
            self.process.submit(time_once).result()

    def take_turn(self):
        self.turns.append(self.process.submit(time_once).result())

    def rate(self):
        """Units of work per second, by the median turn."""
        return self.units / statistics.median(seconds for seconds, _ in self.turns)

    def peak_gb(self):
        return self.turns[-1][1] / 1e9


def start_contender(part, name):
    """A Contender; None, with a row that says why, if it cannot take part."""
    try:
        return Contender(part, name)
    except Exception as e:
        reason = f"{type(e).__name__}: {e}".partition("\n")[0].removeprefix("UserError: ")
        print(f"| {part} | | {name} | left out: {reason} | | |", flush=True)
        return None


def format_rate(rate, unit):
    digits = 1 if rate < 100 else 0
    return f"{rate:,.{digits}f} {unit}/s"


def compare(part):
    """Print how the first contender of a part compares with each of the others."""
    unit, (first, *others) = PARTS[part]
    ours = start_contender(part, first)
    if ours is None:
        return
    for name in others:
        if not any(word in name for word in against.split(",")):
            continue
        theirs = start_contender(part, name)
        if theirs is None:
            continue
        ours.turns = []
        for _ in range(rounds):  # in alternation
            ours.take_turn()
            theirs.take_turn()
        theirs.process.shutdown()
        ratio = ours.rate() / theirs.rate()
        rates = [format_rate(x.rate(), unit) for x in (ours, theirs)]
        peaks = (ours.peak_gb(), theirs.peak_gb())
        memory = f"{peaks[0]:.1f} / {peaks[1]:.1f} GB"
        if all(peaks):  # on a GPU, 0 for what does not use torch there
            memory += f" = {peaks[0] / peaks[1]:.2f}"
        row = f"| {part} | {rates[0]} | {name} | {rates[1]} | **{ratio:.2f}** | {memory} |"
        print(row, flush=True)


def main():
    if set(what.split(",")) - set(PARTS):
        raise UserError(f"--what={what}: choose among {','.join(PARTS)}")
    if rounds < 1:
        raise UserError(f"--rounds={rounds}: must be at least 1")
    name = f"{num_cpus()} CPU cores"
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    precision, size = str(pick_dtype(dtype, device))[6:], new_model().num_params() / 1e6
    print(f"{time.strftime('%Y-%m-%d')}, {describe_commit()}, torch {torch.__version__}")
    print(f"{name}, {precision}")
    print(f"{size:.0f}M parameters, training on {B} x {T} tokens, medians of {rounds} turns\n")
    print("| what | ours | beside it | theirs | ratio | peak memory |\n|---|---|---|---|---|---|")
    for part in what.split(","):
        compare(part)


if __name__ == "__main__":
    with run_as_script(), tempfile.TemporaryDirectory() as folder:
        configure(globals())
        device = pick_device(device)
        scratch = scratch or folder
        main()
