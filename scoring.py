"""Log-likelihood of completions given a context, used by hellaswag.py and ewok.py.

Completions of the same context share a row: the context is read once, each completion follows it at
the same positions, and a mask keeps completions from attending to one another. That makes scoring
HellaSwag 2 to 5 times as fast as one row per completion.
"""

from device import eager_mode

import numpy as np
import torch
from torch.nn import functional as F


class Row:
    """A context and the completions that follow it, {tokens: indices of the pairs they are of}.

    For the context a b and the completions c d and e, a row reads the tokens a b c (d and e are
    only predicted), at the positions 0 1 2, in the segments 0 0 1.
    """

    def __init__(self, context):
        self.context = context
        self.completions = {}

    def __len__(self):
        """The number of tokens to read: a completion's last token is only predicted."""
        return len(self.context) + sum(len(tokens) - 1 for tokens in self.completions)


def build_rows(pairs, block_size):
    """The Rows of (context, completion) pairs, the longest first.

    A context that is too long loses its beginning. A completion longer than block_size is cut into
    pieces; the context of each is the pieces before it.
    """
    rows = {}
    for i, (context, completion) in enumerate(pairs):
        size = len(completion)
        if size > block_size:
            size = max(1, block_size // 2)
        # Usually there is one piece.
        for start in range(0, len(completion), size):
            piece = tuple(completion[start : start + size])
            before = (*context, *completion[:start])
            before = before[-(block_size + 1 - len(piece)) :]
            row = rows.setdefault(before, Row(before))
            row.completions.setdefault(piece, []).append(i)
    return sorted(rows.values(), key=len, reverse=True)


class Batch:
    """Rows as arrays, padded to the first one, which is the longest.

    tokens, positions, segments   (B, T); the segment of a context is 0, of its k-th completion k
    predictors, targets           lists of N: an index into the flattened (B, T), and the token that
                                  the model predicts there
    slices                        (pair_ids, slice): the targets of a completion, and whose it is
    """

    def __init__(self, rows):
        T = len(rows[0])
        self.tokens, self.positions, self.segments = np.zeros((3, len(rows), T), dtype=np.int64)
        self.predictors = []
        self.targets = []
        self.slices = []
        for b, row in enumerate(rows):
            n = len(row.context)
            self.tokens[b, :n] = row.context
            self.positions[b, :n] = range(n)
            end = n
            for k, (completion, pair_ids) in enumerate(row.completions.items(), start=1):
                # Its last token is not read. Each completion continues the context's positions.
                start = end
                end = start + len(completion) - 1
                self.tokens[b, start:end] = completion[:-1]
                self.positions[b, start:end] = range(n, n + len(completion) - 1)
                self.segments[b, start:end] = k
                # The context's last token predicts the first target, each token the one after it.
                first_target = len(self.targets)
                self.predictors += [b * T + n - 1, *range(b * T + start, b * T + end)]
                self.targets += completion
                self.slices.append((pair_ids, slice(first_target, len(self.targets))))


@eager_mode()
@torch.no_grad()
def score_completions(model, pairs, batch_tokens=0):
    """Log-probabilities of completions, given their contexts.

    pairs: (context, completion) lists of token ids, neither empty. Returns (sums, counts), tensors
    of len(pairs): the log-probability of each completion in nats (float64), and its number of
    tokens. A context that is too long loses its beginning. Runs under the caller's autocast.

    Rows of similar length form batches of up to batch_tokens tokens; 0 means 16,384, or 1,024 on a
    CPU, where larger batches are slower (124M, bfloat16, 2 cores: 16,384 takes 2.8 times as long).
    """
    device = model.lm_head.weight.device
    if not batch_tokens:
        batch_tokens = 1024 if device.type == "cpu" else 16384
    # The longest rows first: a batch that is too large for memory fails at once.
    rows = build_rows(pairs, model.config.block_size)
    results = []
    while rows:
        B = max(1, batch_tokens // len(rows[0]))
        batch = Batch(rows[:B])
        rows = rows[B:]
        # No .item() in this loop, so the GPU is never waited for.
        results.append((batch, token_losses(model, batch)))
    sums = torch.zeros(len(pairs), dtype=torch.float64)
    for batch, losses in results:
        losses = losses.cpu().double()  # .cpu() first, since MPS has no float64
        for pair_ids, targets in batch.slices:
            for i in pair_ids:  # the same pair can be in a batch several times
                sums[i] -= losses[targets].sum()
    counts = torch.tensor([len(completion) for _, completion in pairs])
    return sums, counts


def token_losses(model, batch):
    """The loss of each target of a Batch, (N,), in nats."""
    device = model.lm_head.weight.device
    arrays = (batch.tokens, batch.positions, batch.segments)
    tokens, positions, segments = (torch.from_numpy(array).to(device) for array in arrays)
    predictors = torch.tensor(batch.predictors, device=device)
    targets = torch.tensor(batch.targets, device=device)
    # A token attends to the context, and to its own completion: (B, T, T).
    in_context = segments[:, None, :] == 0
    in_same_segment = segments[:, None, :] == segments[:, :, None]
    mask = (in_context | in_same_segment).tril()[:, None]  # (B, 1, T, T)
    x = model.hidden(tokens, positions=positions, mask=mask)  # (B, T, C)
    x = x.flatten(0, 1)[predictors]  # (N, C)
    # The logits of 512 positions at a time: they are the largest tensors.
    losses = []
    for part, part_targets in zip(x.split(512), targets.split(512), strict=True):
        logits = model.logits(part).float()
        losses.append(F.cross_entropy(logits, part_targets, reduction="none"))
    return torch.cat(losses)
