"""How likely are completions of a text: what hellaswag.py, ewok.py and other evals of this kind ask of a model."""

from parallel import any_shape

import numpy as np
import torch
from torch.nn import functional as F


def rows_to_score(pairs, block_size):
    """[(context, {completion: [numbers of its pairs]})] of pairs, all as tuples, the longest first.

    Completions of one context share a row. One that is longer than block_size is cut into pieces, each scored behind
    the last; a context that is too long loses its beginning.
    """
    rows = {}
    for i, (context, completion) in enumerate(pairs):
        size = len(completion) if len(completion) <= block_size else max(1, block_size // 2)
        for start in range(0, len(completion), size):
            piece = completion[start : start + size]
            past = (*context, *completion[:start])[-(block_size + 1 - len(piece)) :]
            rows.setdefault(past, {}).setdefault(tuple(piece), []).append(i)
    return sorted(rows.items(), key=row_length, reverse=True)


def row_length(row):
    """The tokens that the model reads of a row: the last one of a completion is only predicted."""
    return len(row[0]) + sum(len(piece) - 1 for piece in row[1])


def batch_to_score(rows):
    """(inputs, predictions, owners), int64 arrays, of rows of rows_to_score, of which the first is the longest.

    inputs (3, B, T): token ids, their positions, and the branch of each, 0 for the context, k for the k-th completion.
    predictions (2, N): a place in the flattened B x T, and the token that follows it. owners (2, M): the number of a
    pair, and a prediction that counts for it.
    """
    T = row_length(rows[0])
    inputs = np.zeros((3, len(rows), T), dtype=np.int64)
    places, targets, pairs, counted = [], [], [], []
    for b, (context, pieces) in enumerate(rows):
        n = len(context)
        ids, positions, branch = [*context], [*range(n)], [0] * n
        for k, (piece, numbers) in enumerate(pieces.items(), start=1):
            start = b * T + len(ids)
            for number in numbers:
                pairs += [number] * len(piece)
                counted += range(len(targets), len(targets) + len(piece))
            places += [b * T + n - 1, *range(start, start + len(piece) - 1)]
            targets += piece
            ids += piece[:-1]
            positions += range(n, n + len(piece) - 1)
            branch += [k] * (len(piece) - 1)
        inputs[:, b, : len(ids)] = ids, positions, branch
    return inputs, np.array([places, targets]), np.array([pairs, counted])


@any_shape()
@torch.no_grad()
def score_completions(model, pairs, batch_tokens=0):
    """Log-probabilities of completions, given their contexts.

    pairs: (context, completion) lists of token ids, neither empty. Returns (sums, counts), tensors of len(pairs): the
    log-probability of each completion in nats (float64), and its number of tokens. A context that is too long loses its
    beginning. Runs under the autocast of the caller.

    Completions of one context share a row, so that the context is read once: each follows it at the same positions, and
    a mask keeps them from seeing each other. Rows of similar length make a batch of up to batch_tokens tokens; 0 is
    16,384, or 1,024 on a CPU, where large batches are slower (124M, bfloat16, 2 cores: 2.8 times with 16,384).
    """
    device = model.lm_head.weight.device
    batch_tokens = batch_tokens or (1024 if device.type == "cpu" else 16384)
    rows, scored = rows_to_score(pairs, model.config.block_size), []
    while rows:
        B = max(1, batch_tokens // row_length(rows[0]))
        inputs, predictions, owners = batch_to_score(rows[:B])
        rows = rows[B:]
        idx, positions, branch = torch.from_numpy(inputs).to(device)
        places, targets = torch.from_numpy(predictions).to(device)
        mask = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
        mask = mask.tril()[:, None]  # (B, 1, T, T)
        x = model.hidden(idx, positions=positions, mask=mask).flatten(0, 1)[places]  # (N, C)
        losses = [
            F.cross_entropy(model.logits(part).float(), t, reduction="none")
            for part, t in zip(x.split(512), targets.split(512), strict=True)
        ]
        scored.append((owners, torch.cat(losses)))  # not read before all are under way: a GPU need not wait
    sums = np.zeros(len(pairs))
    for (numbers, counted), losses in scored:
        np.subtract.at(sums, numbers, losses.cpu().double().numpy()[counted])  # MPS has no float64
    return torch.from_numpy(sums), torch.tensor([len(completion) for _, completion in pairs])
