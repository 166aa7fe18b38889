"""Data files, compressed or not, row by row.

.txt .md               one document, or several, separated by lines that are <|endoftext|>
.jsonl .ndjson .json   one object per line; a .json file can also be an array, or objects in a row
.parquet .csv .tsv     one document per row
.arrow                 the same; save_to_disk() of `datasets` writes it

All but .parquet and .arrow also as .gz, .bz2, .xz or .zst. Memory is bounded by a few MB of rows,
whatever the size of the file (except a .json file that holds an array, which must fit in memory).
"""

import bz2
import codecs
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
TEXT_TYPES = ("string", "large_string", "binary", "large_binary")  # of Arrow
# What reading a broken file can raise (pyarrow raises ValueErrors and OSErrors).
READ_ERRORS = (
    OSError, EOFError, ValueError, NotImplementedError, csv.Error, lzma.LZMAError, zlib.error,
)  # fmt: skip


class Continuation(str):
    """A further part of the same document as the text before it."""


class UnreadableRow(ValueError):
    """Yielded in place of a row that cannot be read; its message is the reason."""


# -- opening files --------------------------------------------------------------------
class MultiStreamFile(io.RawIOBase):
    """The content of a .bz2 or .xz file, which may hold several streams with zeros between them.

    Python's own reader takes anything else after a stream for the end of the file; this raises.
    """

    def __init__(self, path, new_decompressor):
        super().__init__()
        self.f = open(path, "rb")
        self.new_decompressor = new_decompressor
        self.decompressor = new_decompressor()

    def readable(self):
        return True

    def close(self):
        self.f.close()
        super().close()

    def readinto(self, buffer):
        data = b""
        while not data:  # a stream can be empty
            compressed = b""
            if self.decompressor.eof:
                # Zeros pad a file to the blocks of a tape or disk.
                compressed = self.decompressor.unused_data.lstrip(b"\0")
                while not compressed:
                    chunk = self.f.read(1 << 16)
                    if not chunk:
                        return 0
                    compressed = chunk.lstrip(b"\0")
                self.decompressor = self.new_decompressor()
            elif self.decompressor.needs_input:
                compressed = self.f.read(1 << 16)
                if not compressed:
                    raise EOFError("the compressed file is cut short")
            # What does not fit the buffer stays inside the decompressor.
            data = self.decompressor.decompress(compressed, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def open_decompressed(path, offset=0):
    """Open a file, which may be compressed, in binary mode at an offset into its content."""
    extension = os.path.splitext(path)[1].lower()
    if extension == ".gz":
        f = gzip.open(path, "rb")
    elif extension == ".bz2":
        f = io.BufferedReader(MultiStreamFile(path, bz2.BZ2Decompressor), 1 << 20)
    elif extension == ".xz":
        f = io.BufferedReader(MultiStreamFile(path, lzma.LZMADecompressor), 1 << 20)
    elif extension == ".zst":
        # Python 3.11 has no zstd, but pyarrow, which datasets needs, has.
        import pyarrow

        f = io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), 1 << 20)
    else:
        f = open(path, "rb")
        f.seek(offset)
        return f
    # A compressed file cannot be entered in the middle.
    while offset > 0:
        skipped = len(f.read(min(offset, 1 << 20)))
        if skipped == 0:
            break
        offset -= skipped
    return f


# -- file formats -------------------------------------------------------------------
# Each reader takes (path, columns, position) and yields (row, next_position). A row is a dict, a
# text or an UnreadableRow. A position is a list of ints that says where to start reading, or None;
# its last number counts lines, rows or documents.
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
    # The first line that is not empty tells the two forms of .json apart.
    line = b"\n"
    with open_decompressed(path) as f:
        while line.isspace():
            line = f.readline(1 << 26)
    first_line = parse_json_line(line)
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
    delimiter = "\t" if ".tsv" in os.path.basename(path).lower() else ","
    with io.TextIOWrapper(
        open_decompressed(path), encoding="utf-8-sig", errors="surrogateescape", newline=""
    ) as f:
        names = next(csv.reader(f, delimiter=delimiter, strict=True), None)
        if names is None:
            return
        if not names:
            raise ValueError("its first line is empty")
        check_unique(names, columns)
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

    number = 0
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
                raise ValueError(f"row {number + 1}: {e}: its quotation has no end")
            number += 1
            yield UnreadableRow(f'{e}; in a field a " is written ""')
            continue
        number += bool(fields)
        if any(fields[len(names) :]):
            yield UnreadableRow("more fields than columns")
        elif fields:  # not an empty line
            yield dict.fromkeys(names) | dict(zip(names, fields, strict=False))


def read_parquet(path, columns, position):
    import pyarrow.parquet

    (num_done,) = position or (0,)
    number = 0
    # A buffer, or else all the bytes of a column are read at once.
    with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20) as f:
        wanted = wanted_columns(f.schema_arrow.names, columns)
        for i in range(f.num_row_groups):
            group = f.metadata.row_group(i)
            # Memory is bounded by bytes: some 4 MB of rows at a time.
            size = 0
            for column in map(group.column, range(group.num_columns)):
                if column.path_in_schema.partition(".")[0] in wanted:
                    size += column.total_uncompressed_size
            num_rows = min(1000, 1 + (group.num_rows << 22) // max(1, size))
            # Whole row groups that have been read already are skipped.
            if number + group.num_rows > num_done:
                batches = f.iter_batches(num_rows, row_groups=[i], columns=wanted)
                yield from rows_after(num_done, batches, wanted, number)
            number += group.num_rows


def read_arrow(path, columns, position):
    """A file that save_to_disk() of `datasets` writes: an Arrow stream, or a Feather file."""
    import pyarrow

    (num_done,) = position or (0,)
    number = 0
    with pyarrow.memory_map(path) as f:
        # The two formats begin differently.
        is_file = f.read(6) == b"ARROW1"
        f.seek(0)
        reader = pyarrow.ipc.open_file(f) if is_file else pyarrow.ipc.open_stream(f)
        wanted = wanted_columns(reader.schema.names, columns)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            # A batch is a view of the file: only the rows that become Python objects take memory.
            num_rows = 1 + (batch.num_rows << 22) // max(1, batch.nbytes)
            if number + batch.num_rows > num_done:
                starts = range(0, batch.num_rows, num_rows)
                slices = (batch.select(wanted).slice(start, num_rows) for start in starts)
                yield from rows_after(num_done, slices, wanted, number)
            number += batch.num_rows


def rows_after(num_done, batches, columns, number):
    """Yield (row, [its number]) of Arrow batches after row num_done; they start after `number`."""
    for batch in batches:
        for row in batch_rows(batch, columns):
            number += 1
            if number > num_done:
                yield row, [number]


def wanted_columns(names, columns):
    """The columns to read, of the names in a file: all of them if it has none of `columns`."""
    check_unique(names, columns)
    roots = [column.partition(".")[0] for column in columns]
    return [name for name in names if name in columns or name in roots] or names


def check_unique(names, columns):
    """Raise ValueError if several of a file's columns have the name of a text column."""
    # It would be a guess which of them holds the text.
    for name in columns:
        if names.count(name) > 1:
            raise ValueError(f"several columns are called {name!r}")


def batch_rows(batch, columns):
    """The rows of an Arrow batch, dicts, with the texts of `columns` as bytes, in UTF-8.

    So no str is made of a text that only goes to the tokenizer. A row with a text that is not UTF-8
    is an UnreadableRow.
    """
    import pyarrow

    arrays = []
    try:
        for name, array in zip(batch.schema.names, batch.columns, strict=True):
            type_name = str(array.type)
            if name in columns and type_name in TEXT_TYPES:
                # The same buffers, checked for UTF-8 (and a damaged .arrow file), as bytes.
                array = array.view(type_name.replace("binary", "string"))
                array.validate(full=True)
                array = array.view(type_name.replace("string", "binary"))
            arrays.append(array)
        return pyarrow.RecordBatch.from_arrays(arrays, batch.schema.names).to_pylist()
    except (ValueError, OverflowError) as e:
        if batch.num_rows == 1:
            return [UnreadableRow(f"not UTF-8, or not a value that Python has ({e})")]
    # Find the row, or rows, by taking each alone.
    rows = []
    for i in range(batch.num_rows):
        rows += batch_rows(batch.slice(i, 1), columns)
    return rows


def read_text_file(path, columns, position):
    """The documents of a text file; the long ones in parts, see Continuation."""
    start, is_continuation, number = position or (0, 0, 0)
    with open_decompressed(path, start) as f:
        # A document may start with a byte order mark, and a character may span two chunks.
        new_decoder = codecs.getincrementaldecoder("utf-8-sig")
        decoder = new_decoder()
        if is_continuation:
            decoder = codecs.getincrementaldecoder("utf-8")()
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
                decoder = new_decoder()
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


# -- readers by extension ------------------------------------------------------------
READERS = {
    ".txt": read_text_file,
    ".md": read_text_file,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}


# Those that check each text; the others let lone surrogates through.
UTF8_READERS = (read_text_file, read_parquet, read_arrow)


def find_reader(path):
    """The reader for a file, by its extension; None if there is none."""
    # data.jsonl.gz: the inner extension decides.
    stem, extension = os.path.splitext(path.lower())
    if extension not in (".gz", ".bz2", ".xz", ".zst"):
        return READERS.get(extension)
    reader = READERS.get(os.path.splitext(stem)[1])
    return None if reader in (read_parquet, read_arrow) else reader
