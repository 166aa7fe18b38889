"""Operations whose backward pass is written out, RMSNorm and the loss: it does less, or keeps less, than autograd's."""

import math

import torch
from torch.autograd.function import once_differentiable


class RMSNormalize(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) over the last dimension of x, float32.

    For CPUs, where every operation goes through memory: with this a step of `--preset=modern` takes 0.9 of the time (2
    cores, T=1024). On GPUs torch.compile makes one kernel of it anyway.
    """

    @staticmethod
    def forward(ctx, x, eps):
        scale = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.size(-1) + eps).rsqrt()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        return grad.addcmul(y, (grad * y).mean(dim=-1, keepdim=True), value=-1).mul_(scale), None


def capped(logits, softcap):
    """softcap tanh(logits / softcap), https://arxiv.org/abs/2408.00118; the logits themselves where it is 0."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


class LinearCrossEntropy(torch.autograd.Function):
    """The mean cross-entropy of logits x @ weight.T, some rows at a time; the logits are never whole.

    In whole they are the largest tensors of a small model, several times over. Each part's gradients are worked out
    while its logits are there, as in Liger Kernel (https://arxiv.org/abs/2410.10989).
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, softcap, with_gradients):
        """x (N, C), weight (rows, C), targets (N,), -1 for none -> (loss, accuracy), both scalars, float32.

        loss is in nats, accuracy the share of targets with the highest logit: not counted with_gradients.
        """
        size = 256 if x.device.type == "cpu" else 8192  # rows of GPT-2's vocabulary;
        if x.device.type != "mps":  # whose long products can be wrong, https://github.com/pytorch/pytorch/issues/109457
            size = size * 50304 // len(weight)  # of a smaller one as many logits, which are more rows
        w, keep = weight.to(x.dtype), (targets >= 0)[:, None]
        loss, right = torch.zeros(2, device=x.device)
        dx = dw = None
        if with_gradients:
            dx, dw = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        for i in range(0, len(x), size):
            part = slice(i, i + size)
            p = capped(x[part] @ w.t(), softcap)  # logits, then probabilities, then gradients: none outlives its use
            slope = 1 - (p / softcap) ** 2 if softcap and with_gradients else None  # of the cap
            p[:, vocab_size:] = -math.inf  # the rows that pad the vocabulary
            p = p.log_softmax(dim=-1, dtype=torch.float32)
            target = targets[part, None].clamp(min=0)
            loss -= (p.gather(1, target) * keep[part]).sum()
            if not with_gradients:
                right += ((p.max(dim=-1, keepdim=True).indices == target) & keep[part]).sum()
            else:  # of the sum over rows: softmax minus one-hot
                if torch.compiler.is_compiling() and x.device.type != "cpu":
                    # One kernel with the softmax: a fifth of the bytes.
                    p = p.exp() - (torch.arange(len(weight), device=x.device) == target).float()
                else:
                    p = p.exp_().scatter_add_(1, target, p.new_full(target.shape, -1))
                p = (p if slope is None else p * slope).to(x.dtype)
                # Apple's M1 and M2 go wrong beyond 32,767 addends, https://github.com/pytorch/pytorch/issues/193487
                width = 32_000 if x.device.type == "mps" else len(w)
                products = [a @ b for a, b in zip(p.split(width, 1), w.split(width), strict=True)]
                dx[part] = sum(products[1:], products[0]) * keep[part]
                rows = x[part] * keep[part]
                if x.dtype == torch.float16:  # whose range the sum over the rows can leave
                    dw += (p.t() @ (rows / 256)).float() * 256
                else:
                    dw += p.t() @ rows
        count = keep.sum()
        ctx.save_for_backward(dx, dw, count)
        ctx.dtype = weight.dtype
        accuracy = right / count
        ctx.mark_non_differentiable(accuracy)
        return loss / count, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        dx, dw, count = ctx.saved_tensors
        return dx * (grad / count), (dw * (grad / count)).to(ctx.dtype), None, None, None, None
