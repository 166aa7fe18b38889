"""AdamW, and Muon for the matrices of the blocks.

Each entry of OPTIMIZERS is a class that provides what the trainer, the checkpoints and fit_memory()
in micro_batch.py need to know about it:

configure(model, weight_decay, lr, betas)   a list of optimizers that together update the model
hyperparameters_at(step)                    options of its groups that change during a run
state_floats_per_param                      the size of its state, in floats per parameter
scales_with_size                            whether the learning rate and weight decay of a preset
                                            follow the width and length of a run (schedule.py)

The state of a parameter must hold a tensor, or torch's checkpoints cannot store it. A parameter
group can have an `lr_scale`, by which the trainer multiplies the learning rate. Muon
also has consolidate_state(), since its state is spread over ranks.
"""

from training.distributed import is_dtensor, shard_like

import torch
import torch.distributed as dist

EMBEDDING_LR_SCALE = 80  # 80 * 3.6e-3 is about the embedding's rate in nanochat, 0.3


class AdamW(torch.optim.AdamW):
    """As in the GPT-3 paper: weight decay on matrices and embeddings, none on biases and norms."""

    state_floats_per_param = 2
    scales_with_size = False

    @classmethod
    def configure(cls, model, weight_decay, lr, betas):
        matrices, vectors, embedding_groups = split_parameters(model, model.parameters())
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
            *embedding_groups,
        ]
        return [cls(groups, lr=lr, betas=betas, eps=1e-8, fused=True)]

    @staticmethod
    def hyperparameters_at(step):
        return {}


def split_parameters(model, parameters):
    """(matrices, vectors, groups for an untied embedding) of parameters of a model.

    An untied embedding has no weight decay and EMBEDDING_LR_SCALE times the learning rate, since a
    step has gradients for only a few of its rows.
    """
    # A tied embedding is also the output layer, which has gradients for all of its rows.
    embedding = None if model.config.tie_embeddings else model.transformer.wte.weight
    others = [p for p in parameters if p is not embedding]
    matrices = [p for p in others if p.dim() >= 2]
    vectors = [p for p in others if p.dim() < 2]
    groups = []
    if embedding is not None:
        group = {"params": [embedding], "weight_decay": 0.0, "lr_scale": EMBEDDING_LR_SCALE}
        groups.append(group)
    return matrices, vectors, groups


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonalized updates: https://kellerjordan.github.io/posts/muon.

    The gradient of a matrix is dominated by a few directions. Orthogonalizing it makes all of its
    singular values equal, so that rare directions are learned as fast as the common ones.

    NorMuon (https://arxiv.org/abs/2510.05491): each neuron's update is then divided by its running
    RMS, and the whole matrix rescaled to its former norm. A neuron is a row or, in a wide matrix, a
    column (nanochat's choice). The RMS of an update is that of AdamW's, about 0.2, so that the same
    learning rate and weight decay suit both (https://arxiv.org/abs/2502.16982).

    A parameter can hold several matrices, one above the other, that are orthogonalized separately
    (a group's num_matrices; each must be at least as tall as it is wide, if there are several).
    Matrices of the same shape, up to transposition, are batched.

    With DDP, rank r updates every world_size-th matrix, starting at r, and sends it to the others.
    With FSDP every rank computes the update of every matrix.
    """

    state_floats_per_param = 1  # plus one float per neuron
    scales_with_size = True

    def __init__(self, groups, lr, weight_decay, momentum=0.95, num_matrices=1):
        # torch's Optimizer keeps the options of each group.
        defaults = {"lr": lr, "weight_decay": weight_decay}
        defaults |= {"momentum": momentum, "num_matrices": num_matrices}
        super().__init__(groups, defaults)

    @classmethod
    def configure(cls, model, weight_decay, lr, betas):
        """[AdamW, Muon]. Muon has the blocks' matrices, and their weight decay."""
        # The four matrices of each block, by name.
        blocks = model.transformer.h
        fc_matrices = 2 if model.config.mlp == "swiglu" else 1
        groups = [
            {"params": [b.attn.c_attn.weight for b in blocks], "num_matrices": 3},  # q, k, v
            {"params": [b.mlp.c_fc.weight for b in blocks], "num_matrices": fc_matrices},
            {"params": [b.attn.c_proj.weight for b in blocks]},
            {"params": [b.mlp.c_proj.weight for b in blocks], "lr_scale": 0.5},  # docs/modern.md
        ]
        # All other parameters are AdamW's, without weight decay.
        muon_ids = {id(p) for group in groups for p in group["params"]}
        others = [p for p in model.parameters() if id(p) not in muon_ids]
        matrices, vectors, embedding_groups = split_parameters(model, others)
        adamw_groups = [
            {"params": matrices, "weight_decay": 0.0},
            {"params": vectors, "weight_decay": 0.0},
            *embedding_groups,
        ]
        adamw = AdamW(adamw_groups, lr=lr, betas=betas, eps=1e-10, fused=True)
        return [adamw, cls(groups, lr, weight_decay)]

    @staticmethod
    def hyperparameters_at(step):
        """Momentum warms up from 0.85 to 0.95 in 300 steps, as in modded-nanogpt."""
        return {"momentum": 0.85 + 0.1 * min(1, step / 300)}

    @staticmethod
    def init_state(p):
        """Fresh state: running means of the gradients, and of each neuron's squared update."""
        return {
            "momentum_buffer": torch.zeros_like(p),
            "second_momentum_buffer": torch.zeros(max(p.shape), device=p.device),
        }

    @torch.no_grad()
    def step(self, closure=None):
        rank, world_size = rank_and_world_size()
        # With DDP each rank has all gradients, and updates its share of the matrices.
        split = self.params_by_rank()
        owner = {p: i % world_size for i, p in enumerate(split)}  # if empty, all are this rank's
        # Matrices of one shape are orthogonalized in one batch.
        by_shape = {}  # {(m, n) with m <= n: the parameters whose matrices are (m, n) or (n, m)}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and owner.get(p, rank) == rank:
                    shape = sorted((p.size(0) // group["num_matrices"], p.size(1)))
                    by_shape.setdefault(tuple(shape), []).append((p, group))
        for (m, n), same_shape in by_shape.items():
            # At most 64 MB of updates at a time (192 MB for c_attn): they are copied twice.
            count = max(1, 2**25 // (m * n))
            for start in range(0, len(same_shape), count):
                self._update(same_shape[start : start + count])
        self._broadcast(split)

    def _update(self, same_shape):
        """One update of (parameter, group) pairs whose matrices have the same shape, m <= n."""
        updates = []  # (num_matrices, m, n)
        second_moments = []
        for p, group in same_shape:
            state = self.state[p]
            if not state:
                state.update(self.init_state(p))
            # Nesterov momentum.
            momentum_buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(momentum_buffer, group["momentum"]).bfloat16()
            if is_dtensor(update):
                update = update.full_tensor()
            # Separate the matrices of a parameter, and transpose the tall ones, so that m <= n.
            update = update.unflatten(0, (group["num_matrices"], -1))
            updates.append(update.mT if is_tall(p, group) else update)
            second_moments.append(state["second_momentum_buffer"])

        # Orthogonalize them, and balance the neurons.
        X = orthogonalize(torch.cat(updates))
        X = X * normuon_scale(X, second_moments).bfloat16()
        scale = 0.2 * X.size(2) ** 0.5  # to an RMS of 0.2: an orthogonal X has X.size(2) ** -0.5
        parts = X.split([len(update) for update in updates])
        for (p, group), update in zip(same_shape, parts, strict=True):
            if is_tall(p, group):
                update = update.mT
            # Decoupled weight decay, then the update.
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(shard_like(p, update.flatten(0, 1)), alpha=-group["lr"] * scale)

    # -- work split over ranks ----------------------------------------------------------
    def params_by_rank(self):
        """The parameters whose updates are split over ranks, the largest first; none with FSDP."""
        if not dist.is_initialized():
            return []
        params = [p for group in self.param_groups for p in group["params"]]
        # The largest first, so that ranks get about the same work.
        return sorted((p for p in params if not is_dtensor(p)), key=torch.numel, reverse=True)

    @torch.no_grad()
    def _broadcast(self, tensors):
        """Send tensor i from rank i % world_size, which has updated it, to all others."""
        _, world_size = rank_and_world_size()
        works = []
        for i, tensor in enumerate(tensors):
            works.append(dist.broadcast(tensor, i % world_size, async_op=True))
        for work in works:
            work.wait()

    def consolidate_state(self):
        """Give every rank the state of all parameters, for a checkpoint. All ranks call it."""
        split = self.params_by_rank()
        for p in split:
            if not self.state[p]:
                self.state[p].update(self.init_state(p))
        for key in ("momentum_buffer", "second_momentum_buffer"):
            self._broadcast([self.state[p][key] for p in split])


def rank_and_world_size():
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_tall(p, group):
    """Whether the matrices of a parameter have at least as many rows as columns."""
    return p.size(0) // group["num_matrices"] >= p.size(1)


def orthogonalize(X):
    """U V^T of each matrix U S V^T of X (N, m, n), m <= n, bfloat16; singular values 0.7 to 1.2.

    By five Newton-Schulz iterations with the coefficients of
    https://kellerjordan.github.io/posts/muon.
    """
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        # An odd polynomial of X, which pushes its singular values towards 1.
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)
    return X


def normuon_scale(X, second_moments, beta2=0.95):
    """One factor for each column (neuron) of X (N, m, n): (N, 1, n).

    second_moments: tensors, N n values in all, of the running means of the columns' squared norms,
    which are updated in place. Only their ratios matter, so they can start at zero.
    """
    # Update the running means with this step's squares, column by column.
    squared_norms = X.square().sum(dim=1, keepdim=True, dtype=torch.float32)  # (N, 1, n)
    sizes = [len(running_mean) for running_mean in second_moments]
    columns = zip(second_moments, squared_norms.flatten().split(sizes), strict=True)
    for running_mean, values in columns:
        running_mean.lerp_(values, 1 - beta2)
    scale = torch.cat(second_moments).view_as(squared_norms).clamp(min=1e-20).rsqrt()
    # Rescale, so that the norm of the whole matrix stays what it was.
    norm_before = squared_norms.sum(dim=(1, 2), keepdim=True)
    norm_after = (squared_norms * scale.square()).sum(dim=(1, 2), keepdim=True)
    return scale * (norm_before / norm_after.clamp(min=1e-20)).sqrt()


OPTIMIZERS = {"adamw": AdamW, "muon": Muon}


def configure_optimizers(model, weight_decay, lr, betas=(0.9, 0.95), optimizer="adamw"):
    """The optimizers that together update a GPT, a list; optimizer is a key of OPTIMIZERS."""
    return OPTIMIZERS[optimizer].configure(model, weight_decay, lr, betas)
