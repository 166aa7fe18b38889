"""The texts of a dataset: from local files (see readers.py), or from the Hugging Face hub.

There is no globbing, and only the text column is read: a string, or a chat. Rows that cannot be
read are skipped, counted and reported.
"""

import collections
import os
import re
import sys
import time

from data.readers import (
    READ_ERRORS,
    Continuation,
    UnreadableRow,
    find_files,
    find_reader,
    read_json_lines,
)
from files import download
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
    """The text in a column: a string, or a chat as "User: ...", blank line, "Assistant: ...".

    A chat is a list of {"role", "content"} or {"from", "value"}. Content can be a list of parts, of
    which {"text"} is used. Messages without text, such as tool calls, are left out. Returns None if
    the value is neither.
    """
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
class Documents:
    """The texts of a dataset: a name in HUB, owner/name on the hub, or a local file or folder.

    Rows that have no text or cannot be read are skipped; report() counts them. Iterating raises
    UserError if the source cannot be read, has no such column, or more than three rows and 1% of
    them are unreadable. A broken connection to the hub is tried again, five times with growing
    pauses.

    `state`, plain JSON values, is the current position of an iteration and the start of the next
    one; it can be set. What has been read is not read again.
    """

    def __init__(self, dataset, subset=None, text_column="text", streaming=True, split="train"):
        self.dataset = dataset
        self.subset = subset
        self.columns = [text_column, "messages", "conversations"]
        self.streaming = streaming
        self.split = split
        self.is_local = os.path.exists(dataset) or dataset == "tinyshakespeare"
        # A mistyped path must not become a request to the hub.
        is_hub_name = dataset in HUB or re.fullmatch(r"[\w.-]+/[\w.-]+", dataset)
        if not self.is_local and not is_hub_name:
            names = ", ".join([*HUB, "tinyshakespeare"])
            raise UserError(
                f"{dataset}: no such file or folder; known names: {names}, or owner/name of the hub"
            )
        self.state = None
        self.num_rows = 0
        self.skipped = collections.Counter()  # {reason: rows}
        self.examples = []  # the first three, in words

    def report(self):
        """How many rows were skipped and why, in words; empty if none were."""
        reasons = [f"{count:,} {reason}" for reason, count in self.skipped.items() if count]
        if not reasons:
            return ""
        examples = f" ({'; '.join(self.examples)})" if self.examples else ""
        return f"left out of {self.num_rows:,} rows: {', '.join(reasons)}{examples}"

    def __iter__(self):
        if self.dataset == "tinyshakespeare":
            self.dataset = "tinyshakespeare.txt"
            if not os.path.exists(self.dataset):
                try:
                    download(TINYSHAKESPEARE, self.dataset)
                except requests.RequestException as e:
                    raise UserError(
                        f"cannot download {TINYSHAKESPEARE} ({type(e).__name__}); put it at "
                        f"{self.dataset}"
                    )
        yield from self._texts()

    def _texts(self):
        """Yield the documents after self.state, which moves on with them."""
        # Continue where the state says, with the counts that it has.
        start = self.state or {
            "documents": 0,
            "rows": 0,
            "file": "",
            "position": None,
            "skipped": {},
        }
        self.num_rows = start.get("rows", 0)  # a former version had none
        self.skipped = collections.Counter(start["skipped"])
        num_documents = start["documents"]
        for row, file, position, location in self._rows(start["file"], start["position"]):
            is_continuation = isinstance(row, Continuation)
            if not is_continuation:
                self.num_rows += 1
            try:
                text = self._text(row, location)
            except UnreadableRow as e:
                self._skip("unreadable", f"{location}: {e}")
                self._check_bad_rows(1000)
                continue
            if not text:
                continue
            if not is_continuation:
                num_documents += 1
            # Set before the document is yielded, so that the caller can store both.
            self.state = {
                "documents": num_documents,
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
        if isinstance(row, dict):
            text = self._text_of_columns(row, location)
        # A surrogate cannot be encoded as UTF-8: the file or an escape in its JSON is damaged.
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise UnreadableRow("half of a surrogate pair, or not UTF-8")
        return text

    def _text_of_columns(self, row, location):
        """The first text in a row's columns; "" if there is none, which is counted."""
        # The first row tells whether the dataset has such a column at all.
        has_column = False
        for column in self.columns:
            if column in row or column.partition(".")[0] in row:
                has_column = True
        if self.num_rows == 1 and not has_column:
            raise UserError(
                f"{self.dataset} has no column {self.columns[0]!r}: use --text_column= with one of "
                f"{', '.join(map(str, row))}"
            )
        # The text column, or else a chat.
        # The text column comes first, then the columns in which chats usually are.
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
        """Raise UserError if over 1% of the rows (at least min_rows) are unreadable."""
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
        for path in find_files(self.dataset):  # sorted
            if path < start_file:
                continue
            reader = find_reader(path)
            unit = "line" if reader is read_json_lines else "row"
            position = start_position if path == start_file else None
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

    def _hub_rows(self, position):
        """The same for a dataset on the hub, read with `datasets`."""
        failures = 0
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
                return
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
