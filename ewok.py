"""EWoK: does a model know which context makes a sentence likely? (https://arxiv.org/abs/2405.09605)

    python ewok.py --ckpt                               # the latest checkpoint in log/
    EWOK_SRC=my.zip python ewok.py --ckpt=gpt2-xl --items=True
    torchrun --standalone --nproc_per_node=8 ewok.py --ckpt

An item has two contexts C1, C2 and two targets T1, T2; T1 belongs to C1, and T2 to C2. Each score
is the mean of two comparisons of log P(target | context); a tie counts half, so that chance is
exactly 0.5:

context      P(T1|C1) > P(T1|C2) and P(T2|C2) > P(T2|C1): the paper's LogProbs; `ewok` in log.txt
target_sum   P(T1|C1) > P(T2|C1) and P(T2|C2) > P(T1|C2): as the BabyLM evaluation compares
target_mean  the same with the mean log-probability per token

Items come from the first of these: $EWOK_SRC (a zip, a folder or a .jsonl file),
ewok_fast_jsonl.zip, ewok_fast/, and ewok-core/ewok-core-1.0 on the Hugging Face hub, for users who
are logged in and have accepted its terms. The terms ask users not to publish the items as plain
text: a zip is read in memory, with the password in $EWOK_ZIP_PASSWORD (default: ew2026), and no
output contains an item's text.
"""

import json
import os
import pathlib
import time
import zipfile
import zlib

from configurator import check_command_line, check_min, configure

if __name__ == "__main__":
    check_command_line(__file__)  # before torch is imported, which takes seconds

from data.tokenizer import encode
from device import pick_autocast
from model import load_model
from scoring import score_completions
from script import UserError
from training.distributed import (
    init_distributed,
    local_main_process_first,
    run_as_distributed_script,
    score_on_all_ranks,
)

import torch

# -- settings: override any with --key=value --------------------------------------
ckpt = "latest"  # latest or best (of log_dir), a .pt file, a hub name or a Hugging Face folder
log_dir = "log"  # the folder in which to look for latest and best
items = False  # write each item's scores to ewok_items.jsonl, next to the checkpoint or in log_dir
limit = 0  # use only the first N items; 0: all
batch_tokens = 0  # tokens per batch, for memory and speed only; 0: 16384, on a CPU 1024
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # bfloat16 where the hardware has it, else float16 on CUDA, else float32

NAME = "EWoK"
KIND = "ewok"  # in log.txt
SCORES = ("context", "target_sum", "target_mean")
MAIN_METRIC = "context"  # the key of evaluate()'s result that goes to log.txt
GROUPS = ("Domain", "ContextType", "ContextDiff", "TargetDiff")
HUB = "ewok-core/ewok-core-1.0"


# -- items ------------------------------------------------------------------------
def load_items(limit=0):
    """The items, a list of dicts, from the first source that exists; else UserError."""
    # What the user names comes first, and must exist.
    chosen = os.path.expanduser(os.environ.get("EWOK_SRC", ""))
    if chosen and not os.path.exists(chosen):
        raise UserError(f"EWOK_SRC={chosen}: no such file or folder")
    sources = [chosen] if chosen else ["ewok_fast_jsonl.zip", "ewok_fast"]
    sources = [source for source in sources if os.path.exists(source)]
    items = load_from(sources[0]) if sources else load_from_hub()
    return items[:limit] if limit else items


def load_from(source):
    """The items in a zip, a folder or a .jsonl file."""
    if os.path.isdir(source):
        files = read_folder(source)
    elif source.endswith(".jsonl"):
        files = [("", pathlib.Path(source).read_bytes())]
    else:
        files = read_zip(source)
    items = []
    for name, content in files:
        items += parse_items(f"{source}: {name}", content)
    if not items:
        raise UserError(f"{source}: holds no items; expected .jsonl files of them")
    return items


def load_from_hub():
    import datasets
    from huggingface_hub import get_token

    hint = "put ewok_fast_jsonl.zip here, or set EWOK_SRC, "
    hint += f"or accept the terms of {HUB} and run hf auth login"
    if get_token() is None:
        raise UserError(f"there are no EWoK items: {hint}")
    try:
        return list(datasets.load_dataset(HUB, split="test"))
    except Exception as e:  # `datasets` has no base class for its errors
        raise UserError(f"cannot get EWoK from {HUB} ({type(e).__name__}): {hint}")


def read_folder(folder):
    """Yield (name, bytes) of the .jsonl files in a folder, in order."""
    for path in sorted(pathlib.Path(folder).rglob("*.jsonl")):
        yield str(path.relative_to(folder)), path.read_bytes()


def read_zip(path):
    """Yield (name, bytes) of the .jsonl files in a zip: plain, ZipCrypto or WinZip AES."""
    # The password is public: it only keeps the items away from crawlers.
    password = os.environ.get("EWOK_ZIP_PASSWORD", "ew2026").encode()
    opener = zipfile.ZipFile
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(archive.namelist())
            methods = {info.compress_type for info in archive.infolist()}
        # zipfile reads only the older encryption, ZipCrypto; 99 stands for WinZip's AES.
        if 99 in methods:
            try:
                import pyzipper
            except ImportError:
                raise UserError(f"{path} is encrypted with AES: pip install pyzipper")
            opener = pyzipper.AESZipFile
        with opener(path) as archive:
            for name in names:
                if name.endswith(".jsonl") and not name.startswith("__MACOSX"):
                    yield name, archive.read(name, pwd=password)
    except RuntimeError as e:  # zipfile raises it for a wrong password
        raise UserError(f"{path}: {e}; set EWOK_ZIP_PASSWORD")
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"{path}: broken zip, or a wrong EWOK_ZIP_PASSWORD ({e})")


def parse_items(location, content):
    """The items in the bytes of a .jsonl file; raises UserError if a line is not an item."""
    items = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError:
            item = None
        if not isinstance(item, dict):
            raise UserError(f"{location} line {number}: not a JSON object")
        missing = []
        for key in ("Context1", "Context2", "Target1", "Target2"):
            if not isinstance(item.get(key), str) or not item[key]:
                missing.append(key)
        if missing:
            fields = " and ".join(missing)
            raise UserError(f"{location} line {number}: an item without a text in {fields}")
        items.append(item)
    return items


# -- scores -----------------------------------------------------------------------
def score_items(model, enc, items, batch_tokens=0):
    """(sums, counts), float64 tensors (len(items), 4), of T1|C1, T1|C2, T2|C1 and T2|C2.

    sums are the targets' log-probabilities in nats, counts their numbers of tokens.
    """
    # The order of the pairs: T1|C1, T1|C2, T2|C1, T2|C2.
    pairs = []
    for item in items:
        contexts = [encode(enc, item[key]).tolist() for key in ("Context1", "Context2")]
        # The space belongs to the target: GPT-2's tokens of words start with one.
        targets = [encode(enc, " " + item[key]).tolist() for key in ("Target1", "Target2")]
        for target in targets:
            pairs += [(context, target) for context in contexts]
    sums, counts = score_completions(model, pairs, batch_tokens)
    return sums.view(-1, 4), counts.view(-1, 4).double()


def compare(sums, counts):
    """{score: (N,) tensor of 0, 0.25, 0.5, 0.75 or 1} from score_items()'s result."""

    def wins(a, b):
        return (a > b).double() + 0.5 * (a == b).double()  # 1 for a win, 0.5 for a tie

    # Sums t and means m, a column each, in the order of score_items().
    t1c1, t1c2, t2c1, t2c2 = sums.T
    m1c1, m1c2, m2c1, m2c2 = (sums / counts).T
    return {
        "context": (wins(t1c1, t1c2) + wins(t2c2, t2c1)) / 2,
        "target_sum": (wins(t1c1, t2c1) + wins(t2c2, t1c2)) / 2,
        "target_mean": (wins(m1c1, m2c1) + wins(m2c2, m1c2)) / 2,
    }


def evaluate(model, enc, items, batch_tokens=0, rank=0, world_size=1):
    """A model's scores on items, split over ranks; every rank gets the full result.

    Returns a dict of
        context, target_sum, target_mean           means over the items
        context_domain_avg, ...                    means of the domains' means
        count, seconds
        by_Domain, ...                             for each of GROUPS that the items have: {value:
                                                   {"context", "target_sum", "target_mean",
                                                   "count"}}
        items                                      for each: {"id", "domain", "sums", "counts",
                                                   "context", "target_sum", "target_mean"}, no text
    """
    start = time.perf_counter()

    def score(indices):
        part = [items[i] for i in indices]
        return torch.cat(score_items(model, enc, part, batch_tokens), dim=1)

    numbers = score_on_all_ranks(score, len(items), 8, "EWoK", rank, world_size)
    sums, counts = numbers.split(4, dim=1)
    scores = compare(sums, counts)

    # Means over all items, and over the items of each domain, context type and so on.
    result = mean_scores(scores, range(len(items)))
    for group in GROUPS:
        indices = {}  # {value: the items that have it}
        for i, item in enumerate(items):
            if item.get(group) is not None:
                indices.setdefault(str(item[group]), []).append(i)
        if indices:
            by_value = {value: mean_scores(scores, indices[value]) for value in sorted(indices)}
            result[f"by_{group}"] = by_value
    # The paper averages over domains, so that large ones do not count more.
    domains = result.get("by_Domain", {"": result}).values()
    for key in SCORES:
        result[f"{key}_domain_avg"] = sum(domain[key] for domain in domains) / len(domains)
    result["seconds"] = time.perf_counter() - start
    result["items"] = []
    for i, item in enumerate(items):
        # The terms of EWoK forbid publishing the items: only numbers are kept.
        record = {"id": i, "domain": item.get("Domain")}
        record["sums"] = sums[i].tolist()
        record["counts"] = counts[i].int().tolist()
        for key, values in scores.items():
            record[key] = values[i].item()
        result["items"].append(record)
    return result


def mean_scores(scores, indices):
    """The mean of each score over some items, and their count."""
    means = {key: values[indices].mean().item() for key, values in scores.items()}
    means["count"] = len(indices)
    return means


def summary(result):
    """evaluate()'s result in one line."""
    return f"EWoK {result['context']:.4f} | {result['target_mean']:.4f} target_mean"


# -- output -----------------------------------------------------------------------
def items_path():
    """The file for the items' scores: not one that a training run has written."""
    folder = os.path.dirname(ckpt) if ckpt.endswith(".pt") else log_dir
    os.makedirs(folder or ".", exist_ok=True)
    path = f"{folder}/ewok_items.jsonl"
    if os.path.exists(path):
        with open(path) as f:
            is_of_a_run = any('"step"' in line for line in f)
        if is_of_a_run:
            name = os.path.basename(os.path.normpath(ckpt)).removesuffix(".pt")
            path = f"{folder}/ewok_items_{name}.jsonl"
    return path


def print_row(name, scores, suffix="", count=""):
    context, target_sum, target_mean = (scores[key + suffix] for key in SCORES)
    print(f"{name:32} {context:8.3f} {target_sum:11.3f} {target_mean:12.3f} {count:>7}")


def main():
    check_min(0, limit=limit, batch_tokens=batch_tokens)
    rank, world_size, device_name = init_distributed(device)
    autocast = pick_autocast(dtype, device_name)
    loaded = local_main_process_first(lambda: load_items(limit))
    model, enc = load_model(ckpt, device_name, log_dir)
    with autocast:
        result = evaluate(model, enc, loaded, batch_tokens, rank, world_size)
    if rank > 0:
        return
    # A table: groups first, then all items, then chance.
    print(f"{'':32} {'context':>8} {'target_sum':>11} {'target_mean':>12} {'count':>7}")
    for group in GROUPS:
        for value, scores in result.get(f"by_{group}", {}).items():
            print_row(f"{group} {value}", scores, count=scores["count"])
    print_row("mean of domains", result, "_domain_avg")
    print_row(f"{ckpt}, all items", result, count=result["count"])
    print_row("chance", dict.fromkeys(SCORES, 0.5))
    print(f"{result['seconds']:.1f} seconds")
    if items:
        path = items_path()
        with open(path, "w") as f:
            for record in result["items"]:
                f.write(json.dumps(record) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    with run_as_distributed_script():
        configure(globals())
        main()
