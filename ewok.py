"""EWoK: does a model know which context makes a sentence likely? (https://arxiv.org/abs/2405.09605)

    python ewok.py --ckpt                               # the newest checkpoint in log/
    EWOK_SRC=my.zip python ewok.py --ckpt=gpt2-xl --items=True
    torchrun --standalone --nproc_per_node=8 ewok.py --ckpt

An item has two contexts C1, C2 and two targets T1, T2; T1 goes with C1, T2 with C2. Scores, each the mean of two
comparisons of log P(target | context); a tie counts half, so that chance is exactly 0.5:

context      P(T1|C1) > P(T1|C2) and P(T2|C2) > P(T2|C1): the paper's LogProbs score; `ewok` in log.txt
target_sum   P(T1|C1) > P(T2|C1) and P(T2|C2) > P(T1|C2), as the BabyLM evaluation compares
target_mean  the same with the mean log-probability a token

Items come from the first of: $EWOK_SRC (a zip or a folder), ewok_fast_jsonl.zip, ewok_fast/, and
ewok-core/ewok-core-1.0 on the Hugging Face hub, for users who are logged in and have accepted its terms. These ask that
the items do not lie around in plain text: a zip is read in memory, with the password $EWOK_ZIP_PASSWORD (ew2026 by
default), and no output holds an item's text.
"""

import json
import os
import pathlib
import sys
import time
import zipfile
import zlib

from configurator import check_numbers, configure
from model import load_model
from parallel import local_first, pick_autocast, run_script, start_processes, sum_over_ranks
from scoring import score_completions
from tokenizer import encode

import torch
from tqdm import tqdm

# -- settings: override any with --key=value --------------------------------------
ckpt = "latest"  # latest or best (in log_dir), a .pt file, a name on the hub (gpt2, owner/name), or its folder
log_dir = "log"  # where latest is looked for
items = False  # write each item's numbers to ewok_items.jsonl, beside the checkpoint or in log_dir
limit = 0  # only the first so many items; 0: all
batch_tokens = 0  # tokens in a batch; changes memory and speed, not the result; 0: 16384, on a CPU 1024
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # bfloat16 where the hardware has it, else float16 on CUDA, else float32

SCORES = ("context", "target_sum", "target_mean")
SCORE = "context"  # of evaluate's, in log.txt
GROUPS = ("Domain", "ContextType", "ContextDiff", "TargetDiff")
HUB = "ewok-core/ewok-core-1.0"


# -- items ------------------------------------------------------------------------
def load_items(limit=0):
    """The items, a list of dicts, from the first source there is; exits with one line if there is none."""
    chosen = os.path.expanduser(os.environ.get("EWOK_SRC", ""))
    source = next((p for p in (chosen, "ewok_fast_jsonl.zip", "ewok_fast") if p and os.path.exists(p)), None)
    if chosen not in ("", source):
        sys.exit(f"EWOK_SRC={chosen}: no such file or folder")
    if source is None:
        found = load_from_hub()
    else:
        files = read_folder(source) if os.path.isdir(source) else read_zip(source)
        found = [item for name, content in files for item in parse(f"{source}: {name}", content)]
        if not found:
            sys.exit(f"{source}: holds no items; expected .jsonl files of them")
    return found[:limit] if limit else found


def load_from_hub():
    import datasets
    from huggingface_hub import get_token

    help = f"put ewok_fast_jsonl.zip here, or set EWOK_SRC, or accept the terms of {HUB} and run hf auth login"
    if get_token() is None:
        sys.exit(f"there are no EWoK items: {help}")
    try:
        return list(datasets.load_dataset(HUB, split="test"))
    except Exception as e:  # whatever `datasets` raises: it has no base class
        sys.exit(f"cannot get EWoK from {HUB} ({type(e).__name__}): {help}")


def read_folder(folder):
    """Yield (name, bytes) of the .jsonl files in a folder, in order."""
    for path in sorted(pathlib.Path(folder).rglob("*.jsonl")):
        yield str(path.relative_to(folder)), path.read_bytes()


def read_zip(path):
    """Yield (name, bytes) of the .jsonl files in a zip: plain, ZipCrypto or WinZip AES. In memory."""
    password = os.environ.get("EWOK_ZIP_PASSWORD", "ew2026").encode()
    opener = zipfile.ZipFile
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(archive.namelist())
            if any(info.compress_type == 99 for info in archive.infolist()):  # WinZip AES
                try:
                    import pyzipper
                except ImportError:
                    sys.exit(f"{path} is encrypted with AES: pip install pyzipper")
                opener = pyzipper.AESZipFile
        with opener(path) as archive:
            for name in names:
                if name.endswith(".jsonl") and not name.startswith("__MACOSX"):
                    yield name, archive.read(name, pwd=password)
    except RuntimeError as e:  # zipfile's word for a wrong password
        sys.exit(f"{path}: {e}; set EWOK_ZIP_PASSWORD")
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error) as e:
        sys.exit(f"{path}: broken zip, or a wrong EWOK_ZIP_PASSWORD ({e})")


def parse(where, content):
    """The items in the bytes of a .jsonl file."""
    found = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            keys = ("Context1", "Context2", "Target1", "Target2")
            missing = [key for key in keys if not (isinstance(item.get(key), str) and item[key])]
        except (ValueError, AttributeError):
            sys.exit(f"{where} line {number}: not a JSON object")
        if missing:
            sys.exit(f"{where} line {number}: an item without a text in {' and '.join(missing)}")
        found.append(item)
    return found


# -- scores -----------------------------------------------------------------------
def score_items(model, enc, items, batch_tokens=0):
    """(sums, counts), float64 tensors (len(items), 4), of T1|C1, T1|C2, T2|C1 and T2|C2.

    sums are the log-probabilities of the targets in nats, counts their numbers of tokens.
    """
    pairs = []
    for item in items:
        contexts = [encode(enc, item[key]).tolist() for key in ("Context1", "Context2")]
        targets = [encode(enc, " " + item[key]).tolist() for key in ("Target1", "Target2")]
        pairs += [(context, target) for target in targets for context in contexts]
    sums, counts = score_completions(model, pairs, batch_tokens)
    return sums.view(-1, 4), counts.view(-1, 4).double()


def compare(sums, counts):
    """{score: (N,) tensor of 0, 0.25, 0.5, 0.75 or 1} from score_items's numbers."""

    def wins(a, b):
        return (a > b).double() + 0.5 * (a == b).double()

    t1c1, t1c2, t2c1, t2c2 = sums.T
    m1c1, m1c2, m2c1, m2c2 = (sums / counts).T
    return {
        "context": (wins(t1c1, t1c2) + wins(t2c2, t2c1)) / 2,
        "target_sum": (wins(t1c1, t2c1) + wins(t2c2, t1c2)) / 2,
        "target_mean": (wins(m1c1, m2c1) + wins(m2c2, m1c2)) / 2,
    }


def evaluate(model, enc, items, batch_tokens=0, rank=0, world_size=1):
    """What a model makes of items, divided among ranks; every rank gets all.

    Returns {"context", "target_sum", "target_mean"} over items, the same with "_domain_avg" as the mean of the domains'
    means, "count", "seconds", and for each of GROUPS that the items have {"by_<group>": {value: {"context",
    "target_sum", "target_mean", "count"}}}; and "items", for each {"id", "domain", "sums", "counts", "context",
    "target_sum", "target_mean"}, without its text.
    """
    t0 = time.perf_counter()
    numbers = torch.zeros(len(items), 8, dtype=torch.float64)
    mine = torch.arange(rank, len(items), world_size)
    for part in tqdm(mine.split(256), desc="EWoK", leave=False, disable=rank != 0):
        numbers[part] = torch.cat(score_items(model, enc, [items[i] for i in part], batch_tokens), dim=1)
    sums, counts = sum_over_ranks(numbers).split(4, dim=1)
    scores = compare(sums, counts)

    def means(chosen):
        return {key: values[chosen].mean().item() for key, values in scores.items()} | {"count": len(chosen)}

    result = means(range(len(items)))
    for group in GROUPS:
        members = {}
        for i, item in enumerate(items):
            if item.get(group) is not None:
                members.setdefault(str(item[group]), []).append(i)
        if members:
            result[f"by_{group}"] = {value: means(chosen) for value, chosen in sorted(members.items())}
    domains = result.get("by_Domain", {"": result}).values()
    result |= {f"{key}_domain_avg": sum(d[key] for d in domains) / len(domains) for key in SCORES}
    result["seconds"] = time.perf_counter() - t0
    result["items"] = [
        {"id": i, "domain": item.get("Domain"), "sums": sums[i].tolist(), "counts": counts[i].int().tolist()}
        | {key: values[i].item() for key, values in scores.items()}
        for i, item in enumerate(items)
    ]
    return result


def summary(result):
    """What evaluate() returns, in a line."""
    return f"EWoK {result['context']:.4f} | {result['target_mean']:.4f} target_mean"


def items_path():
    """The file for the items' numbers, which is not one that a run keeps of its own."""
    folder = os.path.dirname(ckpt) if ckpt.endswith(".pt") else log_dir
    os.makedirs(folder or ".", exist_ok=True)
    path = os.path.join(folder, "ewok_items.jsonl")
    if os.path.exists(path) and any('"step"' in line for line in open(path)):
        name = os.path.basename(os.path.normpath(ckpt)).removesuffix(".pt")
        path = os.path.join(folder, f"ewok_items_{name}.jsonl")
    return path


def main():
    check_numbers(limit=limit, batch_tokens=batch_tokens)
    rank, world_size, where = start_processes(device)
    autocast = pick_autocast(dtype, where)
    found = local_first(lambda: load_items(limit))
    model, enc = load_model(ckpt, where, log_dir)
    with autocast:
        result = evaluate(model, enc, found, batch_tokens, rank, world_size)
    if rank > 0:
        return
    print(f"{'':32} {'context':>8} {'target_sum':>11} {'target_mean':>12} {'count':>7}")

    def row(name, r, suffix="", count=""):
        context, target_sum, target_mean = (r[key + suffix] for key in SCORES)
        print(f"{name:32} {context:8.3f} {target_sum:11.3f} {target_mean:12.3f} {count:>7}")

    for group in GROUPS:
        for value, r in result.get(f"by_{group}", {}).items():
            row(f"{group} {value}", r, count=r["count"])
    row("mean of domains", result, "_domain_avg")
    row(f"{ckpt}, all items", result, count=result["count"])
    row("chance", dict.fromkeys(SCORES, 0.5))
    print(f"{result['seconds']:.1f} seconds")
    if items:
        path = items_path()
        with open(path, "w") as f:
            f.writelines(json.dumps(record) + "\n" for record in result["items"])
        print(f"wrote {path}")


if __name__ == "__main__":
    configure(globals())
    run_script(main)
