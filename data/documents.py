"""The texts of a dataset: from local files (see readers.py), or from the Hugging Face hub.

There is no globbing, and only the text column is read: a string, or a chat. Rows that cannot be
read are skipped, counted and reported.
"""

import collections
import copy
import dataclasses
import os
import re
import sys
import textwrap
import time

from data.dataset_files import SPLIT_WORDS, find_files
from data.readers import (
    READ_ERRORS,
    UTF8_READERS,
    Continuation,
    UnreadableRow,
    find_reader,
    read_json_lines,
)
from files import check_lfs_pointer, download
from script import UserError

import requests

HUB = {
    "fineweb-edu": "HuggingFaceFW/fineweb-edu",
    "fineweb": "HuggingFaceFW/fineweb",
    "openwebtext": "Skylion007/openwebtext",
    "smol-smoltalk": "HuggingFaceTB/smol-smoltalk",
}
CHAR_RNN = "https://raw.githubusercontent.com/karpathy/char-rnn/master"
TINYSHAKESPEARE = f"{CHAR_RNN}/data/tinyshakespeare/input.txt"
# ShareGPT's names for the two sides of a chat.
ROLES = {"human": "User", "gpt": "Assistant"}


# -- rows ---------------------------------------------------------------------------
def render_chat(value):
    """The text in a column: a str, or a chat as "User: ...", blank line, "Assistant: ...".

    A str can also be bytes, in UTF-8. A chat is a list of {"role", "content"} or {"from", "value"}.
    Content can be a list of parts, of which {"text"} is used. Messages without text, such as tool
    calls, are left out. Returns None if the value is neither.
    """
    if isinstance(value, bytes):
        return value.decode()
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return None
    # Several formats are in use: OpenAI's messages, and ShareGPT's conversations.
    paragraphs = []
    for message in value:
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(content, list):
            texts = [part.get("text") for part in content if isinstance(part, dict)]
            content = "".join(str(text) for text in texts if text)
        if isinstance(content, str) and content:
            paragraphs.append(f"{ROLES.get(role, str(role).capitalize())}: {content}")
    return "\n\n".join(paragraphs)


def get_column(row, column):
    """row[column], or row["data"]["text"] for the column data.text; None if it is missing."""
    if column in row:
        return row[column]
    # A column inside another, as data.text.
    for name in column.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row


# -- datasets -----------------------------------------------------------------------
@dataclasses.dataclass
class FileStats:
    """What has been found in a file, also before the position where reading it continues."""

    has_document: bool = False
    has_column: bool = False  # whether a row has one of the columns
    is_utf8: bool = False  # whether its reader has checked that the texts are
    rows: int = 0  # since that position


class Documents:
    """The texts of a dataset: a name in HUB, owner/name on the hub, or a local file or folder.

    Of a folder it reads the files of one split, see dataset_files.py. Rows that have no text or
    cannot be read are skipped; report() counts them. Iterating raises UserError if a file cannot be
    read, has no such column or no row with text, or if more than three rows and 1% of all are
    unreadable. A broken connection to the hub is tried again, five times with growing pauses.

    Documents are strs; with as_bytes, those of Parquet and Arrow files are bytes, in UTF-8.

    `state`, plain JSON values, is the current position of an iteration and the start of the next
    one; it can be set. What has been read is not read again.
    """

    def __init__(
        self,
        dataset,
        subset=None,
        text_column="text",
        streaming=True,
        split="train",
        as_bytes=False,
    ):
        self.dataset = dataset
        self.subset = subset
        self.columns = [text_column]
        if text_column == "text":
            self.columns += ["messages", "conversations"]  # chats
        self.streaming = streaming
        self.split = split
        self.as_bytes = as_bytes
        self.is_local = os.path.exists(dataset) or dataset == "tinyshakespeare"
        # A mistyped path must not become a request to the hub.
        is_hub_name = dataset in HUB or re.fullmatch(r"[\w.-]+/[\w.-]+", dataset)
        if not self.is_local and not is_hub_name:
            names = ", ".join([*HUB, "tinyshakespeare"])
            raise UserError(
                f"{dataset}: no such file or folder; known names: {names}, or owner/name of the hub"
            )
        self.files = None  # {split: paths} of a local dataset, once they have been found
        self.state = None
        self.num_rows = 0
        self.current = FileStats()  # of the current file, or of the hub's dataset
        self.skipped = collections.Counter()  # {reason: rows}
        self.examples = []  # the first three, in words

    def report(self):
        """How many rows were skipped and why, in words; empty if none were."""
        reasons = [f"{count:,} {reason}" for reason, count in self.skipped.items() if count]
        if not reasons:
            return ""
        examples = f" ({'; '.join(self.examples)})" if self.examples else ""
        return f"left out of {self.num_rows:,} rows: {', '.join(reasons)}{examples}"

    def validation(self):
        """The Documents of the files whose names say that they are for validation; None if none."""
        if not self.is_local or self.split != "train":
            return None
        files = self._find_files()
        if not files["validation"] or not files["train"]:
            return None
        # The same dataset, with counts of its own.
        texts = copy.copy(self)
        texts.split = "validation"
        texts.skipped = collections.Counter()
        texts.examples = []
        return texts

    def _find_files(self):
        """{split: paths} of a local dataset."""
        if self.files is None:
            if self.dataset == "tinyshakespeare":
                self.dataset = download_tinyshakespeare()
            self.files = find_files(self.dataset)
        return self.files

    def _files_of_split(self):
        """The sorted paths of the files of the split; UserError if there are none."""
        # val means validation, as in file names.
        files = self._find_files()
        paths = files.get(SPLIT_WORDS.get(self.split))
        if not paths:
            names = [name for name, paths in files.items() if paths]
            raise UserError(
                f"{self.dataset}: has no files for --split={self.split}; choose --split="
                f"{' or '.join(names)}"
            )
        return paths

    def __iter__(self):
        """Yield the documents after self.state, which moves on with them."""
        # Continue where the state says, with the counts that it has.
        start = self.state or {}
        self.num_rows = start.get("rows", 0)
        self.skipped = collections.Counter(start.get("skipped"))
        rows = self._rows(start.get("file", ""), start.get("position"))
        for row, file, position, location in rows:
            is_continuation = isinstance(row, Continuation)
            if not is_continuation:
                self.num_rows += 1
                self.current.rows += 1
            try:
                text = self._text(row, location)
            except UnreadableRow as e:
                self._skip("unreadable", f"{location}: {e}")
                self._check_bad_rows(1000)
                continue
            if not text:
                continue
            if not is_continuation:
                self.current.has_document = True
            # Set before the document is yielded, so that the caller can store both.
            self.state = {
                "rows": self.num_rows,
                "file": file,
                "position": position,
                "skipped": dict(self.skipped),
            }
            yield text
        self._check_bad_rows(0)

    def _text(self, row, location):
        """The text of a row; "" if it has none, which is counted. Raises UnreadableRow."""
        if isinstance(row, UnreadableRow):
            raise row
        text = row
        is_utf8 = self.current.is_utf8
        try:
            if isinstance(row, dict):
                text = self._text_of_columns(row, location)
            if isinstance(text, bytes):
                return text if is_utf8 and self.as_bytes else text.decode()
            # An escape in JSON can leave a lone surrogate.
            if not is_utf8:
                text.encode()
        except UnicodeError:
            raise UnreadableRow("a lone surrogate, or not UTF-8")
        return text

    def _text_of_columns(self, row, location):
        """The first text in a row's columns; "" if there is none, which is counted."""
        text = row.get(self.columns[0])
        if text and isinstance(text, (str, bytes)):  # nearly always
            self.current.has_column = True
            return text
        has_column = False
        for column in self.columns:
            if column in row or column.partition(".")[0] in row:
                has_column = True
        self.current.has_column |= has_column
        # The first rows tell whether the file has such a column at all.
        if not self.current.has_column and self.current.rows >= 100:
            raise UserError(self._no_column(row, location))
        # The text column comes first, then those in which chats usually are.
        values = [get_column(row, column) for column in self.columns]
        texts = [render_chat(value) for value in values if value is not None]
        for text in texts:
            if text:
                return text
        if None in texts:
            self._skip("not a string")
        elif has_column:
            self._skip("without text")
        else:
            self._skip("without text", f"{location}: no column {self.columns[0]!r}")
        return ""

    def _skip(self, reason, example=""):
        """Count a row that is skipped; the first three examples are named in the report."""
        self.skipped[reason] += 1
        if example and len(self.examples) < 3:
            self.examples.append(example)

    def _check_bad_rows(self, min_rows):
        """Raise UserError if over 3 rows, and 1% of all (or of min_rows), are unreadable."""
        # A few damaged rows are normal; many mean that the file is not what it seems.
        bad = self.skipped["unreadable"]
        if bad > 3 and 100 * bad > max(min_rows, self.num_rows):
            raise UserError(f"{self.dataset}: too many rows cannot be read; {self.report()}")

    def _rows(self, start_file, start_position):
        """Yield (row, its file, the position after it, its location in words)."""
        if not self.is_local:
            yield from self._hub_rows(start_position)
            return
        # Files are read in order, so that a position is a file and a place in it.
        for path in self._files_of_split():
            if path < start_file:
                continue
            position = start_position if path == start_file else None
            check_lfs_pointer(path)
            # The columns and counts of each file are its own.
            reader = find_reader(path)
            unit = "line" if reader is read_json_lines else "row"
            self.current = FileStats(bool(position), bool(position), reader in UTF8_READERS)
            row = None
            try:
                for row, next_position in reader(path, self.columns, position):
                    yield row, path, next_position, f"{path} {unit} {next_position[-1]}"
            except READ_ERRORS as e:
                if os.path.exists(path) and os.path.getsize(path) == 0:
                    continue  # an empty file has no rows
                raise UserError(
                    f"cannot read {path}: {type(e).__name__}: {str(e).partition(chr(10))[0]}; "
                    "repair it and repeat the command; without it, choose another --out_dir"
                )
            self._check_file(path, row)

    def _check_file(self, name, last_row):
        """Raise UserError if a file had rows and no document."""
        if not self.current.rows or self.current.has_document:
            return
        # Either the column is missing, or its values are no texts.
        if isinstance(last_row, dict) and not self.current.has_column:
            raise UserError(self._no_column(last_row, name))
        raise UserError(f"{name}: no row has text; take the file out ({self.report()})")

    def _no_column(self, row, location):
        """What to say of a file whose rows have no such column."""
        names = textwrap.shorten(", ".join(map(str, list(row)[:20])), 300)
        return (
            f"{location} has no column {self.columns[0]!r}: use --text_column= with one of {names}"
        )

    def _hub_rows(self, position):
        """The same for a dataset on the hub, read with `datasets`."""
        failures = 0
        row = None
        self.current = FileStats(bool(position), bool(position))
        # Try again after an error; an attempt that has read something resets the count.
        while True:
            last_position = position
            try:
                rows = self._load_from_hub()
                if position:
                    rows.load_state_dict(position)
                for row in rows:
                    position = rows.state_dict()
                    yield row, "", position, f"{self.dataset} row {self.num_rows + 1}"
                break
            except Exception as e:  # `datasets` and its readers share no base class for errors
                failures = failures + 1 if position == last_position else 1
                reason = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
                if position is None or failures > 5:
                    hint = "go online, or give a local file or folder"
                    if "onfig" in reason:  # BuilderConfig, or "Config name is missing"
                        hint = "choose with --subset="
                    raise UserError(f"cannot read {self.dataset}: {reason}; {hint}")
                seconds = 2**failures
                print(f"\n{self.dataset}: {reason}; trying again in {seconds} s", file=sys.stderr)
                time.sleep(seconds)
        self._check_file(self.dataset, row)

    def _load_from_hub(self):
        """The datasets.IterableDataset of this dataset."""
        import datasets
        import huggingface_hub

        # The library would report each of its own retries.
        huggingface_hub.logging.set_verbosity_error()
        args = [HUB.get(self.dataset, self.dataset)]
        if self.subset:
            args.append(self.subset)
        rows = datasets.load_dataset(*args, streaming=self.streaming, split=self.split)
        if not isinstance(rows, datasets.IterableDataset):
            rows = rows.to_iterable_dataset()
        return rows


def download_tinyshakespeare():
    """The path of tiny Shakespeare, which is downloaded if it is missing; else UserError."""
    path = "tinyshakespeare.txt"
    try:
        download(TINYSHAKESPEARE, path)
    except requests.RequestException as e:
        raise UserError(f"cannot download {TINYSHAKESPEARE} ({type(e).__name__}); put it at {path}")
    return path
