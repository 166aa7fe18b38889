"""HellaSwag: which of four endings continues a text? (https://arxiv.org/abs/1905.07830)

    python hellaswag.py --ckpt                          # the newest checkpoint in log/, all 10,042 items
    python hellaswag.py --ckpt=gpt2-xl --style=both --limit=1000
    torchrun --standalone --nproc_per_node=8 hellaswag.py --ckpt

Each ending is scored by its log-probability behind the context; no examples are shown. Two styles:

completion  The text is ctx, the ending " " + ending. acc takes the ending of the highest summed
            log-probability, acc_norm that of the highest mean a token. As in build-nanogpt and llm.c;
            its acc_norm is `hella` in log.txt.
harness     The text is "activity_label: ctx", freed of WikiHow's brackets; acc_norm divides by the
            ending's length in characters. As lm-evaluation-harness's task, for published numbers.

Published: GPT-2 124M 28.6 acc, 29.6 acc_norm (completion); GPT-3 124M 33.7 acc_norm.
"""

import json
import os
import re
import sys
import time

from configurator import check_numbers, configure
from model import load_model
from parallel import local_first, pick_autocast, run_script, start_processes, sum_over_ranks
from scoring import score_completions
from shards import download
from tokenizer import encode

import requests
import torch
from tqdm import tqdm

# -- settings: override any with --key=value --------------------------------------
ckpt = "latest"  # latest or best (in log_dir), a .pt file, a name on the hub (gpt2, owner/name), or its folder
log_dir = "log"  # where latest is looked for
style = "completion"  # completion, harness or both
split = "val"  # val or train
data = ""  # a local .jsonl file in HellaSwag's format; empty: the split, downloaded once to hellaswag/
limit = 0  # only the first so many items; 0: all
batch_tokens = 0  # tokens in a batch; changes memory and speed, not the result; 0: 16384, on a CPU 1024
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # bfloat16 where the hardware has it, else float16 on CUDA, else float32

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{split}.jsonl"


def load_items(path="", split="val", limit=0):
    """The items, a list of dicts, of a local .jsonl file or of a split, which is downloaded once.

    Exits with one line if the file cannot be had or one of its lines is not an item.
    """
    if not path:
        path = os.path.join("hellaswag", f"hellaswag_{split}.jsonl")
        if not os.path.exists(path):
            try:
                os.makedirs("hellaswag", exist_ok=True)
                download(URL.format(split=split), path)
            except (requests.RequestException, OSError) as e:
                sys.exit(f"cannot download HellaSwag ({type(e).__name__}): put {URL.format(split=split)} at {path}")
    items = []
    try:
        with open(path, encoding="utf-8-sig") as f:
            for number, line in enumerate(f, start=1):
                if len(items) == limit > 0:
                    break
                if line.strip():
                    items.append(parse(line, f"{path} line {number}"))
    except (OSError, UnicodeDecodeError) as e:
        sys.exit(f"{path}: cannot read this file ({e})")
    if not items:
        sys.exit(f"{path}: holds no items")
    return items


def parse(line, where):
    """The item of a line of HellaSwag's jsonl; exits with one line if it is none."""
    try:
        item = json.loads(line)
        item["label"] = ["0", "1", "2", "3"].index(str(item["label"]))  # Hugging Face has strings
        texts = [item["ctx"], item["ctx_a"], item["ctx_b"], item["activity_label"], *item["endings"]]
        whole = all(isinstance(text, str) for text in texts) and len(texts) == 8
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        sys.exit(f"{where}: not a HellaSwag item: ctx, ctx_a, ctx_b, activity_label, 4 endings, label")
    return item


def completion_style(item, enc):
    """(context, endings) of an item as token ids, and the length of each ending in tokens."""
    endings = [encode(enc, " " + ending).tolist() for ending in item["endings"]]
    context = encode(enc, item["ctx"]).tolist() or [enc.eot_token]
    return [(context, ending) for ending in endings], [len(e) for e in endings]


def harness_style(item, enc):
    """The same in lm-evaluation-harness's form, and the length of each ending in characters.

    It encodes context and ending together, and takes what follows the tokens of the context alone.
    """

    def clean(text):
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    query = clean(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
    context = encode(enc, query.rstrip()).tolist()
    endings = [clean(ending) for ending in item["endings"]]
    rest = [encode(enc, f"{query} {ending}").tolist()[len(context) :] for ending in endings]
    pairs = [(context or [enc.eot_token], ending) for ending in rest]
    return pairs, [len(ending) for ending in endings]


SCORE = "acc_norm"  # of evaluate's, in log.txt
STYLES = {"completion": completion_style, "harness": harness_style}


def predict(model, enc, items, style="completion", batch_tokens=0):
    """(by sum, by normalised sum): the index of the best ending of each item, two lists of ints."""
    prepared = [STYLES[style](item, enc) for item in items]
    sums, _ = score_completions(model, [pair for pairs, _ in prepared for pair in pairs], batch_tokens)
    lengths = torch.tensor([lengths for _, lengths in prepared])
    sums = sums.view(-1, 4)
    return sums.argmax(1).tolist(), (sums / lengths).argmax(1).tolist()


def evaluate(model, enc, items, style="completion", batch_tokens=0, rank=0, world_size=1):
    """{"acc", "acc_norm", "stderr", "count", "seconds"} of a model on items, divided among ranks.

    acc and acc_norm are shares of 1, stderr is acc_norm's. Every rank gets the result of all.
    """
    start = time.perf_counter()
    right = torch.zeros(len(items), 2, dtype=torch.float64)  # by sum, by normalised sum
    mine = torch.arange(rank, len(items), world_size)
    for part in tqdm(mine.split(256), desc=f"HellaSwag {style}", leave=False, disable=rank != 0):
        predicted = predict(model, enc, [items[i] for i in part], style, batch_tokens)
        labels = torch.tensor([items[i]["label"] for i in part])
        right[part] = (torch.tensor(predicted) == labels).double().T
    acc, acc_norm = sum_over_ranks(right).mean(dim=0).tolist()
    stderr = (acc_norm * (1 - acc_norm) / len(items)) ** 0.5
    seconds = time.perf_counter() - start
    return {"acc": acc, "acc_norm": acc_norm, "stderr": stderr, "count": len(items), "seconds": seconds}


def summary(result):
    """What evaluate() returns, in a line."""
    return f"HellaSwag {result['acc_norm']:.2%} acc_norm | {result['acc']:.2%} acc"


def main():
    if style not in (*STYLES, "both"):
        sys.exit(f"--style={style}: choose completion, harness or both")
    if split not in ("val", "train"):
        sys.exit(f"--split={split}: choose val or train")
    check_numbers(limit=limit, batch_tokens=batch_tokens)
    rank, world_size, where = start_processes(device)
    autocast = pick_autocast(dtype, where)
    items = local_first(lambda: load_items(data, split, limit))
    model, enc = load_model(ckpt, where, log_dir)
    rows = []
    for name in STYLES if style == "both" else (style,):
        with autocast:
            r = evaluate(model, enc, items, name, batch_tokens, rank, world_size)
        rows.append((f"{ckpt}, {name}", r["acc"], r["acc_norm"], r["stderr"], r["count"], r["seconds"]))
    if rank == 0:
        print(f"{'':32} {'acc':>7} {'acc_norm':>9} {'stderr':>7} {'count':>7} {'seconds':>8}")
        for name, acc, acc_norm, stderr, count, seconds in rows:
            print(f"{name:32} {acc:7.2%} {acc_norm:9.2%} {stderr:7.2%} {count:7d} {seconds:8.1f}")
        print(f"{'GPT-2 124M, completion':32} {'28.6%':>7} {'29.6%':>9}\n{'GPT-3 124M':32} {'':>7} {'33.7%':>9}")


if __name__ == "__main__":
    configure(globals())
    run_script(main)
