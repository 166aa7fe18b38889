"""Tokens that somebody has made already: llm.c's .bin shards, from the Hugging Face hub or local; nanoGPT's train.bin.

llm.c's format is 256 little-endian int32, of which the first three are 20240520, 1 and the number of tokens, and then
that many uint16, with 50256 before each document. nanoGPT's has no header: uint16 from its first byte on. Files with
"val" in their names come first: they are the validation split.
"""

from concurrent.futures import ThreadPoolExecutor
import os
import sys
import threading

import numpy as np
from tqdm import tqdm

ALIASES = {"fineweb-edu-gpt2": "karpathy/fineweb-edu-100B-gpt2-token-shards"}
ON_HUB = (*ALIASES.values(), "kjj0/finewebedu10B-gpt2", "kjj0/fineweb10B-gpt2")
MAGIC, LLAMA3 = 20240520, 20240801


def is_tokenized(dataset):
    """Whether a dataset, by its name or path, holds tokens and not texts."""
    names = os.listdir(dataset) if os.path.isdir(dataset) else [dataset] if os.path.isfile(dataset) else []
    return dataset in (*ALIASES, *ON_HUB) or any(name.endswith(".bin") for name in names)


def splits_first(names):
    """Names of .bin files, those of the validation split before the others."""
    return sorted((name for name in names if name.endswith(".bin")), key=lambda name: ("val" not in name, name))


def open_bin(path):
    """The tokens of a .bin file, memory-mapped uint16; exits with one line if they are not GPT-2's, or not whole."""
    size = os.path.getsize(path)
    header = np.fromfile(path, dtype="<i4", count=256)
    if size >= 12 and header[0] == LLAMA3:
        sys.exit(f"{path}: holds Llama 3's tokens (uint32), not GPT-2's: take the GPT-2 version of it")
    if size >= 12 and header[0] == MAGIC:
        if header[1] != 1 or size != 1024 + 2 * int(header[2]):
            says = f"says {header[2]} tokens and holds {(size - 1024) / 2:g}"
            sys.exit(f"{path}: {says}: it is cut short, fetch it again")
        return np.memmap(path, dtype="<u2", mode="r", offset=1024)
    if os.path.exists(os.path.join(os.path.dirname(path), "meta.pkl")):
        hint = "python fineweb.py --tokenizer=bytes --dataset= with the text that they were made of"
        sys.exit(f"{path}: holds the characters of nanoGPT's meta.pkl beside it, not GPT-2's tokens; {hint}")
    if size % 2 or not size:
        sys.exit(f"{path}: {size} bytes are no uint16 tokens; it is cut short or something else")
    return np.memmap(path, dtype="<u2", mode="r")


class Tokens:
    """The tokens of a dataset, its .bin files one after the other; a batch of them at a time.

    `state` is as in Documents. folder is where files of the hub are until their tokens are in shards; max_tokens says
    how many of them are fetched, 0 all.
    """

    def __init__(self, dataset, folder, max_tokens=0):
        self.dataset, self.folder, self.max_tokens = ALIASES.get(dataset, dataset), folder, max_tokens
        self.state = None
        self.remote = self.dataset in ON_HUB
        if self.remote:
            self.files = self._listed()
        else:
            inside = splits_first(os.listdir(dataset)) if os.path.isdir(dataset) else []
            self.files = dict.fromkeys([os.path.join(dataset, name) for name in inside] or [dataset], 0)

    def val_tokens(self):
        """The number of tokens in the local files of the validation split; 0 if there is none."""
        names = [] if self.remote else [name for name in self.files if "val" in os.path.basename(name)]
        return sum(len(open_bin(name)) for name in names) if len(names) < len(self.files) else 0

    def _listed(self):
        """{file: bytes} on the hub, as many as max_tokens needs."""
        from huggingface_hub import HfApi

        try:
            tree = HfApi().list_repo_tree(self.dataset, repo_type="dataset", recursive=True)
            sizes = {entry.path: getattr(entry, "size", 0) for entry in tree}
        except Exception as e:  # the hub's library and the network raise what they like
            sys.exit(f"cannot reach {self.dataset} on the hub ({type(e).__name__}): go online, or try again later")
        files, tokens = {}, 0
        for name in splits_first(sizes):
            if not self.max_tokens or tokens < self.max_tokens:
                files[name] = sizes[name]
                tokens += (sizes[name] - 1024) // 2
        return files or sys.exit(f"{self.dataset}: there are no .bin files on the hub")

    def _fetch(self, name, bar, stopped):
        """The path of a file of the hub, fetched; whole, or an exception."""
        from huggingface_hub import hf_hub_download

        class Part(tqdm):  # of the one bar of all files
            def __init__(self, *args, **how):
                super().__init__(*args, **how | {"disable": True})

            def update(self, n=1):
                if stopped.is_set():
                    raise InterruptedError("stopped")
                bar.update(n)

        how = {"repo_type": "dataset", "local_dir": self.folder, "tqdm_class": Part}
        path = hf_hub_download(self.dataset, name, **how)
        if os.path.getsize(path) != self.files[name]:
            path = hf_hub_download(self.dataset, name, **how, force_download=True)
        return path

    def batches(self, enc, size=1 << 22):
        """Yield (tokens, state) from `state` on: arrays of up to `size` uint16, and where they end."""
        first, start = (self.state or {"file": 0, "token": 0}).values()
        names = list(self.files)
        bar = tqdm(total=sum(self.files.values()), unit="B", unit_scale=True, desc="fetching", disable=not self.remote)
        bar.update(sum(self.files[name] for name in names[:first]))
        ahead, stopped = {}, threading.Event()
        with ThreadPoolExecutor(4) as pool, bar:
            try:
                for i in range(first, len(names)):
                    for name in names[i : i + 4] if self.remote else ():  # this one, and those behind it
                        if name not in ahead:
                            ahead[name] = pool.submit(self._fetch, name, bar, stopped)
                    try:
                        path = ahead[names[i]].result() if self.remote else names[i]
                    except Exception as e:  # the hub's library and the network raise what they like
                        why = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
                        sys.exit(f"cannot fetch {self.dataset}: {why}; the same command goes on")
                    tokens = open_bin(path)
                    if len(tokens) < size:
                        tokens = np.array(tokens)  # a map keeps its file open, and the writer keeps what it gets
                    for at in range(start, len(tokens), size):
                        part = tokens[at : at + size]
                        if part.max() >= enc.n_vocab:
                            where = f"token {part.max()} at {at + int(part.argmax())}"
                            sys.exit(f"{path}: {where} is outside GPT-2's vocabulary ({enc.n_vocab} tokens)")
                        self.state = {"file": i, "token": at + len(part)}
                        yield part, self.state
                    start = 0
                    if self.remote:
                        os.remove(path)  # the writer has it mapped: its space is free when its tokens are in shards
            finally:
                stopped.set()
                pool.shutdown(cancel_futures=True)

    def report(self):
        return ""
