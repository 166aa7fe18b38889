"""The micro-batches of a step: their size B, and prefetching them.

B is the largest that divides a step evenly and fits into memory. It changes memory and speed, not
the result: gradients add up over micro-batches.
"""

from concurrent.futures import ThreadPoolExecutor

from device import pick_autocast
from script import UserError, is_out_of_memory, print0
from training.distributed import all_true, on_all_ranks

import torch


def largest_micro_batch(max_B, is_exact, T, total_batch_size, world_size):
    """The largest B <= max_B such that a step is a whole number of micro-batches on each rank.

    Raises UserError if is_exact and that is not max_B.
    """
    # A step must be a whole number of rounds in which every rank has one micro-batch.
    unit = max_B * T * world_size
    if total_batch_size % unit == 0:
        return max_B
    fitting = [b for b in range(1, max_B + 1) if total_batch_size % (b * T * world_size) == 0]
    if fitting and not is_exact:
        print0(f"--B={fitting[-1]}, which divides the {total_batch_size} tokens of a step evenly")
        return fitting[-1]
    hint = f"--total_batch_size={max(1, round(total_batch_size / unit)) * unit}"
    if fitting:
        hint = f"--B={fitting[-1]}"
    raise UserError(
        f"--total_batch_size={total_batch_size} is not a multiple of B x T x processes = {max_B} x "
        f"{T} x {world_size} = {unit}; try {hint}"
    )


def fit_memory(setup, T, total_batch_size, dtype):
    """Halve B of a trainer's Setup until a micro-batch fits into the memory of every process."""

    def micro_step():
        # The first update will also need room for the state that optimizers do not have yet.
        optimizer_state = []  # held until after the backward pass, as the real one will be
        for opt in setup.optimizers:
            if not opt.state:
                params = [p for group in opt.param_groups for p in group["params"]]
                for p in params * opt.state_floats_per_param:
                    optimizer_state.append(torch.empty_like(p))
        x = torch.zeros(setup.B, T, dtype=torch.long, device=setup.device)
        y = x.clone()  # the same tensor twice would compile another graph
        with pick_autocast(dtype, setup.device, cache_weights=False):
            setup.train_model(x, y).backward()
        del optimizer_state

    # No gradient sync in DDP: a rank that runs out of memory would never reach it.
    setup.train_model.require_backward_grad_sync = False
    # Eager mode first: there, out of memory shows after a second, not after compiling for a minute.
    for stance in ("force_eager", "default"):
        with torch.compiler.set_stance(stance):
            # Halve B until it fits; if B=1 does not, the first step says so.
            while setup.B > 1 and not try_step(micro_step, setup.model):
                print0(f"out of memory with --B={setup.B}: halving it; the result stays the same")
                setup.B = largest_micro_batch(
                    setup.B // 2, False, T, total_batch_size, setup.world_size
                )


def try_step(fn, model):
    """Whether fn(), which computes gradients of model, fits into memory on every rank.

    All ranks call it. The gradients are dropped.
    """
    # All ranks must come to the same result, or they would use different batch sizes.
    fits = True
    try:
        fn()
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        fits = False
    model.zero_grad(set_to_none=True)
    fits = all_true(fits)
    if not fits:
        torch.compiler.reset()  # otherwise the next shape would be compiled as a dynamic one
    return fits


class BatchReader:
    """Reads a step's micro-batches from a MixtureLoader; a thread reads those of the next step.

    So a step does not wait for the disk, nor, on CUDA, for the copy into pinned memory.
    """

    def __init__(self, loader, device, rank, world_size):
        self.loader = loader
        self.rank = rank
        self.world_size = world_size
        self.is_cuda = device.startswith("cuda")
        self.prefetched = None  # (arguments of _read(), its future)
        # The thread pins memory for this process's GPU, not for the first one.
        kwargs = {}
        if self.is_cuda:
            kwargs["initializer"] = torch.cuda.set_device
            kwargs["initargs"] = (torch.cuda.current_device(),)
        self.pool = ThreadPoolExecutor(1, **kwargs)

    def read(self, first, count, B):
        """This rank's micro-batches of sequences first .. first + count - 1: tensors (B, T + 1).

        Raises UserError on all ranks if one of them cannot read a shard.
        """
        # At the start, and after a change of B, nothing has been prefetched.
        args = (first, count, B)
        if not self.prefetched or self.prefetched[0] != args:
            self._start(args)
        _, future = self.prefetched
        self.prefetched = None
        batches = on_all_ranks(future.result)
        # The next step, unless fineweb.py still has to write it. So no thread is reading when
        # the loader looks for new shards.
        if self.loader.is_written(first + 2 * count - 1):
            self._start((first + count, count, B))
        return batches

    def _start(self, args):
        self.prefetched = (args, self.pool.submit(self._read, *args))

    def _read(self, first, count, B):
        batches = []
        for batch in self.loader.batches(first, count, B, self.rank, self.world_size):
            batch = torch.from_numpy(batch)
            batches.append(batch.pin_memory() if self.is_cuda else batch)
        return batches

    def close(self):
        """End the thread."""
        self.pool.shutdown(cancel_futures=True)
