"""Hand-written replacements for torch operations that are slow or memory-hungry.

Each docstring gives the same mathematics in plain torch; the tests compare the two.
"""

from functools import partial
import math

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


# -- norms --------------------------------------------------------------------------
def rms_norm(x, weight, eps):
    """F.rms_norm over the last dimension, in float32 whatever the dtypes of x and weight (C,)."""
    weight = None if weight is None else weight.float()
    if x.device.type != "cpu" or not x.requires_grad:
        return F.rms_norm(x.float(), (x.size(-1),), weight, eps).to(x.dtype)
    y = RMSNormalize.apply(x.float(), eps)
    if weight is not None:
        y = y * weight
    return y.to(x.dtype)


class RMSNormalize(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) over the last dimension of x, which is float32.

    On CPUs every operation goes through memory: a step of `--preset=modern` takes 0.9 of the time
    with this (2 cores, T=1024). On GPUs torch.compile makes one kernel of F.rms_norm anyway.
    """

    @staticmethod
    def forward(ctx, x, eps):
        # vector_norm reads x once; x.square().mean() would write a tensor of its size first.
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.size(-1)
        scale = (mean_square + eps).rsqrt()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        # Scaling x does not change y, so the component of grad along y is removed.
        along_y = (grad * y).mean(dim=-1, keepdim=True)
        return grad.addcmul(y, along_y, value=-1).mul_(scale), None


def layer_norm(x, weight, bias, eps):
    """F.layer_norm over the last dimension; in float32 where x and weight differ in dtype.

    They do with FSDP's bfloat16 weights, and CPUs have no kernel for that.
    """
    shape = (x.size(-1),)
    if x.dtype == weight.dtype:
        return F.layer_norm(x, shape, weight, bias, eps)
    bias = None if bias is None else bias.float()
    return F.layer_norm(x.float(), shape, weight.float(), bias, eps).to(x.dtype)


# -- attention ----------------------------------------------------------------------
def attention(q, k, v, mask, is_causal):
    """F.scaled_dot_product_attention of q (B, nh, T, hs), k and v (B, nh, S, hs) -> (B, nh, T, hs).

    mask: bool, (T, S) or (B, 1, T, S), True where a query may attend. Without one, attention is
    causal if is_causal, or else full.
    """
    T, S = q.size(2), k.size(2)
    # torch's CPU kernel is slow for short rows in bfloat16. Written out, attention takes a third of
    # its time at T=128 and half at T=256 (torch 2.13, 2 cores), and a step of the demo 0.6 to 0.8.
    # It keeps the scores for the backward pass: training 124M at T=256 would need 15% more memory.
    max_T = 128 if q.requires_grad else 256
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < T <= max_T:
        scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)  # (B, nh, T, S)
        if mask is not None:
            scores.masked_fill_(~mask, -math.inf)
        elif is_causal:
            scores += torch.full((T, S), -math.inf, dtype=q.dtype).triu(1)
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal and mask is None)


# -- recomputation ------------------------------------------------------------------
# The outputs that run_block() saves: of matrix products, and of torch's attention kernels.
OPS_TO_SAVE = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


def run_block(block, x, *args, full=False):
    """block(x, *args), saving less for its backward pass, which computes the rest again.

    By default, the outputs of matrix products and attention are saved (selective activation
    checkpointing): a step of 124M takes 14 to 19% less memory in 0.99 to 1.09 of the time (2 cores,
    4,096 tokens). torch.compile does this itself, and for small tensors it is not worth the time:
    both get a plain call. With full=True only x is saved: the least memory, but all is computed
    twice.
    """
    if not torch.is_grad_enabled():
        return block(x, *args)
    kwargs = {"use_reentrant": False, "preserve_rng_state": False}  # there is no dropout
    if full:
        return checkpoint(block, x, *args, **kwargs)
    # Either the whole model is compiled, or each block (with FSDP).
    is_compiled = torch.compiler.is_compiling() or block._compiled_call_impl is not None
    if is_compiled or x.numel() < 1 << 21:
        return block(x, *args)
    contexts = partial(create_selective_checkpoint_contexts, OPS_TO_SAVE)
    return checkpoint(block, x, *args, **kwargs, context_fn=contexts)


# -- loss ---------------------------------------------------------------------------
def softcap_logits(logits, softcap):
    """softcap * tanh(logits / softcap), https://arxiv.org/abs/2408.00118; 0: no cap."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


class LinearCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(softcap_logits(x @ weight.T), targets), some rows at a time.

    The full logits would be by far the largest tensors of a small model. Each chunk's gradients are
    computed while its logits exist, as in Liger Kernel (https://arxiv.org/abs/2410.10989), so
    forward() computes the gradient of the summed loss, and backward() only scales it. Gradients are
    always off inside forward(): the caller says whether they are wanted. torch 2.13's
    F.linear_cross_entropy is not equal: it returns a bfloat16 loss, has no softcap and breaks the
    torch.compile graph.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, softcap, with_gradients):
        """x (N, C), weight (V, C), targets (N,) -> (loss, accuracy), both scalars, float32.

        A target of -1 is ignored. The loss is in nats. accuracy is the share of targets with the
        highest logit; it is only counted without gradients. Rows of weight from vocab_size on pad
        the vocabulary.
        """
        w = weight.to(x.dtype)
        valid = (targets >= 0)[:, None]
        loss = torch.zeros((), device=x.device)
        num_correct = torch.zeros((), device=x.device)
        dx = dw = None
        if with_gradients:
            dx = torch.empty_like(x)
            dw = torch.zeros_like(weight, dtype=torch.float32)
        chunk = rows_per_chunk(x, len(weight))
        for start in range(0, len(x), chunk):
            # Logits of this chunk, then log-probabilities.
            rows = slice(start, start + chunk)
            target = targets[rows, None].clamp(min=0)
            logits = softcap_logits(x[rows] @ w.t(), softcap)
            # The derivative of the softcap is 1 - tanh(z)^2, and tanh(z) is logits / softcap.
            dtanh = 1 - (logits / softcap) ** 2 if softcap and with_gradients else None
            logits[:, vocab_size:] = -math.inf
            logp = logits.log_softmax(dim=-1, dtype=torch.float32)
            del logits  # each of these tensors is large: free it before the next one is made
            loss -= (logp.gather(1, target) * valid[rows]).sum()
            if with_gradients:
                dlogits = softmax_minus_onehot(logp, target)
                del logp
                if dtanh is not None:
                    dlogits = dlogits * dtanh
                dlogits = dlogits.to(x.dtype)
                dx[rows] = matmul_in_slices(dlogits, w) * valid[rows]
                dw += weight_gradient(dlogits, x[rows] * valid[rows])
            else:
                predicted = logp.max(dim=-1, keepdim=True).indices
                num_correct += ((predicted == target) & valid[rows]).sum()
        count = valid.sum()
        ctx.save_for_backward(dx, dw, count)
        ctx.dtype = weight.dtype
        accuracy = num_correct / count
        ctx.mark_non_differentiable(accuracy)
        return loss / count, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        dx, dw, count = ctx.saved_tensors
        scale = grad / count
        return dx * scale, (dw * scale).to(ctx.dtype), None, None, None, None


def rows_per_chunk(x, vocab_rows):
    """The number of rows of x whose logits LinearCrossEntropy holds at a time."""
    rows = 256 if x.device.type == "cpu" else 8192
    if x.device.type == "mps":
        # Long products can be wrong there, https://github.com/pytorch/pytorch/issues/109457
        return rows
    return rows * 50304 // vocab_rows  # as many logits as with GPT-2's vocabulary


def softmax_minus_onehot(logp, target):
    """The gradient of the summed cross-entropy: exp(logp) (N, V), less 1 at target (N, 1)."""
    if torch.compiler.is_compiling() and logp.device.type != "cpu":
        # This form is fused with the softmax: a fifth of the bytes.
        return logp.exp() - (torch.arange(logp.size(1), device=logp.device) == target).float()
    return logp.exp_().scatter_add_(1, target, logp.new_full(target.shape, -1))


def matmul_in_slices(a, b):
    """a (N, V) @ b (V, C). On Apple's GPUs in slices of V.

    M1 and M2 give wrong sums of more than 32,767 terms,
    https://github.com/pytorch/pytorch/issues/193487
    """
    width = 32_000 if a.device.type == "mps" else len(b)
    products = [i @ j for i, j in zip(a.split(width, 1), b.split(width), strict=True)]
    return sum(products[1:], products[0])


def weight_gradient(dlogits, x):
    """dlogits (N, V)^T @ x (N, C). Scaled down in float16, where the sum over rows can overflow."""
    if x.dtype == torch.float16:
        return (dlogits.t() @ (x / 256)).float() * 256
    return dlogits.t() @ x
