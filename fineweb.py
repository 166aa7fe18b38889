"""Text to token shards: FineWeb-Edu, another dataset, or your own files, tokenized for train_gpt2.py.

    python fineweb.py                                          # FineWeb-Edu sample-10BT -> edu_fineweb10B/
    python fineweb.py --subset=sample-100BT --out_dir=edu_fineweb100B
    python fineweb.py --dataset=my_texts --out_dir=my_shards   # .txt .md .jsonl .json .csv .tsv .parquet, .gz .zst ...
    python fineweb.py --dataset=fineweb-edu-gpt2 --max_tokens=1e9 --out_dir=edu1B    # tokenized already: 2 GB, minutes
    python fineweb.py --dataset=roneneldan/TinyStories --out_dir=stories       # any dataset of the Hugging Face hub
    python fineweb.py --dataset=tinyshakespeare --tokenizer=bytes --out_dir=shakespeare

Streams by default, so that the first shards exist minutes after the start. Stopped or killed, the same command goes on
behind the last whole shard. documents.py has what is read, shards.py the format of what is written.
"""

import collections
from concurrent.futures import ThreadPoolExecutor
import contextlib
import glob
import itertools
import os
import re
import shlex
import shutil
import sys
import sysconfig
import threading

from configurator import check_numbers, configure, cores, from_environment
from documents import TINYSHAKESPEARE, Documents, More, read_text
from shards import ShardWriter, download, has_shards, lock_folder, read_meta, token_dtype
from tokenized import Tokens, is_tokenized
from tokenizer import EOT, encode, load_tokenizer, new_encoding

import numpy as np
import requests
from tqdm import tqdm

# -- settings: override any with --key=value --------------------------------------
dataset = "fineweb-edu"  # a name (see HUB in documents.py), fineweb-edu-gpt2 (its tokens), owner/name, a file, a folder
subset = ""  # of a dataset of the hub; empty: sample-10BT of fineweb(-edu), whose others are sample-100BT, default ...
split = "train"  # of a dataset of the hub
text_column = "text"  # the column that holds the text; data.text is one inside another
out_dir = "edu_fineweb10B"  # where the shards go
tokenizer = "gpt2"  # gpt2, bytes, or the path of a tokenizer.json or of a Hugging Face model's folder
shard_size = 100_000_000  # tokens a shard
val_tokens = 0  # tokens for validation; 0: one shard or, of less than two shards, the last tenth
max_tokens = 0  # stop after this many tokens; 0: take all
streaming = True  # read while downloading; False downloads everything first
shuffle_buffer = 0  # shuffle documents through a buffer of this many as they stream; 0: leave their order
seed = 1337  # of that shuffle


# -- tokens -----------------------------------------------------------------------
def encode_documents(texts, enc, dtype):
    """The token ids of documents, each behind its <|endoftext|>, as one array of dtype."""
    # All in one call, which is 5% faster than one for each text: it waits for the GIL once.
    whole = sum(not isinstance(text, More) for text in texts)
    with contextlib.suppress(UnicodeEncodeError, ValueError):
        joined = "".join(text if isinstance(text, More) else EOT + text for text in texts)
        ids = enc.encode_to_numpy(joined, allowed_special=enc.special_tokens_set, disallowed_special=())
        if np.count_nonzero(ids == enc.eot_token) == whole:  # else a text spells it out: no token there
            return ids.astype(dtype)
    parts = [[] if isinstance(text, More) else [enc.eot_token] for text in texts]
    ids = [encode(enc, text) for text in texts]
    return np.concatenate([x for pair in zip(parts, ids, strict=True) for x in pair]).astype(dtype)


def tokenize(texts, enc, dtype, batch_chars=1 << 19):
    """Yield (tokens, state) of batches of about batch_chars characters of documents, in order.

    tokens is an array of their token ids, state what texts.state was behind the last of them, or None. Threads are
    enough to use all cores: tiktoken releases the GIL, and returns arrays, so nothing is pickled. At most four batches
    a core are under way, so memory does not grow with the corpus.
    """
    own = threading.local()

    def work(batch):
        if not hasattr(own, "enc"):
            # Rust's regular expressions are fastest in the first thread that uses them: a copy for each, 1.13x
            own.enc = new_encoding(enc.name, enc._pat_str, enc._mergeable_ranks, enc._special_tokens)
        return encode_documents(batch, own.enc, dtype)

    with ThreadPoolExecutor(cores()) as pool:
        under_way = collections.deque()  # (future, state)

        def finish():
            future, state = under_way.popleft()
            return future.result(), state

        batch, chars = [], 0
        for text in texts:
            batch.append(text)
            chars += len(text)
            if chars >= batch_chars:
                under_way.append((pool.submit(work, batch), getattr(texts, "state", None)))
                batch, chars = [], 0
                if len(under_way) > 4 * cores():
                    yield finish()
        if batch:
            under_way.append((pool.submit(work, batch), getattr(texts, "state", None)))
        while under_way:
            yield finish()


# -- shards -----------------------------------------------------------------------
def write_shards(texts, enc, out_dir, prefix, shard_size=100_000_000, max_tokens=0, val_tokens=0, **about):
    """Tokenize documents into shards in out_dir; returns meta.json's dict. Exits if there are none.

    `prefix` opens the shards' names; `about` goes into meta.json: dataset, subset, seed. Where out_dir holds the
    beginning of these shards, goes on from there; texts is then a Documents or a Tokens.
    """
    writer = ShardWriter(out_dir, prefix, enc, shard_size, about | {"max_tokens": max_tokens}, val_tokens)
    if writer.meta["complete"]:
        print(f"{out_dir} is complete already: nothing to do")
        return writer.meta
    if writer.state:
        texts.state = writer.state
        print(f"{out_dir} has {len(writer.meta['shards'])} shards: going on behind them")
    bar = tqdm(total=max_tokens or None, initial=writer.taken, unit="tok", unit_scale=True, desc=out_dir)
    made = texts.batches(enc) if isinstance(texts, Tokens) else tokenize(texts, enc, token_dtype(enc))
    with writer.pool, bar, contextlib.closing(made) as batches:  # whatever happens, the shard on its way is finished
        for tokens, state in batches:
            tokens = tokens[: max_tokens - writer.taken] if max_tokens else tokens
            writer.add(tokens, state)
            bar.update(len(tokens))
            if writer.taken == max_tokens:
                break
        if not writer.taken and getattr(texts, "report", str)():
            sys.exit(f"{out_dir} would be empty: {texts.report()}")
        return writer.close()


def make_demo_shards(out_dir, keep=False):
    """Byte shards of input.txt; without one, of tiny Shakespeare; offline, of Python's own source.

    With keep, shards that are there stay. Only the first process of a machine makes any.
    """
    there = keep and has_shards(out_dir) and (read_meta(out_dir) or {}).get("complete")
    if from_environment("LOCAL_RANK", 0) > 0 or there:
        return
    print("there are no shards in edu_fineweb10B/ (python fineweb.py makes them), so this is a demo")
    source = "input.txt"
    if not os.path.exists(source):
        try:
            download(TINYSHAKESPEARE, source, timeout=5, tries=1)
        except requests.RequestException:
            source = "the source of Python's standard library"
    paths = [source]
    if not os.path.exists(source):
        paths = sorted(glob.glob(os.path.join(sysconfig.get_paths()["stdlib"], "*.py")))
        np.random.default_rng(0).shuffle(paths)
    texts = itertools.chain.from_iterable(map(read_text, paths))
    for path in (*glob.glob(os.path.join(out_dir, "demo_*.npy")), os.path.join(out_dir, "meta.json")):
        if os.path.exists(path):
            os.remove(path)
    about = {"dataset": source, "subset": None, "seed": None}
    write_shards(texts, load_tokenizer("bytes"), out_dir, "demo", max_tokens=2_000_000, **about)
    cut_off = ", its first 2,000,000 bytes" if source == "input.txt" and os.path.getsize(source) > 2e6 else ""
    print(f"on {source}{cut_off}")


def main():
    check_numbers(1, shard_size=shard_size)
    check_numbers(val_tokens=val_tokens, max_tokens=max_tokens, shuffle_buffer=shuffle_buffer, seed=seed)
    if os.path.exists(out_dir) and not os.path.isdir(out_dir):
        sys.exit(f"--out_dir={out_dir}: is a file, expected a folder")
    enc = load_tokenizer(tokenizer)
    part, val_size = subset or ("sample-10BT" if dataset.startswith("fineweb") else None), val_tokens
    if is_tokenized(dataset):
        if enc.name != "gpt2":
            sys.exit(f"--dataset={dataset}: holds GPT-2's tokens; leave out --tokenizer={tokenizer}")
        texts = Tokens(dataset, os.path.join(out_dir, ".fetching"), max_tokens)
        val_size = val_tokens or texts.val_tokens()
        name = "fineweb-edu" if "edu" in dataset and texts.remote else dataset  # the text that it is made of
        about = {"dataset": name, "subset": texts.dataset, "seed": None}
    else:
        texts = Documents(dataset, part, text_column, streaming, shuffle_buffer, seed, split=split)
        about = {"dataset": dataset, "subset": part, "seed": seed} | ({"split": split} if split != "train" else {})
        about |= {"text_column": text_column, "streaming": streaming, "shuffle_buffer": shuffle_buffer}
    prefix = re.sub(r"\W", "", os.path.basename(os.path.normpath(dataset)))  # "edufineweb" is build-nanogpt's
    prefix = "edufineweb" if dataset == "fineweb-edu" else prefix
    made = not os.path.exists(out_dir)
    lock = lock_folder(out_dir)
    try:
        meta = write_shards(texts, enc, out_dir, prefix, shard_size, max_tokens, val_size, **about)
        shutil.rmtree(os.path.join(out_dir, ".fetching"), ignore_errors=True)
    finally:
        lock.release()
        if made and os.listdir(out_dir) == [".lock"]:  # a mistake leaves nothing
            shutil.rmtree(out_dir)
    for name in ("val", "train"):
        shards = [shard for shard in meta["shards"] if shard["split"] == name]
        tokens, docs, size = (sum(shard[key] for shard in shards) for key in ("tokens", "documents", "bytes"))
        print(f"{name}: {len(shards)} shards, {docs:,} documents, {tokens:,} tokens, {size:,} bytes")
    if texts.report():
        print(texts.report())
    command = f"python train_gpt2.py --data_dir={shlex.quote(out_dir)}"
    print(f"train GPT-2 124M on them: {command}; on a laptop add --preset=tiny")


if __name__ == "__main__":
    configure(globals())
    try:
        main()
    except OSError as e:
        sys.exit(f"{e.filename or out_dir}: {e.strerror or e}; mended, the same command goes on")
    except KeyboardInterrupt:
        sys.exit(f"stopped; the same command goes on behind the whole shards in {out_dir}")
