"""Token shards: the files that fineweb.py writes and train_gpt2.py reads.

A folder of 1-D .npy arrays, <prefix>_val_000000.npy, <prefix>_train_000001.npy, ..., uint16 (uint32
if the vocabulary needs it), 100M tokens each by default. Each document starts with <|endoftext|>
and continues in the next shard where one ends. meta.json says what is in them: dataset, subset,
seed, tokenizer, vocab_size, dtype, `complete`, and for each shard its file, split, tokens,
documents (those that start in it) and UTF-8 bytes.

A folder without meta.json is read in place. It holds GPT-2 tokens: build-nanogpt's .npy shards,
llm.c's .bin shards, or nanoGPT's train.bin and val.bin; or datatrove's .ds files, of any tokenizer.
"""

import functools
import json
import os
import re
import shlex
import zlib

from data.tokenizer import load_tokenizer, tokenizer_state
from files import is_locked
from script import UserError

import numpy as np

NO_SHARD_YET = "no shard is complete yet: wait for fineweb.py, or start it again if it has ended"
SHARD_NAME = re.compile(r"(?<![A-Za-z])(train|val)(\D*\d*\.(npy|bin)|.*\.ds)$")
# The first number in a .bin file of llm.c, for GPT-2 and for Llama 3.
LLMC_MAGIC = 20240520
LLAMA3_MAGIC = 20240801


def has_shards(data_dir):
    """Whether the folder exists and has .npy, .bin or .ds files."""
    try:
        if not os.path.isdir(data_dir):
            return False
        return any(name.endswith((".npy", ".bin", ".ds")) for name in os.listdir(data_dir))
    except OSError as e:
        raise UserError(f"{data_dir}: cannot be read ({e.strerror})")


def open_shard(path):
    """A shard, memory-mapped: a 1-D array of uint16 or uint32; UserError if it is not one."""
    try:
        if path.endswith(".ds"):
            return open_ds(path)
        if path.endswith(".bin"):
            return open_bin(path)
        tokens = np.load(path, mmap_mode="r")
    except PermissionError:
        raise UserError(f"{path}: you may not read this file")
    except (OSError, ValueError, EOFError) as e:
        raise UserError(
            f"{path}: corrupt or missing shard ({e}); make it again with python fineweb.py"
        )
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
        found = f"{tokens.ndim}-D {tokens.dtype}"
        raise UserError(f"{path}: expected a 1-D array of uint16 or uint32, found {found}")
    return tokens


def open_bin(path):
    """GPT-2 tokens of a .bin file, memory-mapped: 1-D, uint16.

    llm.c's has a header of 256 int32 (magic number, version 1, number of tokens, ...); nanoGPT's
    has none. Raises UserError for other tokens, and for a file that is cut short.
    """
    # The header tells llm.c's formats apart.
    size = os.path.getsize(path)
    header = np.fromfile(path, dtype="<i4", count=256)
    magic = header[0] if size >= 12 else None
    if magic == LLAMA3_MAGIC:
        raise UserError(
            f"{path}: holds Llama 3's tokens (uint32), not GPT-2's: use GPT-2's version"
        )
    if magic == LLMC_MAGIC:
        if header[1] != 1 or size != 1024 + 2 * int(header[2]):
            raise UserError(
                f"{path}: says {header[2]} tokens and holds {(size - 1024) / 2:g}: it is cut "
                "short, download it again"
            )
        return np.memmap(path, dtype="<u2", mode="r", offset=1024)
    # Without a header it is nanoGPT's: GPT-2 tokens, unless there is a vocabulary of characters.
    if os.path.exists(os.path.join(os.path.dirname(path), "meta.pkl")):
        hint = (
            "python fineweb.py --tokenizer=bytes --dataset= with the text that they were made from"
        )
        raise UserError(
            f"{path}: holds the characters of the meta.pkl next to it, not GPT-2's tokens; {hint}"
        )
    if size % 2 or not size:
        raise UserError(
            f"{path}: {size} bytes are not uint16 tokens; it is cut short or another file"
        )
    tokens = np.memmap(path, dtype="<u2", mode="r")
    dtype = find_other_dtype(tokens[: 1 << 20])
    if dtype:
        raise UserError(
            f"{path}: holds {dtype} tokens, not uint16; convert it with numpy: "
            f"np.fromfile(path, '{dtype}').astype('<u2').tofile(new_path)"
        )
    return tokens


def read_ds_metadata(path):
    """(name of the tokenizer, bytes per token, tokens) of a .ds file, from its .metadata file."""
    # DocumentTokenizer writes it last, with lines such as "gpt2|2", "5006913" and "5.01 MT".
    try:
        with open(f"{path}.metadata", encoding="utf-8") as f:
            tokenizer, count, *_ = f.read().splitlines()
        name, token_size = tokenizer.rsplit("|", 1)
        return name, int(token_size), int(count)
    except OSError as e:
        raise UserError(
            f"{path}.metadata: cannot be read ({e.strerror}); datatrove writes it when the .ds "
            "file is complete, unless it has save_final_metadata=False"
        )
    except ValueError:
        raise UserError(f"{path}.metadata: not the metadata of a .ds file of datatrove")


def open_ds(path):
    """Tokens of a .ds file of datatrove's DocumentTokenizer, memory-mapped: 1-D, uint16 or uint32.

    Raises UserError if its size is not what its .metadata says.
    """
    _, token_size, count = read_ds_metadata(path)
    size = os.path.getsize(path)
    if token_size not in (2, 4) or size != token_size * count:
        raise UserError(
            f"{path}: {size} bytes are not {count} tokens of {token_size} bytes, as its .metadata "
            "says; make it again"
        )
    return np.memmap(path, dtype=f"<u{token_size}", mode="r")


def find_other_dtype(tokens):
    """The NumPy dtype that uint16 values were really written in; "" if they are what they seem.

    Wider integers show as zeros in fixed places: no text has "!", GPT-2's token 0, as every second
    token. Big-endian values are outside the vocabulary, and inside it with their bytes swapped.
    """
    tokens = tokens[: len(tokens) // 4 * 4].reshape(-1, 4)
    if len(tokens) < 4 or not tokens.any():
        return ""
    # Which of four neighbouring values are always zero?
    is_zero = [not column.any() for column in tokens.T]
    for zeros, dtype in (
        ([False, True, True, True], "<i8"),
        ([True, True, True, False], ">i8"),
        ([False, True, False, True], "<i4"),
        ([True, False, True, False], ">i4"),
    ):
        if is_zero == zeros:
            return dtype
    # Many values outside the vocabulary, all of which would be inside with their bytes swapped.
    outside = np.unique(tokens[tokens > 50256])
    if len(outside) >= 8 and tokens.byteswap().max() <= 50256:
        return ">u2"
    return ""


def read_meta(data_dir):
    """The dict of a folder's meta.json, None if it has none. Raises UserError if it is damaged."""
    path = f"{data_dir}/meta.json"
    if not os.path.exists(path):
        return None
    try:
        with open(path) as f:
            meta = json.load(f)
        # Check for what the readers need, and say what is missing.
        missing = {"shards", "complete", "tokenizer"} - meta.keys()
        for shard in meta.get("shards", []):
            missing |= {"file", "split"} - shard.keys()
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except PermissionError:
        raise UserError(f"{path}: you may not read this file")
    except (OSError, ValueError, AttributeError, TypeError) as e:
        raise UserError(
            f"{path}: damaged ({type(e).__name__}: {e}); make the shards again with python "
            "fineweb.py"
        )
    return meta


def default_meta(data_dir):
    """A meta.json dict for a folder without that file; UserError if it holds no shards."""
    # The names decide which split a file belongs to.
    hint = "shards are named *_train_000001.npy and *_val_000000.npy (or .bin, .ds)"
    shards = []
    tokenizers = set()
    for name in sorted(os.listdir(data_dir)):
        match = SHARD_NAME.search(name)
        tokenizer = "gpt2"
        if name.endswith(".ds"):
            if not match:
                raise UserError(f"{data_dir}/{name}: {hint}; set save_filename= in datatrove")
            path = f"{data_dir}/{name}"
            tokenizer, _, count = read_ds_metadata(path)
            if not count and not os.path.getsize(path):
                continue  # of a task that had no documents
        if match:
            shards.append({"file": name, "split": match[1]})
            tokenizers.add(tokenizer)
    if not shards:
        raise UserError(f"{data_dir}: {hint}; no file here is named like that and has tokens")
    # build-nanogpt's .npy shards are of FineWeb-Edu.
    is_npy = shards[0]["file"].endswith(".npy")
    dataset = "fineweb-edu" if is_npy else os.path.basename(os.path.abspath(data_dir))
    tokenizer = find_tokenizer(data_dir, tokenizers)
    return {"dataset": dataset, "tokenizer": tokenizer, "complete": True, "shards": shards}


def find_tokenizer(data_dir, names):
    """The tokenizer of a folder without meta.json: "gpt2", or its tokenizer.json.

    names: what the files call their tokenizers, a set.
    """
    # A run has one tokenizer.
    if len(names) > 1:
        found = " and of ".join(sorted(names))
        raise UserError(f"{data_dir}: holds tokens of {found}: put them into separate folders")
    (name,) = names
    if os.path.basename(name) == "gpt2":  # gpt2 or openai-community/gpt2
        return "gpt2"
    if not os.path.exists(f"{data_dir}/tokenizer.json"):
        # It could be fetched from the hub, but its name may be a path on another machine.
        raise UserError(
            f"{data_dir}: holds tokens of {name}: copy its tokenizer.json into this folder"
        )
    return "tokenizer.json"


class Shards:
    """The shards of one folder.

    dataset is the name of what they were made from, enc their tokenizer; train and val are lists of
    (path, number of tokens); complete is False while fineweb.py is still writing. Raises UserError
    if the folder holds no shards or one is missing; a damaged one is noticed when it is read.
    """

    def __init__(self, data_dir):
        self.data_dir = data_dir
        # Only two shards are open at a time, however many there are.
        self._open = functools.lru_cache(maxsize=2)(self._open_reader)
        self._sizes = {}
        self.checksum = functools.cache(self._checksum)
        if not has_shards(data_dir):
            raise UserError(no_shards_message(data_dir))
        meta = self.refresh()
        self.dataset = meta.get("dataset")
        name = meta["tokenizer"]
        self.enc = load_tokenizer(f"{data_dir}/{name}" if name.endswith(".json") else name)
        # A tokenizer that was replaced after the shards were made would decode other text.
        vocab_size = meta.get("vocab_size", self.enc.n_vocab)
        if vocab_size != self.enc.n_vocab:
            raise UserError(
                f"{data_dir}/meta.json: says {vocab_size} tokens, its tokenizer {name} has "
                f"{self.enc.n_vocab}; make the shards again with python fineweb.py"
            )

    def check_tokenizer(self, name, enc):
        """Raise UserError if enc, the tokenizer of `name`, is not the tokenizer of these shards."""
        if tokenizer_state(enc) != tokenizer_state(self.enc):
            raise UserError(
                f"{name} has the tokenizer {enc.name} ({enc.n_vocab} tokens), {self.data_dir} has "
                f"{self.enc.name} ({self.enc.n_vocab} tokens): make shards with the model's own"
            )

    def refresh(self):
        """Read the folder again; returns the dict of meta.json."""
        meta = read_meta(self.data_dir)
        if meta is None and self._sizes:  # it was there before
            raise UserError(
                f"{self.data_dir}/meta.json: has disappeared; restore it, or run fineweb.py again"
            )
        meta = meta or default_meta(self.data_dir)
        if not meta["shards"]:
            raise UserError(f"{self.data_dir}: {NO_SHARD_YET}")
        self.complete = meta["complete"]
        self.train = []
        self.val = []
        names = set(os.listdir(self.data_dir))
        for shard in meta["shards"]:
            path = f"{self.data_dir}/{shard['file']}"
            if shard["file"].split("/")[0] not in names:
                raise UserError(f"{path}: missing shard; make it again with python fineweb.py")
            # The sizes in meta.json are compared with the files when those are opened.
            self._sizes[path] = shard.get("tokens") or ShardReader(path).size
            split = self.train if shard["split"] == "train" else self.val
            split.append((path, self._sizes[path]))
        return meta

    def _open_reader(self, path):
        """The ShardReader of a path; UserError if its size is not meta.json's."""
        # It may have been replaced since meta.json was written.
        shard = ShardReader(path)
        if shard.size != self._sizes[path]:
            raise UserError(
                f"{path}: holds {shard.size} tokens, meta.json says {self._sizes[path]}; make it "
                "again"
            )
        return shard

    def _checksum(self, path, size):
        """The CRC-32 of eight slices of a shard of `size` tokens.

        None if the shard cannot be read, or a token is outside the vocabulary.
        """
        # Eight slices are enough to notice other data, and take no time.
        crc = 0
        try:
            dtype = self._open(path).dtype
            for start in range(0, size, max(1, -(-size // 8))):
                tokens = self.read(path, start, min(4096, size - start))
                crc = zlib.crc32(tokens.astype(dtype).tobytes(), crc)
        except UserError:
            return None
        return crc

    def read(self, path, start, count):
        """`count` tokens of a shard from `start` on, int64.

        Raises UserError if the shard cannot be read, or a token is outside the vocabulary.
        """
        tokens = self._open(path).read(start, count).astype(np.int64)
        if tokens.max(initial=0) >= self.enc.n_vocab:
            vocabulary = f"the vocabulary of {self.enc.name} ({self.enc.n_vocab} tokens)"
            raise UserError(
                f"{path}: token {tokens.max()} at {start + tokens.argmax()} is outside "
                f"{vocabulary}; the shard is corrupt or another tokenizer's"
            )
        return tokens


class ShardReader:
    """A shard of `size` tokens to read parts of. Raises UserError if it is not one.

    Unlike a memory map, reading does not crash the process when the file is truncated.
    """

    def __init__(self, path):
        # The map is only used to learn the format.
        tokens = open_shard(path)
        self.path = path
        self.size = len(tokens)
        self.dtype = tokens.dtype
        self.offset = tokens.offset  # of the first token, in bytes
        self.f = open(path, "rb", buffering=0)

    def read(self, start, count):
        """`count` tokens from `start` on, uint16 or uint32."""
        size = count * self.dtype.itemsize
        try:
            data = os.pread(self.f.fileno(), size, self.offset + start * self.dtype.itemsize)
        except OSError as e:
            raise UserError(f"{self.path}: cannot be read ({e.strerror})")
        if len(data) < size:
            raise UserError(f"{self.path}: has become shorter while it was in use")
        return np.frombuffer(data, self.dtype)


def no_shards_message(data_dir):
    """What to say of a folder without shards, and what to do."""
    if is_locked(data_dir):
        return f"{data_dir}: {NO_SHARD_YET}"
    # A folder of texts was given where shards are expected, or nothing is there.
    quoted = shlex.quote(data_dir)
    names = os.listdir(data_dir) if os.path.isdir(data_dir) else []
    if os.path.isfile(data_dir) or any(not name.startswith(".") for name in names):
        command = f"python fineweb.py --dataset={quoted} --out_dir=my_shards"
        return f"{data_dir}: holds no shards; make them with {command}"
    folder = os.path.abspath(data_dir)
    return f"no shards in {folder}/: make them with python fineweb.py --out_dir={quoted}"
