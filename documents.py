"""The texts of a dataset: of local files, which are read plainly, or of the Hugging Face hub.

.txt .md               one document, or those between the lines that are <|endoftext|>
.jsonl .ndjson .json   an object a line; in .json also an array of them, or objects over several lines
.parquet .csv .tsv     a row each

All but .parquet also as .gz, .bz2, .xz or .zst. Names are names, not patterns, and only the text is looked at: a string
in the text column or, in its place, a chat. Memory is bounded by a row, whatever the size of a file. What cannot be
read is left out, counted and named.
"""

import bz2
import codecs
import collections
import csv
import gzip
import io
import json
import lzma
import os
import random
import re
import sys
import time
import zlib

from shards import download
from tokenizer import EOT

import requests

HUB = {
    "fineweb-edu": "HuggingFaceFW/fineweb-edu",
    "fineweb": "HuggingFaceFW/fineweb",
    "openwebtext": "Skylion007/openwebtext",
    "smol-smoltalk": "HuggingFaceTB/smol-smoltalk",
}
TINYSHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
PIECE = 1 << 20  # characters of a document that are in memory at a time
ROLES = {"human": "User", "gpt": "Assistant"}  # as ShareGPT calls them
BROKEN = (OSError, EOFError, ValueError, csv.Error, lzma.LZMAError, zlib.error)  # what a file may raise, by pyarrow too


class More(str):
    """A piece of the same document as the text before it."""


class Unreadable(ValueError):
    """What stands in the place of a row that cannot be read: why."""


# -- files --------------------------------------------------------------------------
# Each reader yields (row, place): a dict, a text or an Unreadable, and where the file goes on behind it, a list of
# whole numbers; it starts from such a place. The last number counts lines, rows or documents.
def opened(path, offset=0):
    """A file as it is when unpacked, binary, from a place on."""
    ending = os.path.splitext(path)[1].lower()
    if ending == ".zst":  # which cannot seek
        import pyarrow

        f = io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), 1 << 20)
        while offset > 0 and (read := len(f.read(min(offset, 1 << 20)))):
            offset -= read
        return f
    f = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(ending, open)(path, "rb")
    f.seek(offset)
    return f


def json_lines(path, columns, place):
    offset, number = place or (0, 0)
    with opened(path, offset) as f:
        for line in f:
            offset, number = offset + len(line), number + 1
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield parsed(line), [offset, number]


def parsed(line):
    """The object of a line of JSON, bytes."""
    try:
        row = json.loads(line.decode("utf-8-sig"), strict=False)
    except (ValueError, RecursionError) as e:
        return Unreadable(str(e))
    return row if isinstance(row, dict) else Unreadable("not an object")


def json_objects(path, columns, place):
    """Of an array, or one behind the other, over any number of lines."""
    (done,) = place or (0,)
    decoder, buffer, at, number = json.JSONDecoder(strict=False), "", 0, 0
    with io.TextIOWrapper(opened(path), encoding="utf-8-sig", errors="surrogateescape") as f:
        while True:
            at = re.compile(r"[\s,\[\]]*").match(buffer, at).end()
            try:
                row, at = decoder.raw_decode(buffer, at)
            except (ValueError, RecursionError) as e:
                more = f.read(max(1 << 20, len(buffer) - at)) if len(buffer) - at < 1 << 28 else ""
                if not more:
                    if at < len(buffer):
                        raise ValueError(f"object {number + 1}: {e}") from None
                    return
                buffer, at = buffer[at:] + more, 0
                continue
            number += 1
            if number > done:
                yield row if isinstance(row, dict) else Unreadable("not an object"), [number]


def json_file(path, columns, place):
    """.json is either."""
    with opened(path) as f:
        first = parsed(f.readline(1 << 26))
    yield from (json_lines if isinstance(first, dict) else json_objects)(path, columns, place)


def table(path, columns, place):
    """.csv or .tsv. A row that breaks the rules of quoting, or has more fields than columns, is Unreadable."""
    (done,) = place or (0,)
    csv.field_size_limit(1 << 30)
    how = {"delimiter": "\t" if ".tsv" in path.lower() else ","}
    with io.TextIOWrapper(opened(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as f:
        lines = []  # of the row; those of the first have the header before them
        rows = csv.DictReader((lines.append(line) or line for line in f), **how)
        twice = [name for name in columns if (rows.fieldnames or []).count(name) > 1]
        if twice or rows.fieldnames == []:
            raise ValueError(f"several columns are called {twice[0]!r}" if twice else "its first line is empty")
        for number, row in enumerate(rows, start=1):
            try:
                list(csv.reader(lines, **how, strict=True))
                row = Unreadable("more fields than columns") if any(row.get(None, ())) else row
            except csv.Error as e:
                if "end of data" in str(e):  # a quotation that nothing ends: all that is behind it is in it
                    raise
                row = Unreadable(f'{e} in {len(lines)} lines; in a field a " is written ""')
            lines.clear()
            if number > done:
                yield row, [number]


def parquet(path, columns, place):
    import pyarrow.parquet

    (done,) = place or (0,)
    number = 0
    with pyarrow.parquet.ParquetFile(path) as f:
        names = f.schema_arrow.names
        wanted = [column for column in columns if column.partition(".")[0] in names or column in names]
        for group in range(f.num_row_groups):
            rows = f.metadata.row_group(group).num_rows
            if number + rows <= done:
                number += rows
                continue
            for batch in f.iter_batches(1000, row_groups=[group], columns=wanted or names):
                for row in batch.to_pylist():
                    number += 1
                    if number > done:
                        yield row, [number]


def plain_text(path, columns, place):
    """Documents, the long ones in pieces: the rest of one is a More."""
    offset, more, number = place or (0, 0, 0)
    with opened(path, offset) as f:
        decoder = codecs.getincrementaldecoder("utf-8-sig" if offset == 0 else "utf-8")()
        text, kind, fresh, bad = "", More if more else str, True, None  # what is held, what it is; a new line; a fault
        while True:
            line = f.readline(PIECE)
            offset += len(line)
            ends = not line or (fresh and line.strip(b"\r\n") in (EOT.encode(), b"\xef\xbb\xbf" + EOT.encode()))
            try:
                text += "" if bad else decoder.decode(b"" if ends else line, final=ends)
            except UnicodeDecodeError as e:
                bad = Unreadable(f"not UTF-8 ({e.reason} at byte {offset - len(line) + e.start})")
            if ends:
                number += 1
                if line or number > 1:  # there are separators
                    text = text.rstrip("\r\n") if kind is More else text.strip("\r\n")
                if bad and kind is More:  # its beginning has been taken already
                    raise bad
                if bad or text:
                    yield bad or kind(text), [offset, 0, number]
                text, kind, bad = "", str, None
                decoder.reset()
            elif len(text) >= PIECE and not bad:
                # Between a letter and a blank no pattern of a tokenizer has a piece: cut there, if there is one.
                at = next((m.end() for m in re.compile(r"[^\W_](?=\s)").finditer(text, len(text) - 4096)), len(text))
                piece, text = kind(text[:at]), text[at:]
                yield piece, [offset - len(text.encode()) - len(decoder.getstate()[0]), 1, number]
                kind = More
            fresh = line.endswith(b"\n")
            if not line:
                return


def read_text(path):
    """The documents of a text file, in whole; exits if it cannot be read, or is not UTF-8."""
    try:
        found = [row for row, _ in plain_text(path, (), None)]
        for row in found:
            if isinstance(row, Unreadable):
                raise row
        return list(whole(found))
    except BROKEN as e:
        sys.exit(f"{path}: not a readable text file: {e}")


def whole(texts):
    """Texts whose pieces are together again."""
    parts = []
    for text in texts:
        if parts and not isinstance(text, More):
            yield "".join(parts)
            parts = []
        parts.append(text)
    if parts:
        yield "".join(parts)


READERS = {".txt": plain_text, ".md": plain_text, ".jsonl": json_lines, ".ndjson": json_lines, ".json": json_file,
           ".csv": table, ".tsv": table, ".parquet": parquet}  # fmt: skip


def reader_of(path):
    """The function that reads a file, by the end of its name; None if there is none."""
    stem, ending = os.path.splitext(path.lower())
    packed = ending in (".gz", ".bz2", ".xz", ".zst")
    reader = READERS.get(os.path.splitext(stem)[1] if packed else ending)
    return None if packed and reader is parquet else reader


def find_files(path):
    """The files of a dataset, in order: of a file, or a folder and those in it. Exits if none can be read."""
    if not os.path.isdir(path):
        found = [path]
    else:
        found, seen = [], set()
        fail = lambda e: sys.exit(f"{e.filename}: this folder cannot be read ({e.strerror})")  # noqa: E731
        for folder, folders, names in os.walk(path, onerror=fail, followlinks=True):
            folders[:] = sorted(x for x in folders if not x.startswith("."))
            real = os.path.realpath(folder)
            if real in seen or (".lock" in names and folder != path):  # by a link, or shards that are being written
                folders.clear()
                continue
            seen.add(real)
            found += [os.path.join(folder, name) for name in names if not name.startswith(".")]  # ._a.txt is a Mac's
    for name in found:
        if not os.path.isfile(name):
            sys.exit(f"{name}: is not a file that can be read; take it out")
    cards = [x for x in found if os.path.basename(x).lower() == "readme.md" and x != path]  # of datasets
    files = sorted(name for name in found if reader_of(name) and name not in cards)
    if not files:
        sys.exit(f"{path}: no data files here; expected {', '.join(READERS)}, or those packed as .gz, .bz2, .xz, .zst")
    others = collections.Counter(os.path.splitext(x)[1] or "no ending" for x in sorted({*found} - {*files}))
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
        print(f"{path}: {sum(others.values())} files are not read ({kinds})")
    return files


# -- rows ---------------------------------------------------------------------------
def as_text(value):
    """The text in a row: a string, or a chat as "User: ...", a blank line, "Assistant: ...".

    A chat is a list of {"role", "content"} or {"from", "value"}; content may be a list of parts, of which {"text"}
    counts. Messages without text, as calls of tools are, are left out. None if it is neither.
    """
    if isinstance(value, str) or value is None:
        return value or ""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return None
    said = []
    for message in value:
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(content, list):
            content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
        if isinstance(content, str) and content:
            said.append(f"{ROLES.get(role, str(role).capitalize())}: {content}")
    return "\n\n".join(said)


def column_of(row, column):
    """row[column], or row["data"]["text"] for the column data.text; None if there is none."""
    if column in row:
        return row[column]
    for name in column.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row


def shuffled(texts, size, seed):
    """Texts in another order, by a buffer of so many."""
    rng, held = random.Random(seed), []
    for text in texts:
        held.append(text)
        if len(held) > size:
            i = rng.randrange(len(held))
            held[i], held[-1] = held[-1], held[i]
            yield held.pop()
    rng.shuffle(held)
    yield from held


class Documents:
    """The texts of a dataset by its name, here or on the hub, or of a local file or folder, one after the other.

    Rows without a text are left out, and those that cannot be read: report() tells of them. An iteration exits with one
    line if the source cannot be had, has no such column, or more than three rows and one in a hundred cannot be read;
    one that reads from the hub and is cut off tries again, five times with growing pauses.

    `state`, plain JSON values, is where an iteration stands, and where the next one starts: it can be set. Without a
    shuffle buffer, what lies behind is not read again.
    """

    def __init__(self, dataset, subset=None, text_column="text", streaming=True, shuffle_buffer=0, seed=0, **hub):
        self.dataset, self.subset, self.streaming = dataset, subset, streaming
        self.hub = {"split": "train"} | hub
        self.columns = [text_column, "messages", "conversations"]
        self.shuffle_buffer, self.seed = shuffle_buffer, seed
        self.local = os.path.exists(dataset) or dataset == "tinyshakespeare"
        if not self.local and dataset not in HUB and not re.fullmatch(r"[\w.-]+/[\w.-]+", dataset):
            names = ", ".join([*HUB, "tinyshakespeare"])
            sys.exit(f"{dataset}: no such file or folder; known names: {names}, or owner/name of the hub")
        self.state, self.left_out, self.named = None, collections.Counter(), []

    def report(self):
        """What has been left out, in words; empty if nothing."""
        named = f" ({'; '.join(self.named)})" if self.named else ""
        parts = ", ".join(f"{count:,} {why}" for why, count in self.left_out.items() if why != "rows" and count)
        return f"of {self.left_out['rows']:,} rows were left out: {parts}{named}" if parts else ""

    def __iter__(self):
        if self.dataset == "tinyshakespeare":
            self.dataset = "tinyshakespeare.txt"
            if not os.path.exists(self.dataset):
                try:
                    download(TINYSHAKESPEARE, self.dataset)
                except requests.RequestException as e:
                    sys.exit(f"cannot download {TINYSHAKESPEARE} ({type(e).__name__}); put it at {self.dataset}")
        if not self.shuffle_buffer:
            yield from self._texts()
            return
        # What a shuffle buffer holds is not in a state: start over, and leave out what has been yielded.
        behind, self.state = (self.state or {"documents": 0})["documents"], None
        for count, text in enumerate(shuffled(whole(self._texts()), self.shuffle_buffer, self.seed), start=1):
            if count > behind:
                self.state = {"documents": count}
                yield text

    def _texts(self):
        """Yield the documents behind self.state, which moves on with them."""
        state = self.state or {"documents": 0, "file": "", "place": None, "left_out": {}}
        self.left_out = collections.Counter(state["left_out"])
        count = state["documents"]
        for row, file, place, where in self._rows(state["file"], state["place"]):
            self.left_out["rows"] += not isinstance(row, More)
            text = self._text(row, where)
            if text:
                count += not isinstance(text, More)
                self.state = {"documents": count, "file": file, "place": place, "left_out": dict(self.left_out)}
                yield text
        self._check(0)

    def _text(self, row, where):
        """The text of a row, None if it is left out; where: (file, number) for its name."""
        if isinstance(row, dict):
            values = {column: column_of(row, column) for column in self.columns}
            has_column = any({column, column.partition(".")[0]} & row.keys() for column in self.columns)
            if self.left_out["rows"] == 1 and not has_column:
                hint = f"use --text_column= with one of {', '.join(map(str, row))}"
                sys.exit(f"{self.dataset} has no column {self.columns[0]!r}: {hint}")
            texts = [as_text(value) for value in values.values() if value is not None]
            row = next((text for text in texts if text), None if None in texts else "")
            if row is None:
                self.left_out["not a string"] += 1
            elif not row:
                self.left_out["without text"] += 1
                if not has_column and len(self.named) < 3:
                    self.named.append(f"{where[0]} {where[1]}: no column {self.columns[0]!r}")
        if isinstance(row, str) and not row.isascii() and re.search("[\ud800-\udfff]", row):
            row = Unreadable("half of a surrogate pair, or not UTF-8")
        if isinstance(row, Unreadable):
            self.left_out["unreadable"] += 1
            if len(self.named) < 3:
                self.named.append(f"{where[0]} {where[1]}: {row}")
            self._check(1000)
            return None
        return row

    def _check(self, least):
        """Exit if too many rows could not be read, of `least` at least."""
        bad = self.left_out["unreadable"]
        if bad > 3 and 100 * bad > max(least, self.left_out["rows"]):
            sys.exit(f"{self.dataset}: too many rows cannot be read; {self.report()}")

    def _rows(self, file, place):
        """Yield (row, its file, place behind it, (file, line or row) for its name)."""
        if not self.local:
            yield from self._hub_rows(place)
            return
        for path in find_files(self.dataset):  # which are sorted
            if path < file:
                continue
            unit = "line" if reader_of(path) is json_lines else "row"
            try:
                for row, behind in reader_of(path)(path, self.columns, place if path == file else None):
                    yield row, path, behind, (path, f"{unit} {behind[-1]}")
            except BROKEN as e:
                if not os.path.exists(path) or os.path.getsize(path):  # an empty file is one without rows
                    why = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
                    hint = "mend it, and the same command goes on; without it, choose another --out_dir"
                    sys.exit(f"cannot read {path}: {why}; {hint}")

    def _hub_rows(self, place):
        """The same of a dataset on the hub, by `datasets`."""
        failures = 0
        while True:
            last = place
            try:
                import datasets
                import huggingface_hub

                huggingface_hub.logging.set_verbosity_error()  # of its own tries it need not tell
                name = HUB.get(self.dataset, self.dataset)
                args = (name, self.subset) if self.subset else (name,)
                rows = datasets.load_dataset(*args, streaming=self.streaming, **self.hub)
                if not isinstance(rows, datasets.IterableDataset):
                    rows = rows.to_iterable_dataset()
                if place:
                    rows.load_state_dict(place)
                for number, row in enumerate(rows, start=1):
                    place = rows.state_dict()
                    yield row, "", place, (self.dataset, f"row {number}")
                return
            except Exception as e:  # whatever `datasets` and its readers raise: they share no base class
                failures = failures + 1 if place == last else 1
                reason = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
                if place is None or failures > 5:
                    hint = "choose with --subset=" if "onfig" in reason else "go online, or give a local file or folder"
                    sys.exit(f"cannot read {self.dataset}: {reason}; {hint}")
                print(f"\n{self.dataset}: {reason}; reading on in {2**failures} s", file=sys.stderr)
                time.sleep(2**failures)
