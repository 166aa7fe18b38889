"""Data files, compressed or not, row by row; and which files of a folder are data.

.txt .md               one document, or several, separated by lines that are <|endoftext|>
.jsonl .ndjson .json   one object per line; a .json file can also be an array, or objects in a row
.parquet .csv .tsv     one document per row

All but .parquet also as .gz, .bz2, .xz or .zst. Memory is bounded by a row, whatever the size of
the file (except a .json file that holds an array, which must fit in memory).
"""

import bz2
import codecs
import collections
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import re
import zlib

from data.tokenizer import EOT
from script import UserError

PART_SIZE = 1 << 20  # the number of characters of a document that are in memory at a time
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# What reading a broken file can raise (pyarrow raises ValueErrors and OSErrors).
READ_ERRORS = (OSError, EOFError, ValueError, csv.Error, lzma.LZMAError, zlib.error)


class Continuation(str):
    """A further part of the same document as the text before it."""


class UnreadableRow(ValueError):
    """Yielded in place of a row that cannot be read; its message is the reason."""


# -- file formats -------------------------------------------------------------------
# Each reader takes (path, columns, position) and yields (row, next_position). A row is a dict, a
# text or an UnreadableRow. A position is a list of ints that says where to start reading, or None;
# its last number counts lines, rows or documents.
def open_decompressed(path, offset=0):
    """Open a file, which may be compressed, in binary mode at an offset into its content."""
    extension = os.path.splitext(path)[1].lower()
    # Python 3.11 has no zstd, but pyarrow, which datasets needs, has.
    if extension == ".zst":  # pyarrow's stream cannot seek
        import pyarrow

        f = io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), 1 << 20)
        while offset > 0:
            skipped = len(f.read(min(offset, 1 << 20)))
            if skipped == 0:
                break
            offset -= skipped
        return f
    f = COMPRESSED.get(extension, open)(path, "rb")
    f.seek(offset)
    return f


def read_json_lines(path, columns, position):
    offset, number = position or (0, 0)
    with open_decompressed(path, offset) as f:
        for line in f:
            offset += len(line)
            number += 1
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield parse_json_line(line), [offset, number]


def parse_json_line(line):
    """The dict in a line of JSON (bytes), or an UnreadableRow."""
    try:
        row = json.loads(line.decode("utf-8-sig"), strict=False)
    except (ValueError, RecursionError) as e:
        return UnreadableRow(str(e))
    return row if isinstance(row, dict) else UnreadableRow("not an object")


def read_json(path, columns, position):
    """A .json file: JSON lines, or else one array, or several objects in a row."""
    # The first line tells the two forms of .json apart.
    with open_decompressed(path) as f:
        first_line = parse_json_line(f.readline(1 << 26))
    if isinstance(first_line, dict):
        yield from read_json_lines(path, columns, position)
        return
    (num_done,) = position or (0,)
    try:
        with io.TextIOWrapper(
            open_decompressed(path), encoding="utf-8-sig", errors="surrogateescape"
        ) as f:
            text = f.read()
    except MemoryError:
        raise UserError(f"{path}: does not fit in memory; convert it to .jsonl")
    # An array's elements and objects in a row look alike between brackets and commas.
    decoder = json.JSONDecoder(strict=False)
    separators = re.compile(r"[\s,\[\]]*")
    end = separators.match(text).end()
    number = 0
    while end < len(text):
        number += 1
        try:
            row, end = decoder.raw_decode(text, end)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"object {number}: {e}")
        end = separators.match(text, end).end()
        if number > num_done:
            yield row if isinstance(row, dict) else UnreadableRow("not an object"), [number]


def read_csv(path, columns, position):
    """A .csv or .tsv file. A row with wrong quoting or too many fields is unreadable."""
    (num_done,) = position or (0,)
    # A field can be a whole book.
    csv.field_size_limit(1 << 30)
    delimiter = "\t" if ".tsv" in path.lower() else ","
    with io.TextIOWrapper(
        open_decompressed(path), encoding="utf-8-sig", errors="surrogateescape", newline=""
    ) as f:
        names = next(csv.reader(f, delimiter=delimiter, strict=True), None)
        if names is None:
            return
        if not names:
            raise ValueError("its first line is empty")
        # With two columns of the same name it would be a guess which of them holds the text.
        for name in columns:
            if names.count(name) > 1:
                raise ValueError(f"several columns are called {name!r}")
        for number, row in enumerate(csv_rows(f, delimiter, names), start=1):
            if number > num_done:
                yield row, [number]


def csv_rows(f, delimiter, names):
    """Yield the rows of a CSV file as dicts; an UnreadableRow where the quoting is wrong."""
    row_lines = []  # the lines of the current row; None at the end of the file

    def lines():
        for line in f:
            row_lines.append(line)
            yield line
        row_lines.append(None)

    unread = lines()
    reader = csv.reader(unread, delimiter=delimiter, strict=True)
    while True:
        row_lines.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            # The row can continue in the next lines: a reader that is not strict finds its end.
            if row_lines[-1] is not None:
                next(csv.reader(itertools.chain(list(row_lines), unread), delimiter=delimiter))
            # A quotation without an end: the rest of the file is in it.
            if row_lines[-1] is None:
                raise
            yield UnreadableRow(f'{e}; in a field a " is written ""')
            continue
        if any(fields[len(names) :]):
            yield UnreadableRow("more fields than columns")
        elif fields:  # not an empty line
            yield dict.fromkeys(names) | dict(zip(names, fields, strict=False))


def read_parquet(path, columns, position):
    import pyarrow.parquet

    (num_done,) = position or (0,)
    number = 0
    with pyarrow.parquet.ParquetFile(path) as f:
        names = f.schema_arrow.names
        # Only the columns that are needed are read from the disk.
        wanted = []
        for column in columns:
            if column in names or column.partition(".")[0] in names:
                wanted.append(column)
        # Whole row groups that have been read already are skipped.
        for group in range(f.num_row_groups):
            num_rows = f.metadata.row_group(group).num_rows
            if number + num_rows <= num_done:
                number += num_rows
                continue
            for batch in f.iter_batches(1000, row_groups=[group], columns=wanted or names):
                for row in batch.to_pylist():
                    number += 1
                    if number > num_done:
                        yield row, [number]


def read_text_file(path, columns, position):
    """The documents of a text file; the long ones in parts, see Continuation."""
    start, is_continuation, number = position or (0, 0, 0)
    with open_decompressed(path, start) as f:
        # A file may start with a byte order mark, and a character may span two chunks.
        decoder = codecs.getincrementaldecoder("utf-8-sig" if start == 0 else "utf-8")()
        text = ""  # what has been read of the document and not yet yielded
        error = None
        for chunk, offset, is_end in text_chunks(f, start):
            if not error:
                try:
                    text += decoder.decode(b"" if is_end else chunk, final=is_end)
                except UnicodeDecodeError as e:
                    at_byte = offset - len(chunk) + e.start
                    error = UnreadableRow(f"not UTF-8 ({e.reason} at byte {at_byte})")

            if is_end:
                number += 1
                if chunk or number > 1:  # there are separators: line ends next to them do not count
                    text = text.rstrip("\r\n") if is_continuation else text.strip("\r\n")
                if error and is_continuation:
                    raise error  # the start of the document has been yielded already
                if error or text:
                    yield error or as_part(text, is_continuation), [offset, 0, number]
                text = ""
                error = None
                is_continuation = False
                decoder.reset()
            elif len(text) >= PART_SIZE and not error:
                # The position is before what has been read but not yielded.
                end = split_point(text)
                part = as_part(text[:end], is_continuation)
                text = text[end:]
                num_unread = len(text.encode()) + len(decoder.getstate()[0])
                yield part, [offset - num_unread, 1, number]
                is_continuation = True


def text_chunks(f, offset):
    """Yield (chunk, the offset after it, whether it ends a document) of a text file, in bytes.

    A chunk is a line, or a part of a long one. Separators end documents, and so does an empty chunk
    at the end of the file.
    """
    at_line_start = True
    while True:
        chunk = f.readline(PART_SIZE)
        offset += len(chunk)
        yield chunk, offset, not chunk or (at_line_start and is_separator(chunk))
        if not chunk:
            return
        at_line_start = chunk.endswith(b"\n")


def is_separator(line):
    """Whether a line (bytes) is <|endoftext|>, perhaps after a byte order mark."""
    return line.strip(b"\r\n").removeprefix(b"\xef\xbb\xbf") == EOT.encode()


def split_point(text):
    """Where to split a long text: after a letter and before a space, if there is one near its end.

    No tokenizer's pattern has a piece with a letter followed by a space.
    """
    match = re.compile(r"[^\W_](?=\s)").search(text, len(text) - 4096)
    return match.end() if match else len(text)


def as_part(text, is_continuation):
    return Continuation(text) if is_continuation else text


def join_parts(texts):
    """Yield the documents that the parts make up."""
    parts = []
    for text in texts:
        if parts and not isinstance(text, Continuation):
            yield "".join(parts)
            parts = []
        parts.append(text)
    if parts:
        yield "".join(parts)


def read_text(path):
    """The documents of a text file, a list; raises UserError if it is not UTF-8."""
    try:
        rows = [row for row, _ in read_text_file(path, (), None)]
        for row in rows:
            if isinstance(row, UnreadableRow):
                raise row
    except READ_ERRORS as e:
        raise UserError(f"{path}: not a readable text file: {e}")
    return list(join_parts(rows))


# -- finding files ------------------------------------------------------------------
READERS = {
    ".txt": read_text_file,
    ".md": read_text_file,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}


def find_reader(path):
    """The reader for a file, by its extension; None if there is none."""
    # data.jsonl.gz: the inner extension decides.
    stem, extension = os.path.splitext(path.lower())
    if extension not in (".gz", ".bz2", ".xz", ".zst"):
        return READERS.get(extension)
    reader = READERS.get(os.path.splitext(stem)[1])
    return None if reader is read_parquet else reader


def find_files(path):
    """The data files of a dataset, a file or folder, sorted; UserError if there are none."""
    found = list(walk(path)) if os.path.isdir(path) else [path]
    # A dataset's README.md describes it and is not part of it.
    files = []
    others = collections.Counter()  # by extension
    for name in sorted(set(found)):
        if not os.path.isfile(name):
            raise UserError(f"{name}: is not a file that can be read; take it out")
        is_dataset_card = os.path.basename(name).lower() == "readme.md" and name != path
        if find_reader(name) and not is_dataset_card:
            files.append(name)
        else:
            others[os.path.splitext(name)[1] or "no extension"] += 1
    if not files:
        raise UserError(
            f"{path}: no data files here; expected {', '.join(READERS)}, or those compressed as "
            ".gz, .bz2, .xz, .zst"
        )
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
        print(f"{path}: {sum(others.values())} files are not read ({kinds})")
    return files


def walk(path):
    """Yield the files in a folder and its subfolders; skips hidden ones, and folders in use."""

    def fail(e):
        raise UserError(f"{e.filename}: this folder cannot be read ({e.strerror})")

    # Links can lead to the same folder twice, or in a circle.
    seen = set()
    for folder, folders, names in os.walk(path, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        real_path = os.path.realpath(folder)
        being_written = ".lock" in names and folder != path  # shards of fineweb.py
        if real_path in seen or being_written:
            folders.clear()
            continue
        seen.add(real_path)
        for name in names:
            if not name.startswith("."):  # macOS writes ._a.txt beside a.txt
                yield os.path.join(folder, name)  # the folder may end in a slash
