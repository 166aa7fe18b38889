"""Tokens made by others: .bin shards of GPT-2 tokens, downloaded from the Hugging Face hub."""

from concurrent.futures import ThreadPoolExecutor
import contextlib
import os
import shutil
import threading

from data.shard_writer import count_documents, write_meta
from data.shards import has_shards, open_shard, read_meta
from data.tokenizer import token_byte_lengths
from script import UserError

import numpy as np
from tqdm import tqdm

# Datasets of the hub that are llm.c's .bin shards of GPT-2 tokens.
TOKENIZED = {
    "fineweb-edu-gpt2": "karpathy/fineweb-edu-100B-gpt2-token-shards",
    "kjj0/finewebedu10B-gpt2": "kjj0/finewebedu10B-gpt2",
    "kjj0/fineweb10B-gpt2": "kjj0/fineweb10B-gpt2",
}
# Their own names on the hub work as well.
TOKENIZED |= {name: name for name in list(TOKENIZED.values())}


def list_token_shards(repository, max_tokens):
    """{file: bytes} of .bin files on the hub, validation first; enough for max_tokens."""
    from huggingface_hub import HfApi

    try:
        tree = HfApi().list_repo_tree(repository, repo_type="dataset", recursive=True)
        sizes = {entry.path: getattr(entry, "size", 0) for entry in tree}
    except Exception as e:  # huggingface_hub and the network raise many types
        raise UserError(
            f"cannot reach {repository} on the hub ({type(e).__name__}): go online, or try again "
            "later"
        )
    names = [name for name in sizes if name.endswith(".bin")]
    # Validation first: training needs it from the start, and the other shards in order.
    names.sort(key=lambda name: ("val" not in name, name))
    chosen = {}
    tokens = 0
    for name in names:
        if not max_tokens or tokens < max_tokens:
            chosen[name] = sizes[name]
            tokens += (sizes[name] - 1024) // 2
    if not chosen:
        raise UserError(f"{repository}: there are no .bin files on the hub")
    return chosen


def fetch_files(repository, sizes, out_dir):
    """Download files of a dataset on the hub, {name: bytes}, several at once; yield (name, path).

    They are yielded in order. Each is complete or absent, and a partial download is continued.
    """
    from huggingface_hub import hf_hub_download

    stopped = threading.Event()
    bar = tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc=out_dir)

    class Progress(tqdm):
        """The progress of one file, added to the bar of all; ends the download when stopped."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n=1):
            if stopped.is_set():
                raise InterruptedError("stopped")
            bar.update(n)

    def fetch(name):
        # huggingface_hub continues a partial file, and renames it when it is complete.
        kwargs = {"repo_type": "dataset", "local_dir": out_dir, "tqdm_class": Progress}
        path = hf_hub_download(repository, name, **kwargs)
        # A file of another size, which was there before, would be taken for complete.
        if os.path.getsize(path) != sizes[name]:
            path = hf_hub_download(repository, name, **kwargs, force_download=True)
        return path

    with ThreadPoolExecutor(4) as pool, bar:
        futures = {name: pool.submit(fetch, name) for name in sizes}
        try:
            for name, future in futures.items():
                yield name, future.result()
        finally:
            # Whatever happens, do not wait for files that nobody needs any more.
            stopped.set()
            pool.shutdown(cancel_futures=True)


def download_token_shards(dataset, enc, out_dir, max_tokens=0):
    """Download .bin shards of GPT-2 tokens from the hub; returns meta.json's dict.

    meta.json lists the shards as they arrive, in order, so that training can start after the
    second. The same command continues an interrupted download.
    """
    repository = TOKENIZED[dataset]
    # The same as for text, so that nothing else needs to know the difference.
    meta = {
        "dataset": "fineweb-edu" if "edu" in repository else dataset,
        "subset": repository,
        "seed": None,
        "max_tokens": max_tokens,
        "tokenizer": "gpt2",
        "vocab_size": enc.n_vocab,
        "dtype": "uint16",
        "complete": False,
        "shards": [],
    }
    # What an interrupted download has completed stays.
    old = read_meta(out_dir)
    if old and old.get("subset") == repository:
        meta["shards"] = old["shards"]
    elif old or has_shards(out_dir):
        raise UserError(f"{out_dir} holds other shards: choose another --out_dir, or delete it")
    sizes = list_token_shards(repository, max_tokens)
    write_meta(out_dir, meta)  # first: a folder without meta.json is taken for a complete one
    # Only what is missing is downloaded.
    for shard in meta["shards"]:
        sizes.pop(shard["file"], None)
    byte_lengths = np.array(token_byte_lengths(enc), dtype=np.uint16)
    try:
        with contextlib.closing(fetch_files(repository, sizes, out_dir)) as files:
            for name, path in files:
                tokens = open_shard(path)
                documents, num_bytes = count_documents(tokens, enc, byte_lengths)
                split = "val" if "val" in name else "train"
                shard = {"file": name, "split": split, "tokens": len(tokens)}
                meta["shards"].append({**shard, "documents": documents, "bytes": num_bytes})
                write_meta(out_dir, meta)
    except UserError:
        raise
    except Exception as e:  # huggingface_hub and the network raise many types
        reason = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
        raise UserError(f"cannot download {repository}: {reason}; the same command continues")
    meta["complete"] = True
    write_meta(out_dir, meta)
    shutil.rmtree(f"{out_dir}/.cache", ignore_errors=True)
    return meta
