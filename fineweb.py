"""Text to token shards: FineWeb-Edu, another dataset, or your own files, tokenized for train_gpt2.py.

    python fineweb.py                                          # FineWeb-Edu sample-10BT -> edu_fineweb10B/
    python fineweb.py --subset=sample-100BT --out_dir=edu_fineweb100B
    python fineweb.py --dataset=my_texts --out_dir=my_shards   # .txt .jsonl .jsonl.gz .json.gz .parquet
    python fineweb.py --dataset=tinyshakespeare --tokenizer=bytes --out_dir=shakespeare

Streams by default, so that the first shards exist minutes after the start. shards.py has the format.
"""

import collections
import contextlib
import glob
import itertools
import os
import re
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import requests
from tqdm import tqdm

from configurator import configure
from shards import ShardWriter, has_shards, token_dtype
from tokenizer import EOT, load_tokenizer

# -- settings: override any with --key=value --------------------------------------
dataset = "fineweb-edu"  # or fineweb, openwebtext, smol-smoltalk, tinyshakespeare, a file, a folder
subset = "sample-10BT"  # of fineweb(-edu): sample-10BT, sample-100BT, sample-350BT or default (all)
text_column = "text"  # the column that holds the text
out_dir = "edu_fineweb10B"  # where the shards go
tokenizer = "gpt2"  # gpt2, bytes, or the path of a tokenizer.json
shard_size = 100_000_000  # tokens a shard
max_tokens = 0  # stop after this many tokens; 0: take all
streaming = True  # read while downloading; False downloads everything first
shuffle_buffer = 0  # shuffle documents through a buffer of this many as they stream; 0: leave their order
seed = 1337  # of that shuffle

HUB = {
    "fineweb-edu": "HuggingFaceFW/fineweb-edu",
    "fineweb": "HuggingFaceFW/fineweb",
    "openwebtext": "Skylion007/openwebtext",
    "smol-smoltalk": "HuggingFaceTB/smol-smoltalk",
}
TINYSHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"

# -- documents --------------------------------------------------------------------


def download(url, path, timeout=30):
    """Fetch url to path with a progress bar, whole or not at all; raises requests' exceptions."""
    with requests.get(url, stream=True, timeout=timeout) as r:
        r.raise_for_status()
        total = int(r.headers.get("content-length", 0)) or None
        try:
            with (
                open(path + ".tmp", "wb") as f,
                tqdm(total=total, unit="B", unit_scale=True, desc=path) as bar,
            ):
                for chunk in r.iter_content(1 << 20):
                    f.write(chunk)
                    bar.update(len(chunk))
            os.replace(path + ".tmp", path)
        except BaseException:
            os.remove(path + ".tmp")
            raise


def read_text(path):
    """The documents of a UTF-8 .txt file: one, or those between its <|endoftext|> lines."""
    try:
        with open(path, encoding="utf-8", newline="") as f:
            parts = f.read().split(EOT)
    except (OSError, UnicodeDecodeError) as e:
        sys.exit(f"{path}: not a readable UTF-8 text file ({e})")
    return parts if len(parts) == 1 else [part.strip("\n") for part in parts]


def find_files(path):
    """{reader: [files]} of a data file or, recursively, a folder; exits if there is none."""
    kinds = {".txt": "text", ".jsonl": "json", ".jsonl.gz": "json", ".json.gz": "json", ".parquet": "parquet"}
    paths = [path]
    if os.path.isdir(path):
        paths = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    found = collections.defaultdict(list)
    for p in sorted(paths):
        for ending, kind in kinds.items():
            if p.endswith(ending):
                found[kind].append(p)
    if not found:
        sys.exit(f"{path}: no data files here; expected {', '.join(kinds)}")
    return found


def text_rows(paths):
    for path in paths:
        yield from ({"text": text} for text in read_text(path))


def open_rows(dataset, subset, streaming):
    """The `datasets` objects that hold a dataset's documents as rows, by its name or path."""
    import datasets

    if dataset in HUB:
        args = (HUB[dataset], subset) if dataset.startswith("fineweb") else (HUB[dataset],)
        return [datasets.load_dataset(*args, split="train", streaming=streaming)]
    return [
        datasets.IterableDataset.from_generator(text_rows, gen_kwargs={"paths": paths})
        if kind == "text"
        else datasets.load_dataset(kind, data_files=paths, split="train", streaming=streaming)
        for kind, paths in find_files(dataset).items()
    ]


def flatten_chat(messages):
    """A chat, a list of {"role", "content"}, as text: "User: ...", a blank line, "Assistant: ..."."""
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages)


def documents(dataset, subset=None, text_column="text", streaming=True, shuffle_buffer=0, seed=0):
    """Yield the texts of a dataset by its name here, or of a local file or folder.

    Rows whose text is missing or empty are left out; chats, in a column `messages`, become text. Exits
    with one line if the source cannot be had, has no such column, or is damaged.
    """
    if dataset == "tinyshakespeare":
        dataset = "tinyshakespeare.txt"
        if not os.path.exists(dataset):
            try:
                download(TINYSHAKESPEARE, dataset)
            except requests.RequestException as e:
                sys.exit(f"cannot download {TINYSHAKESPEARE} ({type(e).__name__}); put it at {dataset}")
    try:
        for rows in open_rows(dataset, subset, streaming):
            if shuffle_buffer:
                rows = rows if streaming else rows.to_iterable_dataset()
                rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
            for row in rows:
                text = row.get(text_column, row.get("messages", row))
                if text is row:
                    columns = ", ".join(row)
                    sys.exit(
                        f"{dataset} has no column {text_column!r}: use --text_column= with one of {columns}"
                    )
                text = flatten_chat(text) if isinstance(text, list) else text
                if isinstance(text, str) and text:
                    yield text
    except Exception as e:  # whatever `datasets` and its readers raise: they share no base class
        hint = "; go online, or give --dataset= a local file or folder" if dataset in HUB else ""
        sys.exit(f"cannot read {dataset}: {type(e).__name__}: {str(e).partition(chr(10))[0]}{hint}")


# -- tokens -----------------------------------------------------------------------


def encode(texts, enc, dtype):
    """The token ids of documents, each behind its <|endoftext|>, as one array of dtype."""
    parts = []
    for text in texts:
        parts.append([enc.eot_token])
        try:
            parts.append(enc.encode_to_numpy(text, disallowed_special=()))
        except UnicodeEncodeError:  # half of a surrogate pair, as broken JSON can hold
            parts.append(enc.encode_to_numpy(text.encode(errors="replace").decode(), disallowed_special=()))
    return np.concatenate(parts).astype(dtype)


def tokenize(texts, enc, dtype, batch_chars=1 << 19):
    """Yield the token ids of documents, in order, in arrays of about batch_chars characters of text.

    Threads are enough to use all cores: tiktoken releases the GIL, and returns arrays, so nothing is
    pickled. At most four batches a core are under way, so memory does not grow with the corpus.
    """
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        under_way = collections.deque()
        batch, chars = [], 0
        for text in texts:
            batch.append(text)
            chars += len(text)
            if chars >= batch_chars:
                under_way.append(pool.submit(encode, batch, enc, dtype))
                batch, chars = [], 0
            if len(under_way) > 4 * cores:
                yield under_way.popleft().result()
        if batch:
            under_way.append(pool.submit(encode, batch, enc, dtype))
        while under_way:
            yield under_way.popleft().result()


# -- shards -----------------------------------------------------------------------


def write_shards(texts, enc, out_dir, prefix, shard_size=100_000_000, max_tokens=0, **about):
    """Tokenize documents into shards in out_dir; returns meta.json's dict. Exits if there are none.

    `prefix` opens the shards' names; `about` goes into meta.json: dataset, subset, seed.
    """
    writer = ShardWriter(out_dir, prefix, enc, shard_size, about)
    bar = tqdm(total=max_tokens or None, unit="tok", unit_scale=True, desc=out_dir)
    with bar, contextlib.closing(tokenize(texts, enc, token_dtype(enc))) as batches:
        written = 0
        for tokens in batches:
            tokens = tokens[: max_tokens - written] if max_tokens else tokens
            writer.add(tokens)
            written += len(tokens)
            bar.update(len(tokens))
            if written == max_tokens:
                break
    return writer.close()


def write_demo_shards(out_dir):
    """Byte shards of input.txt; without one, of tiny Shakespeare; offline, of Python's own source.

    Returns meta.json's dict.
    """
    source = "input.txt"
    if not os.path.exists(source):
        try:
            download(TINYSHAKESPEARE, source, timeout=5)
        except requests.RequestException:
            source = "the source of Python's standard library"
    if source == "input.txt":
        texts = read_text(source)
    else:
        paths = sorted(glob.glob(os.path.join(sysconfig.get_paths()["stdlib"], "*.py")))
        np.random.default_rng(0).shuffle(paths)
        texts = itertools.chain.from_iterable(map(read_text, paths))
    enc = load_tokenizer("bytes")
    about = {"dataset": source, "subset": None, "seed": None}
    return write_shards(texts, enc, out_dir, "demo", max_tokens=2_000_000, **about)


def main():
    for key, least in (("shard_size", 1), ("max_tokens", 0), ("shuffle_buffer", 0), ("seed", 0)):
        if globals()[key] < least:
            sys.exit(f"--{key}={globals()[key]}: must be at least {least}")
    if os.path.exists(out_dir) and not os.path.isdir(out_dir):
        sys.exit(f"--out_dir={out_dir}: is a file, expected a folder")
    if has_shards(out_dir):
        sys.exit(f"{out_dir} holds shards already: choose another --out_dir, or delete it to start over")
    if dataset not in (*HUB, "tinyshakespeare") and not os.path.exists(dataset):
        names = ", ".join([*HUB, "tinyshakespeare"])
        sys.exit(f"--dataset={dataset}: no such file or folder; known names: {names}")
    enc = load_tokenizer(tokenizer)
    options = {"streaming": streaming, "shuffle_buffer": shuffle_buffer, "seed": seed}
    texts = documents(dataset, subset, text_column, **options)
    about = {"dataset": dataset, "subset": subset if dataset.startswith("fineweb") else None, "seed": seed}
    prefix = re.sub(r"\W", "", os.path.basename(os.path.normpath(dataset)))  # "edufineweb" is build-nanogpt's
    prefix = "edufineweb" if dataset == "fineweb-edu" else prefix
    meta = write_shards(texts, enc, out_dir, prefix, shard_size, max_tokens, **about)
    for split in ("val", "train"):
        shards = [shard for shard in meta["shards"] if shard["split"] == split]
        tokens, docs, size = (sum(shard[key] for shard in shards) for key in ("tokens", "documents", "bytes"))
        print(f"{split}: {len(shards)} shards, {docs:,} documents, {tokens:,} tokens, {size:,} bytes")
    print(f"train GPT-2 124M on them: python train_gpt2.py --data_dir={out_dir}; on a laptop add --preset=tiny")


if __name__ == "__main__":
    configure(globals())
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(f"stopped; {out_dir} is not complete: delete it to start over")
