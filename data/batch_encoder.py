"""Documents to token ids, in several threads: with gigatoken if it is installed, or with tiktoken.

gigatoken (https://pypi.org/project/gigatoken) makes the same tokens ten times as fast. tiktoken
stays the reference: the start of each batch is checked with it.
"""

import collections
from concurrent.futures import ThreadPoolExecutor
import functools
import json
import threading

from data.readers import Continuation
from data.tokenizer import EOT, copy_encoding, encode, to_tokenizer_json
from script import UserError, num_cpus

import numpy as np


def gigatoken_encoder(enc):
    """encode(enc, text, allow_eot=True), with gigatoken, as a function of text; 10 times as fast.

    It also takes bytes, in UTF-8. None if gigatoken is not installed or does not know the
    tokenizer's pattern.
    """
    try:
        import gigatoken

        fast = gigatoken.Tokenizer.from_json(json.dumps(to_tokenizer_json(enc)))
    except (ImportError, RuntimeError, ValueError):
        return None

    def encode_text(text):
        try:
            # As a batch, since encode() holds the GIL.
            return np.asarray(fast.encode_batch([text], parallel=False)[0])
        except UnicodeEncodeError:
            return encode(enc, text, allow_eot=True)

    return encode_text


def encode_documents(texts, enc, encode_text):
    """The token ids of documents, each preceded by <|endoftext|>, as one array.

    texts are all str or all bytes. encode_text(text) encodes with <|endoftext|> as a token, with
    the tokenizer enc.
    """
    # Encode all texts in one call: 5% faster, since it takes the GIL once.
    eot = EOT
    if isinstance(texts[0], bytes):
        eot = EOT.encode()
    parts = []
    for text in texts:
        if not isinstance(text, Continuation):
            parts.append(eot)
        parts.append(text)
    ids = encode_text(eot[:0].join(parts))
    num_added = len(parts) - len(texts)
    if np.count_nonzero(ids == enc.eot_token) == num_added:
        return ids
    # A text contains a literal <|endoftext|>, which must not become a token: text by text.
    arrays = []
    for text in texts:
        if not isinstance(text, Continuation):
            arrays.append([enc.eot_token])
        arrays.append(encode(enc, to_str(text)))
    return np.concatenate(arrays)


def to_str(text):
    return text.decode() if isinstance(text, bytes) else text


def check_same_ids(text, enc, encode_text):
    """Raise UserError if encode_text(), gigatoken's, encodes a text differently from tiktoken."""
    found = encode_text(text)
    expected = encode(enc, text, allow_eot=True)
    if np.array_equal(found, expected):
        return
    # Show the place.
    size = min(len(found), len(expected))
    first = int(np.argmax(np.append(found[:size] != expected[:size], True)))
    place = enc.decode(expected[max(0, first - 5) : first + 5].tolist())
    raise UserError(f"gigatoken encodes {place!r} differently from tiktoken: use --engine=tiktoken")


def batch_documents(texts, batch_chars):
    """Yield lists of documents, of about batch_chars characters each."""
    batch = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= batch_chars:
            yield batch
            batch = []
            chars = 0
    if batch:
        yield batch


def tokenize(texts, enc, dtype, engine="auto", batch_chars=1 << 20):
    """Yield (tokens, state) for batches of about batch_chars characters of documents, in order.

    tokens is an array of token ids; state is what texts.state was after the last document, or None.
    Threads use all cores: the tokenizers release the GIL and return arrays, so nothing is pickled.
    At most four batches per core are in flight, so memory does not grow with the corpus.
    """
    local = threading.local()  # each thread's copy of enc

    def encode_batch(texts, gigatoken):
        # Rust's regex is fastest in the first thread that uses it: a copy per thread, 1.13 times
        # the speed.
        if not hasattr(local, "enc"):
            local.enc = copy_encoding(enc)
        encode_text = gigatoken or functools.partial(encode, local.enc, allow_eot=True)
        if gigatoken:
            # It is a young library: compare the start of each batch.
            check_same_ids(to_str(texts[0])[:2000], local.enc, gigatoken)
        # Only gigatoken takes bytes.
        if not gigatoken or not all(isinstance(text, bytes) for text in texts):
            texts = [to_str(text) for text in texts]
        return encode_documents(texts, local.enc, encode_text).astype(dtype)

    gigatoken = None
    num_threads = num_cpus()
    with ThreadPoolExecutor(num_threads) as pool:
        # Results are taken in the order in which the batches were submitted.
        in_flight = collections.deque()  # (future, state)
        for number, batch in enumerate(batch_documents(texts, batch_chars)):
            # gigatoken takes half a second to load: not for a small text.
            if number == 2 and engine == "auto":
                gigatoken = gigatoken_encoder(enc)
            future = pool.submit(encode_batch, batch, gigatoken)
            in_flight.append((future, getattr(texts, "state", None)))
            if len(in_flight) > 4 * num_threads:
                future, state = in_flight.popleft()
                yield future.result(), state
        for future, state in in_flight:
            yield future.result(), state
