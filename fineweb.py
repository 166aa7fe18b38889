"""Text to token shards: FineWeb-Edu, another dataset, or your own files, tokenized for train_gpt2.py.

    python fineweb.py                                          # FineWeb-Edu sample-10BT -> edu_fineweb10B/
    python fineweb.py --subset=sample-100BT --out_dir=edu_fineweb100B
    python fineweb.py --dataset=my_texts --out_dir=my_shards   # .txt .jsonl .jsonl.gz .json.gz .parquet
    python fineweb.py --dataset=tinyshakespeare --tokenizer=bytes --out_dir=shakespeare

Streams by default, so that the first shards exist minutes after the start. Stopped or killed, the same command goes on
behind the last whole shard. shards.py has the format.
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
import time

from configurator import check_numbers, configure
from parallel import cores, from_environment
from shards import ShardWriter, download, has_shards, lock_folder, read_meta, token_dtype
from tokenizer import EOT, copy_encoding, load_tokenizer

import numpy as np
import requests
from tqdm import tqdm

# -- settings: override any with --key=value --------------------------------------
dataset = "fineweb-edu"  # or fineweb, openwebtext, smol-smoltalk, tinyshakespeare, a file, a folder
subset = "sample-10BT"  # of fineweb(-edu): sample-10BT, sample-100BT, sample-350BT or default (all)
text_column = "text"  # the column that holds the text
out_dir = "edu_fineweb10B"  # where the shards go
tokenizer = "gpt2"  # gpt2, bytes, or the path of a tokenizer.json
shard_size = 100_000_000  # tokens a shard
val_tokens = 0  # tokens for validation; 0: one shard or, of less than two shards, the last tenth
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
    """The `datasets.IterableDataset`s that hold a dataset's documents as rows, by its name or path."""
    import datasets

    if dataset in HUB:
        args = (HUB[dataset], subset) if dataset.startswith("fineweb") else (HUB[dataset],)
        found = [datasets.load_dataset(*args, split="train", streaming=streaming)]
    else:
        found = [
            datasets.IterableDataset.from_generator(text_rows, gen_kwargs={"paths": paths})
            if kind == "text"
            else datasets.load_dataset(kind, data_files=paths, split="train", streaming=streaming)
            for kind, paths in find_files(dataset).items()
        ]
    return [rows if isinstance(rows, datasets.IterableDataset) else rows.to_iterable_dataset() for rows in found]


def as_text(value):
    """The text of a document: a string, or a chat as "User: ...", a blank line, "Assistant: ...".

    A chat is a list of {"role", "content"}. Anything else is no text, and becomes an empty string.
    """
    messages = value if isinstance(value, list) else [None]
    if all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        return "\n\n".join(f"{str(m.get('role')).capitalize()}: {m['content']}" for m in messages)
    return value if isinstance(value, str) else ""


class Documents:
    """The texts of a dataset by its name here, or of a local file or folder, one after the other.

    Rows whose text is missing, empty or not a string are left out; chats, in a column `messages`, become text. An
    iteration exits with one line if the source cannot be had, has no such column, or is damaged; one that reads from
    the hub and is cut off tries again, five times with growing pauses.

    state_dict() is where the iteration stands, as plain JSON values; the next one starts from there after
    load_state_dict(). Without a shuffle buffer, files of the dataset that lie behind are not read again.
    """

    def __init__(self, dataset, subset=None, text_column="text", streaming=True, shuffle_buffer=0, seed=0):
        self.dataset, self.subset, self.text_column = dataset, subset, text_column
        self.streaming, self.shuffle_buffer, self.seed = streaming, shuffle_buffer, seed
        self.state = None

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state

    def __iter__(self):
        if self.dataset == "tinyshakespeare":
            self.dataset = "tinyshakespeare.txt"
            if not os.path.exists(self.dataset):
                try:
                    download(TINYSHAKESPEARE, self.dataset)
                except requests.RequestException as e:
                    sys.exit(f"cannot download {TINYSHAKESPEARE} ({type(e).__name__}); put it at {self.dataset}")
        failures = 0
        while True:
            last = self.state
            try:
                yield from self._read()
                return
            except Exception as e:  # whatever `datasets` and its readers raise: they share no base class
                failures = failures + 1 if self.state == last else 1
                reason = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
                if self.dataset not in HUB or self.state is None or failures > 5:
                    hint = "; go online, or give --dataset= a local file or folder" if self.dataset in HUB else ""
                    sys.exit(f"cannot read {self.dataset}: {reason}{hint}")
                print(f"\n{self.dataset}: {reason}; reading on in {2**failures} s", file=sys.stderr)
                time.sleep(2**failures)

    def _read(self):
        """Yield the documents behind self.state, which moves on with them."""
        state = self.state or {"documents": 0, "part": 0, "rows": None}
        count = state["documents"]
        behind = 0
        for part, rows in enumerate(open_rows(self.dataset, self.subset, self.streaming)):
            if self.shuffle_buffer:  # what a shuffle buffer held is not in a state: start over, and skip
                rows = rows.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
                behind = count if part == 0 else behind
            elif part < state["part"]:
                continue
            elif state["rows"] and part == state["part"]:
                rows.load_state_dict(state["rows"])
            for row in rows:
                value = row.get(self.text_column, row.get("messages", row))
                if value is row:
                    hint = f"use --text_column= with one of {', '.join(row)}"
                    sys.exit(f"{self.dataset} has no column {self.text_column!r}: {hint}")
                text = as_text(value)
                if not text:
                    continue
                if behind:
                    behind -= 1
                    continue
                count += 1
                place = None if self.shuffle_buffer else rows.state_dict()
                self.state = {"documents": count, "part": part, "rows": place}
                yield text


# -- tokens -----------------------------------------------------------------------
def cut(text, size=400_000):
    """A text in parts of so many characters."""
    return [text[i : i + size] for i in range(0, len(text), size)]


def encode(texts, enc, dtype):
    """The token ids of documents, each behind its <|endoftext|>, as one array of dtype."""
    # All in one call, which is 5% faster than one for each text: it waits for the GIL once.
    with contextlib.suppress(UnicodeEncodeError, ValueError):
        ids = enc.encode_to_numpy(EOT + EOT.join(texts), allowed_special={EOT}, disallowed_special=())
        if np.count_nonzero(ids == enc.eot_token) == len(texts):  # else a text spells it out: no token there
            return ids.astype(dtype)
    parts = []
    for text in texts:
        parts.append([enc.eot_token])
        try:
            parts.append(enc.encode_to_numpy(text, disallowed_special=()))
        except UnicodeEncodeError:  # half of a surrogate pair
            parts.append(enc.encode_to_numpy(text.encode(errors="replace").decode(), disallowed_special=()))
        except ValueError:  # a million blanks in a row are more than the engine of the pattern can go back over
            parts += [enc.encode_to_numpy(part, disallowed_special=()) for part in cut(text)]
    return np.concatenate(parts).astype(dtype)


def tokenize(texts, enc, dtype, batch_chars=1 << 19):
    """Yield (tokens, state) of batches of about batch_chars characters of documents, in order.

    tokens is an array of their token ids, state what texts.state_dict() was behind the last of them, or None. Threads
    are enough to use all cores: tiktoken releases the GIL, and returns arrays, so nothing is pickled. At most four
    batches a core are under way, so memory does not grow with the corpus.
    """
    own = threading.local()

    def work(batch):
        if not hasattr(own, "enc"):
            # Rust's regular expressions are fastest in the first thread that uses them: a copy for each, 1.13x
            own.enc = copy_encoding(enc)
        return encode(batch, own.enc, dtype)

    state_dict = getattr(texts, "state_dict", lambda: None)
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
                under_way.append((pool.submit(work, batch), state_dict()))
                batch, chars = [], 0
            if len(under_way) > 4 * cores():
                yield finish()
        if batch:
            under_way.append((pool.submit(work, batch), state_dict()))
        while under_way:
            yield finish()


# -- shards -----------------------------------------------------------------------
def write_shards(texts, enc, out_dir, prefix, shard_size=100_000_000, max_tokens=0, val_tokens=0, **about):
    """Tokenize documents into shards in out_dir; returns meta.json's dict. Exits if there are none.

    `prefix` opens the shards' names; `about` goes into meta.json: dataset, subset, seed. Where out_dir holds the
    beginning of these shards, goes on from there; texts is then a Documents.
    """
    writer = ShardWriter(out_dir, prefix, enc, shard_size, about | {"max_tokens": max_tokens}, val_tokens)
    if writer.meta["complete"]:
        print(f"{out_dir} is complete already: nothing to do")
        return writer.meta
    if writer.state:
        texts.load_state_dict(writer.state)
        print(f"{out_dir} has {len(writer.meta['shards'])} shards: going on behind them")
    bar = tqdm(total=max_tokens or None, initial=writer.taken, unit="tok", unit_scale=True, desc=out_dir)
    with bar, contextlib.closing(tokenize(texts, enc, token_dtype(enc))) as batches:
        for tokens, state in batches:
            tokens = tokens[: max_tokens - writer.taken] if max_tokens else tokens
            writer.add(tokens, state)
            bar.update(len(tokens))
            if writer.taken == max_tokens:
                break
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
    if source == "input.txt":
        texts = read_text(source)
    else:
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
    if dataset not in (*HUB, "tinyshakespeare") and not os.path.exists(dataset):
        names = ", ".join([*HUB, "tinyshakespeare"])
        sys.exit(f"--dataset={dataset}: no such file or folder; known names: {names}")
    enc = load_tokenizer(tokenizer)
    texts = Documents(dataset, subset, text_column, streaming, shuffle_buffer, seed)
    about = {"dataset": dataset, "subset": subset if dataset.startswith("fineweb") else None, "seed": seed}
    about |= {"text_column": text_column, "streaming": streaming, "shuffle_buffer": shuffle_buffer}
    prefix = re.sub(r"\W", "", os.path.basename(os.path.normpath(dataset)))  # "edufineweb" is build-nanogpt's
    prefix = "edufineweb" if dataset == "fineweb-edu" else prefix
    made = not os.path.exists(out_dir)
    lock = lock_folder(out_dir)
    try:
        meta = write_shards(texts, enc, out_dir, prefix, shard_size, max_tokens, val_tokens, **about)
    finally:
        lock.release()
        if made and os.listdir(out_dir) == [".lock"]:  # a mistake leaves nothing
            shutil.rmtree(out_dir)
    for split in ("val", "train"):
        shards = [shard for shard in meta["shards"] if shard["split"] == split]
        tokens, docs, size = (sum(shard[key] for shard in shards) for key in ("tokens", "documents", "bytes"))
        print(f"{split}: {len(shards)} shards, {docs:,} documents, {tokens:,} tokens, {size:,} bytes")
    command = f"python train_gpt2.py --data_dir={shlex.quote(out_dir)}"
    print(f"train GPT-2 124M on them: {command}; on a laptop add --preset=tiny")


if __name__ == "__main__":
    configure(globals())
    try:
        main()
    except OSError as e:
        reason = e.strerror or f"is the disk full? {e}"
        sys.exit(f"--out_dir={out_dir}: cannot write there ({reason}); mended, the same command goes on")
    except KeyboardInterrupt:
        sys.exit(f"stopped; the same command goes on behind the whole shards in {out_dir}")
