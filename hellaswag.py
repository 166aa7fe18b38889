"""HellaSwag: which of four endings continues a text? (https://arxiv.org/abs/1905.07830)

    python hellaswag.py --ckpt                          # the latest checkpoint in log/
    python hellaswag.py --ckpt=gpt2-xl --style=both --limit=1000
    torchrun --standalone --nproc_per_node=8 hellaswag.py --ckpt

Each ending is scored by its log-probability given the context; no examples are shown. Two styles:

completion  The text is ctx, the ending " " + ending. acc picks the ending with the highest summed
            log-probability, acc_norm the one with the highest mean per token. As in build-nanogpt
            and llm.c; its acc_norm is `hella` in log.txt.
harness     The text is "activity_label: ctx", without WikiHow's brackets; acc_norm divides by the
            ending's length in characters. As in lm-evaluation-harness, for published numbers.

Published: GPT-2 124M 28.6 acc, 29.6 acc_norm (completion); GPT-3 124M 33.7 acc_norm.
"""

import json
import os
import re
import time

from configurator import check_choice, check_command_line, check_min, configure

if __name__ == "__main__":
    check_command_line(__file__)  # before torch is imported, which takes seconds

from data.tokenizer import encode
from device import pick_autocast
from files import download
from model import load_model
from scoring import score_completions
from script import UserError
from training.distributed import (
    init_distributed,
    local_main_process_first,
    run_as_distributed_script,
    score_on_all_ranks,
)

import requests
import torch

# -- settings: override any with --key=value --------------------------------------
ckpt = "latest"  # latest or best (of log_dir), a .pt file, a hub name or a Hugging Face folder
log_dir = "log"  # the folder in which to look for latest and best
style = "completion"  # completion, harness or both
split = "val"  # val or train
data = ""  # a .jsonl file in HellaSwag's format; empty: the split, downloaded to hellaswag/
limit = 0  # use only the first N items; 0: all
batch_tokens = 0  # tokens per batch, for memory and speed only; 0: 16384, on a CPU 1024
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # bfloat16 where the hardware has it, else float16 on CUDA, else float32

NAME = "HellaSwag"
KIND = "hella"  # in log.txt
MAIN_METRIC = "acc_norm"  # the key of evaluate()'s result that goes to log.txt
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{split}.jsonl"


# -- items --------------------------------------------------------------------------
def load_items(path="", split="val", limit=0):
    """The items, a list of dicts, of a local .jsonl file or of a split, which is downloaded once.

    Raises UserError if the file cannot be loaded or one of its lines is not an item.
    """
    if not path:
        path = download_split(split)
    items = []
    try:
        with open(path, encoding="utf-8-sig") as f:
            for number, line in enumerate(f, start=1):
                # A limit means the first items, so that results can be compared.
                if limit and len(items) >= limit:
                    break
                if line.strip():
                    items.append(parse_item(line, f"{path} line {number}"))
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot read this file ({e})")
    if not items:
        raise UserError(f"{path}: holds no items")
    return items


def download_split(split):
    """The path of a split's file, which is downloaded if it is missing."""
    path = os.path.join("hellaswag", f"hellaswag_{split}.jsonl")
    if not os.path.exists(path):
        url = URL.format(split=split)
        try:
            os.makedirs("hellaswag", exist_ok=True)
            download(url, path)
        except (requests.RequestException, OSError) as e:
            raise UserError(f"cannot download HellaSwag ({type(e).__name__}): put {url} at {path}")
    return path


def parse_item(line, location):
    """The item in a line of HellaSwag's .jsonl file; raises UserError if there is none."""
    try:
        # Check all that is used: a wrong file should not fail in the middle of an evaluation.
        item = json.loads(line)
        item["label"] = ["0", "1", "2", "3"].index(str(item["label"]))  # Hugging Face has strings
        texts = [
            item["ctx"],
            item["ctx_a"],
            item["ctx_b"],
            item["activity_label"],
            *item["endings"],
        ]
        is_valid = len(texts) == 8 and all(isinstance(text, str) for text in texts)
    except (ValueError, KeyError, TypeError):
        is_valid = False
    if not is_valid:
        raise UserError(
            f"{location}: not a HellaSwag item: ctx, ctx_a, ctx_b, activity_label, 4 endings, label"
        )
    return item


# -- styles -------------------------------------------------------------------------
def completion_style(item, enc):
    """(context, ending) token ids of an item's four endings, and each ending's length in tokens."""
    # Context and ending are encoded separately, with a space between them.
    context = encode(enc, item["ctx"]).tolist() or [enc.eot_token]
    endings = [encode(enc, " " + ending).tolist() for ending in item["endings"]]
    pairs = [(context, ending) for ending in endings]
    return pairs, [len(ending) for ending in endings]


def harness_style(item, enc):
    """The same in lm-evaluation-harness's form, with each ending's length in characters.

    It encodes context and ending together, and takes the tokens after those of the context alone.
    """

    def clean(text):
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    # The harness puts the activity first, and starts ctx_b with a capital letter.
    query = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
    query = clean(query)
    context = encode(enc, query.rstrip()).tolist()
    endings = [clean(ending) for ending in item["endings"]]
    pairs = []
    for ending in endings:
        ids = encode(enc, f"{query} {ending}").tolist()
        pairs.append((context or [enc.eot_token], ids[len(context) :]))
    return pairs, [len(ending) for ending in endings]


STYLES = {"completion": completion_style, "harness": harness_style}


# -- scores -------------------------------------------------------------------------
def predict(model, enc, items, style="completion", batch_tokens=0):
    """The best ending of each item, by sum and by normalized sum: two lists of indices."""
    all_pairs = []
    all_lengths = []
    for item in items:
        pairs, lengths = STYLES[style](item, enc)
        all_pairs.extend(pairs)
        all_lengths.append(lengths)
    sums, _ = score_completions(model, all_pairs, batch_tokens)
    # A long ending has a lower probability: acc_norm divides by its length.
    sums = sums.view(-1, 4)
    normalized = sums / torch.tensor(all_lengths)
    return sums.argmax(1).tolist(), normalized.argmax(1).tolist()


def evaluate(model, enc, items, style="completion", batch_tokens=0, rank=0, world_size=1):
    """{"acc", "acc_norm", "stderr", "count", "seconds"} of a model on items, split over ranks.

    acc and acc_norm are between 0 and 1; stderr is acc_norm's. Every rank gets the full result.
    """
    start = time.perf_counter()

    def score(indices):
        """Whether the predictions by sum and by normalized sum are correct, 1.0 or 0.0: (N, 2)."""
        predicted = predict(model, enc, [items[i] for i in indices], style, batch_tokens)
        labels = torch.tensor([items[i]["label"] for i in indices])
        return (torch.tensor(predicted) == labels).double().T  # (2, N) == (N,), then (N, 2)

    correct = score_on_all_ranks(score, len(items), 2, f"HellaSwag {style}", rank, world_size)
    acc, acc_norm = correct.mean(dim=0).tolist()
    return {
        "acc": acc,
        "acc_norm": acc_norm,
        "stderr": (acc_norm * (1 - acc_norm) / len(items)) ** 0.5,
        "count": len(items),
        "seconds": time.perf_counter() - start,
    }


def summary(result):
    """evaluate()'s result in one line."""
    return f"HellaSwag {result['acc_norm']:.2%} acc_norm | {result['acc']:.2%} acc"


def main():
    check_choice("style", style, (*STYLES, "both"))
    check_choice("split", split, ("val", "train"))
    check_min(0, limit=limit, batch_tokens=batch_tokens)
    rank, world_size, device_name = init_distributed(device)
    autocast = pick_autocast(dtype, device_name)
    items = local_main_process_first(lambda: load_items(data, split, limit))
    model, enc = load_model(ckpt, device_name, log_dir)
    # Both styles, or one.
    results = {}
    for name in STYLES if style == "both" else (style,):
        with autocast:
            results[name] = evaluate(model, enc, items, name, batch_tokens, rank, world_size)
    if rank > 0:
        return
    # A table, with the published numbers below.
    print(f"{'':32} {'acc':>7} {'acc_norm':>9} {'stderr':>7} {'count':>7} {'seconds':>8}")
    for name, r in results.items():
        row = f"{ckpt + ', ' + name:32} {r['acc']:7.2%} {r['acc_norm']:9.2%}"
        print(f"{row} {r['stderr']:7.2%} {r['count']:7d} {r['seconds']:8.1f}")
    print(f"{'GPT-2 124M, completion':32} {'28.6%':>7} {'29.6%':>9}")
    print(f"{'GPT-3 124M':32} {'':>7} {'33.7%':>9}")


if __name__ == "__main__":
    with run_as_distributed_script():
        configure(globals())
        main()
