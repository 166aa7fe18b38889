"""AdamW, and Muon for the matrices of the blocks."""

from parallel import divided_like, is_divided

import torch


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update of a matrix is made orthogonal: https://kellerjordan.github.io/posts/muon.

    Each neuron, a row of the matrix or, where that is wide, a column, then gets updates of one size: its own is divided
    by the root mean square of its latest ones (NorMuon, https://arxiv.org/abs/2510.05491, with nanochat's choice of
    rows or columns), and the whole gets back the size it had. That size is what AdamW's updates have, so that one
    learning rate and one weight decay serve both (https://arxiv.org/abs/2502.16982).

    A parameter can hold several matrices, one above the other, each of which is made orthogonal by itself (a group's
    `parts`). Those of one shape, lying or standing, are worked on together.
    """

    def __init__(self, groups, lr, weight_decay, momentum=0.95, parts=1):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": parts})

    @torch.no_grad()
    def step(self):
        alike = {}  # {(m, n) with m <= n: the parameters whose matrices are (m, n) or (n, m)}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:  # the others are other processes' work
                    sides = sorted((p.size(0) // group["parts"], p.size(1)))
                    alike.setdefault(tuple(sides), []).append((p, group))
        for (m, n), members in alike.items():
            count = max(1, 2**25 // (m * n))  # at a time: tensors of 64 MB, or three times that with three parts each
            for start in range(0, len(members), count):
                self.update(members[start : start + count])

    @staticmethod
    def empty_state(p):
        """Means of a parameter's gradients, and of its neurons' squared updates; several parts are not wide."""
        return {"momentum_buffer": torch.zeros_like(p), "neuron_squares": torch.zeros(max(p.shape), device=p.device)}

    def update(self, members):
        """One update of (parameter, group) pairs whose matrices have the same two sides, m <= n."""
        matrices, squares = [], []
        for p, group in members:
            if "neuron_squares" not in self.state[p]:  # in a run of before NorMuon, which has only the other
                self.state[p] = self.empty_state(p) | self.state[p]
            mean = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(mean, group["momentum"]).bfloat16()
            update = (update.full_tensor() if is_divided(update) else update).unflatten(0, (group["parts"], -1))
            matrices.append(update if update.size(1) < update.size(2) else update.mT)  # (parts, m, n)
            squares.append(self.state[p]["neuron_squares"])
        X = orthogonal(torch.cat(matrices))
        X = X * neuron_shares(X, squares).bfloat16()
        size = 0.2 * X.size(2) ** 0.5  # AdamW's updates have a root mean square of about 0.2
        for (p, group), update in zip(members, X.split([len(x) for x in matrices]), strict=True):
            update = update if p.size(0) < p.size(1) else update.mT
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(divided_like(p, update.flatten(0, 1)), alpha=-group["lr"] * size)


def orthogonal(X):
    """U V^T of each matrix U S V^T of X (N, m, n), m <= n, bfloat16, roughly: singular values between 0.7 and 1.2.

    By five Newton-Schulz iterations with the coefficients of https://kellerjordan.github.io/posts/muon.
    """
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)
    return X


def neuron_shares(X, squares, beta2=0.95):
    """Factors (N, 1, n) for the columns of matrices X (N, m, n), which are the updates of a neuron each.

    squares are tensors of the running means of the columns' squares, N n values in all, which take up those of now.
    Only their ratios matter, so that they may begin at zero.
    """
    now = X.square().sum(dim=1, keepdim=True, dtype=torch.float32)
    for mean, values in zip(squares, now.flatten().split([len(x) for x in squares]), strict=True):
        mean.lerp_(values, 1 - beta2)
    shares = torch.cat(squares).view_as(now).clamp(min=1e-20).rsqrt()
    before, after = (x.sum(dim=(1, 2), keepdim=True) for x in (now, now * shares.square()))
    return shares * (before / after.clamp(min=1e-20)).sqrt()


def configure_optimizers(model, weight_decay, lr, betas=(0.9, 0.95), optimizer="adamw"):
    """[AdamW], as in the GPT-3 paper; or [AdamW, Muon], where Muon has the matrices of a GPT's blocks.

    Weight decay is on matrices and embeddings; with "muon" on its matrices alone. "muon" makes queries, keys and values
    (and the two layers in of SwiGLU) orthogonal one by one, and gives the way out of an MLP half the learning rate;
    "muon1" does neither: it is torch's, which runs of old have. An embedding that is not the output layer has no weight
    decay and 80 times the learning rate, as in modded-nanogpt and nanochat: a step has gradients of few of its rows. A
    group's `lr_share` is what the trainer multiplies the learning rate of a step by.
    """
    named = dict(model.transformer.h.named_parameters()) if optimizer != "adamw" else {}
    hidden = {name: p for name, p in named.items() if p.dim() == 2}
    alone = [] if model.config.tied else [model.transformer.wte.weight]
    elsewhere = {id(p) for p in (*hidden.values(), *alone)}
    rest = [p for p in model.parameters() if id(p) not in elsewhere]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": 0.0 if optimizer == "muon" else weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},  # biases and norms
    ]
    groups += [{"params": alone, "weight_decay": 0.0, "lr_share": 80}] if alone else []
    eps = 1e-10 if optimizer == "muon" else 1e-8
    adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    if optimizer == "adamw":
        return [adamw]
    if optimizer == "muon1":
        how = {"momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
        return [adamw, torch.optim.Muon(hidden.values(), lr, weight_decay, **how)]
    kinds = {"attn.c_attn": {"parts": 3}, "mlp.c_fc": {"parts": 2 if model.config.mlp == "swiglu" else 1}}
    kinds |= {"attn.c_proj": {}, "mlp.c_proj": {"lr_share": 0.5}}
    groups = [{"params": [p for name, p in hidden.items() if kind in name]} | how for kind, how in kinds.items()]
    return [adamw, Muon(groups, lr, weight_decay)]
