"""Text to token shards: FineWeb-Edu, another dataset, or your own files.

    python fineweb.py                                          # FineWeb-Edu sample-10BT
    python fineweb.py --subset=sample-100BT --out_dir=edu_fineweb100B
    python fineweb.py --dataset=my_texts --out_dir=my_shards   # .txt .jsonl .parquet ...
    python fineweb.py --dataset=roneneldan/TinyStories --out_dir=stories    # any of the hub's
    python fineweb.py --dataset=tinyshakespeare --tokenizer=bytes --out_dir=shakespeare
    python fineweb.py --dataset=fineweb-edu-gpt2 --max_tokens=1e9 --out_dir=edu1B

Streams by default, so that the first shards exist minutes after the start. If stopped or killed,
the same command continues after the last complete shard. data/documents.py says what is read,
data/shards.py what is written.
"""

import contextlib
import glob
import itertools
import os
import re
import shlex
import shutil
import sysconfig

from configurator import check_choice, check_command_line, check_min, configure

if __name__ == "__main__":
    check_command_line(__file__)  # before the imports below, which take a while

from data.batch_encoder import tokenize
from data.documents import TINYSHAKESPEARE, Documents
from data.readers import read_text
from data.shard_writer import ShardWriter, token_dtype
from data.shards import has_shards, read_meta
from data.token_shards import TOKENIZED, download_token_shards
from data.tokenizer import load_tokenizer
from files import acquire_lock, download, lock_folder
from script import UserError, env_int, explain_error, run_as_script

import numpy as np
import requests
from tqdm import tqdm

# -- settings: override any with --key=value --------------------------------------
dataset = "fineweb-edu"  # fineweb-edu, fineweb-edu-gpt2 (tokens), a hub name, a file or a folder
subset = ""  # the hub dataset's subset; empty: sample-10BT of fineweb(-edu)
split = "train"  # the split to read; a folder's validation files become the validation shards
text_column = "text"  # the column that holds the text; data.text is one inside another
out_dir = "edu_fineweb10B"  # the folder to write shards to
tokenizer = "gpt2"  # gpt2, bytes, the path of a tokenizer.json, or a Hugging Face model's folder
shard_size = 100_000_000  # tokens per shard
val_tokens = 0  # tokens for validation; 0: validation files, or a shard, or a small text's tenth
max_tokens = 0  # stop after this many tokens; 0: take all
engine = "auto"  # what encodes text: tiktoken, or auto: gigatoken if it is installed
streaming = True  # read while downloading; False downloads everything first


# -- writing shards ----------------------------------------------------------------
def write_shards(
    texts,
    enc,
    out_dir,
    prefix,
    shard_size=100_000_000,
    max_tokens=0,
    val_tokens=0,
    val_texts=None,
    engine="auto",
    **about,
):
    """Tokenize documents into shards in out_dir; returns meta.json's dict.

    `prefix` starts the names of the shards; val_texts are the documents of the validation split, if
    it has its own; `about` goes into meta.json: dataset, subset, seed. If out_dir holds the start
    of these shards, they are continued; texts is then a Documents. The engine does not change them.
    Raises UserError if there are no documents.
    """
    # Other settings make other shards: meta.json stores them.
    about["max_tokens"] = max_tokens
    if val_texts:
        about["val_files"] = True
    writer = ShardWriter(out_dir, prefix, enc, shard_size, about, val_tokens)
    if writer.meta["complete"]:
        print(f"{out_dir} is complete already: nothing to do")
        return writer.meta
    # An interrupted command left the start of these shards.
    if writer.meta["shards"]:
        print(f"{out_dir} has {len(writer.meta['shards'])} shards: continuing after them")
    bar = tqdm(
        total=max_tokens or None, initial=writer.received, unit="tok", unit_scale=True, desc=out_dir
    )
    # Whatever happens, leaving writer.pool completes the shard that is being written.
    with writer.pool, bar:
        # First the validation split, if it has its own files and is not complete yet.
        if val_texts and writer.split == "val":
            write_texts(val_texts, writer, bar, val_tokens or -(-max_tokens // 10), engine)
            writer.end_validation()
            if val_texts.report():
                print(f"\nvalidation files: {val_texts.report()}")
        write_texts(texts, writer, bar, max_tokens, engine)
        return writer.close()


def write_texts(texts, writer, bar, max_tokens, engine):
    """Tokenize documents, from the writer's position on, until it has received max_tokens."""
    if writer.state:
        texts.state = writer.state
    batches = tokenize(texts, writer.enc, token_dtype(writer.enc), engine)
    with contextlib.closing(batches):
        for tokens, state in batches:
            # The last document may be cut.
            if max_tokens:
                tokens = tokens[: max_tokens - writer.received]
            writer.add(tokens, state)
            bar.update(len(tokens))
            if writer.received == max_tokens:
                break


# -- the demo -----------------------------------------------------------------------
def make_demo_shards(out_dir, keep=False):
    """Byte shards of input.txt; without one, of tiny Shakespeare; offline, of Python's own source.

    Complete shards of the same text stay, since another demo may be reading them; with keep, any
    complete shards. Only the first process of a machine makes any, one at a time.
    """
    if env_int("LOCAL_RANK", 0) > 0:
        return
    os.makedirs(out_dir, exist_ok=True)
    lock = acquire_lock(f"{out_dir}/.lock", timeout=-1)
    try:
        # Has an earlier demo left complete shards?
        meta = read_meta(out_dir) if has_shards(out_dir) else None
        is_complete = meta is not None and meta["complete"]
        if not (keep and is_complete):
            write_demo_shards(out_dir, meta if is_complete else None)
    finally:
        lock.release()


def write_demo_shards(out_dir, meta):
    """Write the demo's shards, unless those of meta, meta.json's dict, are of the same text."""
    print(
        "there are no shards in edu_fineweb10B/ (python fineweb.py makes them), so this is a demo"
    )
    # Which text? The user's, a download, or what every Python installation has.
    source = "input.txt"
    if not os.path.exists(source):
        try:
            download(TINYSHAKESPEARE, source, timeout=5, tries=1)
        except requests.RequestException:
            source = "the source of Python's standard library"
    max_tokens = 2_000_000
    note = ""
    written_at = 0
    paths = sorted(glob.glob(os.path.join(sysconfig.get_paths()["stdlib"], "*.py")))
    if os.path.exists(source):
        paths = [source]
        written_at = os.path.getmtime(source)
        if os.path.getsize(source) > max_tokens:
            note = f", its first {max_tokens:,} bytes"
    # Shards of the same text stay: another demo may be reading them.
    is_same = meta is not None and meta["dataset"] == source
    if not is_same or os.path.getmtime(f"{out_dir}/meta.json") < written_at:
        for path in [*glob.glob(f"{out_dir}/demo_*.npy"), *glob.glob(f"{out_dir}/meta.json")]:
            os.remove(path)
        np.random.default_rng(0).shuffle(paths)
        texts = itertools.chain.from_iterable(map(read_text, paths))
        about = {"dataset": source, "subset": None, "seed": None}
        write_shards(
            texts, load_tokenizer("bytes"), out_dir, "demo", max_tokens=max_tokens, **about
        )
    print(f"training data: {source}{note}")


# -- main ---------------------------------------------------------------------------
def write_dataset(enc):
    """Write the shards of the dataset in the settings; returns (meta.json's dict, report)."""
    # Tokens made by others, or text.
    if dataset in TOKENIZED:
        if enc.name != "gpt2":
            raise UserError(
                f"--dataset={dataset}: holds GPT-2's tokens; leave out --tokenizer={tokenizer}"
            )
        return download_token_shards(dataset, enc, out_dir, max_tokens), ""
    # FineWeb's default subset is the whole of it, 1.3T tokens: start with a sample.
    default_subset = "sample-10BT" if dataset.startswith("fineweb") else None
    name = subset or default_subset
    texts = Documents(dataset, name, text_column, streaming, split, as_bytes=True)
    about = {
        "dataset": dataset,
        "subset": name,
        "seed": None,  # nothing is random here: the trainer shuffles
        "text_column": text_column,
        "streaming": streaming,
    }
    if split != "train":
        about["split"] = split
    prefix = "edufineweb"  # build-nanogpt's
    if dataset != "fineweb-edu":
        prefix = re.sub(r"\W", "", os.path.basename(os.path.normpath(dataset)))
    meta = write_shards(
        texts,
        enc,
        out_dir,
        prefix,
        shard_size,
        max_tokens,
        val_tokens,
        texts.validation(),
        engine,
        **about,
    )
    return meta, texts.report()


def check_dataset():
    """Raise UserError if the dataset is a local file or folder of tokens, or the output."""
    if os.path.exists(dataset) and os.path.realpath(dataset) == os.path.realpath(out_dir):
        raise UserError(f"--out_dir={out_dir}: is the dataset; choose another folder")
    names = [dataset] if os.path.isfile(dataset) else []
    if os.path.isdir(dataset):
        names = os.listdir(dataset)
    if any(name.endswith((".bin", ".ds")) for name in names):
        folder = dataset if os.path.isdir(dataset) else os.path.dirname(dataset) or "."
        raise UserError(
            f"--dataset={dataset}: holds tokens, which need no conversion: "
            f"python train_gpt2.py --data_dir={shlex.quote(folder)}"
        )


def main():
    check_choice("engine", engine, ("auto", "tiktoken"))
    check_min(1, shard_size=shard_size)
    check_min(0, val_tokens=val_tokens, max_tokens=max_tokens)
    if 0 < max_tokens <= val_tokens:
        raise UserError(f"--max_tokens={max_tokens}: must be more than --val_tokens={val_tokens}")
    if os.path.exists(out_dir) and not os.path.isdir(out_dir):
        raise UserError(f"--out_dir={out_dir}: is a file, expected a folder")
    check_dataset()
    enc = load_tokenizer(tokenizer)
    # Lock the folder, so that no other process writes to it.
    is_new = not os.path.exists(out_dir)
    lock = lock_folder(out_dir)
    try:
        meta, report = write_dataset(enc)
    finally:
        lock.release()
        if is_new and os.listdir(out_dir) == [".lock"]:  # a mistake leaves nothing behind
            shutil.rmtree(out_dir)
    # What is there now, and what to do with it.
    for name in ("val", "train"):
        shards = [shard for shard in meta["shards"] if shard["split"] == name]
        documents = sum(shard["documents"] for shard in shards)
        tokens = sum(shard["tokens"] for shard in shards)
        num_bytes = sum(shard["bytes"] for shard in shards)
        counts = f"{documents:,} documents, {tokens:,} tokens, {num_bytes:,} bytes"
        print(f"{name}: {len(shards)} shards, {counts}")
    if report:
        print(report)
    command = f"python train_gpt2.py --data_dir={shlex.quote(out_dir)}"
    print(f"train GPT-2 124M on them: {command}; on a laptop add --preset=tiny")


def explain(error):
    """One line for an error that is not a bug, None for others."""
    if isinstance(error, OSError):
        reason = f"{error.filename or out_dir}: {error.strerror or error}"
        return f"{reason}; when that is solved, the same command continues"
    return explain_error(error)


if __name__ == "__main__":
    with run_as_script(explain):
        configure(globals())
        try:
            main()
        except KeyboardInterrupt:
            raise UserError(
                f"stopped; the same command continues after the complete shards in {out_dir}"
            )
