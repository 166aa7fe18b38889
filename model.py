"""GPT-2: the model, how it generates, and how its weights are loaded; functions.py has the arithmetic of its loss.

Architecture and initialisation follow OpenAI's release (https://github.com/openai/gpt-2) and the GPT-2 and GPT-3
papers: learned positions, pre-LayerNorm with bias, tanh-GELU, fused QKV, tied embeddings. State-dict names are those of
Hugging Face's GPT2LMHeadModel; given the same weights so are the logits. GPTConfig's later fields each exchange one of
these parts for what came after it; the defaults are GPT-2.

    model = GPT(GPTConfig(n_layer=12, n_head=12, n_embd=768))          # fresh weights
    model, enc = load_model("latest")                                  # newest log/model_*.pt
    model, enc = load_model("gpt2-xl")                                 # OpenAI's weights
"""

from dataclasses import dataclass, replace
from functools import partial
import math
import os
import re
import sys

from functions import LinearCrossEntropy, RMSNormalize, capped
from parallel import is_rank_0
from tokenizer import load_tokenizer
from weights import OPENAI_MODELS, download_model, find_checkpoint, read_checkpoint, read_hugging_face, tokenizer_beside

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    pos: str = "learned"  # or rope
    norm: str = "layernorm"  # or rmsnorm, weightless (RMSNorm without weights)
    mlp: str = "gelu"  # or swiglu, relu2
    qk_norm: bool = False  # RMSNorm on each head's queries and keys
    bias: bool = True  # in linear layers and LayerNorms
    embd_norm: bool = False  # a norm behind the embeddings
    softcap: float = 0.0  # logits z become softcap tanh(z / softcap); 0: they stay
    zero_init: bool = False  # the layers that lead back into the stream begin at zero
    tied: bool = True  # the output layer is the embedding


class RMSNorm(nn.RMSNorm):
    """https://arxiv.org/abs/1910.07467, in float32 whatever the input and the weight are."""

    def forward(self, x):
        weight = None if self.weight is None else self.weight.float()
        if x.device.type != "cpu" or not x.requires_grad:
            return F.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x.dtype)
        y = RMSNormalize.apply(x.float(), self.eps)
        return (y if weight is None else y * weight).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """In float32 where input and weight differ, as with FSDP's bfloat16 weights: CPUs have no kernel for that."""

    def forward(self, x):
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), bias, self.eps).to(x.dtype)


def new_norm(config, size):
    """The LayerNorm or RMSNorm of a model, over vectors of `size`."""
    if config.norm == "layernorm":
        return LayerNorm(size, bias=config.bias)
    return RMSNorm(size, eps=1e-5) if config.norm == "rmsnorm" else RMSNorm(size, eps=1e-6, elementwise_affine=False)


def rotation(positions, head_size):
    """cos and sin (..., T, head_size / 2), float32, of rotary embeddings at positions (..., T).

    https://arxiv.org/abs/2104.09864, with base 10,000 and, as Llama has it, the two halves of a head paired.
    """
    frequency = 10_000 ** -(torch.arange(0, head_size, 2, device=positions.device) / head_size)
    angle = positions[..., None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the pairs of x (B, nh, T, hs) by their angles, (T, hs / 2) or (B, 1, T, hs / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend(q, k, v, mask, causal):
    """softmax(q k' / sqrt(hs)) v of q (B, nh, T, hs), k and v (B, nh, S, hs) -> (B, nh, T, hs).

    mask, (T, S) or (B, 1, T, S), is False where a score does not count; without it all count, or, if causal, those up
    to the diagonal.
    """
    T, S = q.size(2), k.size(2)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < T <= (128 if q.requires_grad else 256):
        # torch's kernel for CPUs is slow at short rows in bfloat16: written out, attention takes a third of its time at
        # T=128 and half at T=256 (torch 2.13, 2 cores), and a step of the demo 0.6 to 0.8. Training at 256 it would be
        # 8% of a step of 124M, but 15% more memory: the scores are kept.
        scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)
        if mask is not None:
            scores.masked_fill_(~mask, -math.inf)
        elif causal:
            scores += torch.full((T, S), -math.inf, dtype=q.dtype).triu(1)
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, config.bias)  # q, k, v of all heads at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, config.bias)
        if config.qk_norm:  # https://arxiv.org/abs/2302.05442
            kind = config if config.norm == "weightless" else replace(config, norm="rmsnorm")
            self.q_norm, self.k_norm = (new_norm(kind, config.n_embd // config.n_head) for _ in "qk")

    def forward(self, x, cache=None, pos=0, mask=None, turn=None):
        """x (B, T, C) -> (B, T, C). See GPT.hidden for the other arguments."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        # (B, T, C) -> (B, nh, T, hs)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if turn is not None:
            q, k = rotate(q.float(), *turn), rotate(k.float(), *turn)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:  # (2, B, nh, max_len, hs): keys and values of the positions before pos
            cache[0, :, :, pos : pos + T] = k
            cache[1, :, :, pos : pos + T] = v
            k, v = cache[:, :, :, : pos + T]
            q = q.to(cache.dtype)
            if pos > 0 and T > 1:  # several new tokens behind a past: each sees the past and itself
                mask = torch.ones(T, pos + T, dtype=torch.bool, device=q.device).tril(pos)
        y = attend(q, k, v, mask, causal=pos == 0)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C).to(v.dtype))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        width = 4 * config.n_embd
        if config.mlp == "swiglu":  # two layers in, so each is narrower: the same number of parameters
            width = round(2 * width / 3 / 8) * 8
        self.c_fc = nn.Linear(config.n_embd, width * (2 if config.mlp == "swiglu" else 1), config.bias)
        self.c_proj = nn.Linear(width, config.n_embd, config.bias)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        x = self.c_fc(x)
        if self.kind == "swiglu":  # https://arxiv.org/abs/2002.05202
            gate, x = x.chunk(2, dim=-1)
            return self.c_proj(F.silu(gate) * x)
        if self.kind == "relu2":  # https://arxiv.org/abs/2109.08668
            return self.c_proj(F.relu(x).square())
        return self.c_proj(F.gelu(x, approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = new_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = new_norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, pos=0, mask=None, turn=None):
        x = x + self.attn(self.ln_1(x), cache, pos, mask, turn)
        return x + self.mlp(self.ln_2(x))


# What recompute() keeps: the products of matrices, and attention, by each of torch's kernels.
PRODUCTS = [
    getattr(torch.ops.aten, name).default
    for name in ("mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu",
                 "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
                 "_scaled_dot_product_cudnn_attention")
]  # fmt: skip


def recompute(block, x, *args, everything=False):
    """block(x, *args), of which autograd keeps the products alone, and computes the rest again for backward.

    A step of 124M takes 14 to 19% less memory in 0.99 to 1.09 of the time (2 cores, 4,096 tokens). torch.compile, of
    the model or of FSDP's blocks, sees to that by itself, and small tensors (the demo's) are not worth the time: these
    have a plain call. With everything, autograd keeps x alone: the least memory, but all is computed twice.
    """
    if not torch.is_grad_enabled():
        return block(x, *args)
    how = {"use_reentrant": False, "preserve_rng_state": False}  # there is no dropout
    if everything:
        return checkpoint(block, x, *args, **how)
    compiled = torch.compiler.is_compiling() or block._compiled_call_impl is not None  # the model, or FSDP's blocks
    if compiled or x.numel() < 1 << 21:
        return block(x, *args)
    return checkpoint(block, x, *args, **how, context_fn=partial(create_selective_checkpoint_contexts, PRODUCTS))


def check_config(config):
    """Exit with one line if there is no such model."""
    choices = {"pos": ("learned", "rope"), "mlp": ("gelu", "swiglu", "relu2")}
    choices |= {"norm": ("layernorm", "rmsnorm", "weightless")}
    for key, known in choices.items():
        if getattr(config, key) not in known:
            sys.exit(f"{key}={getattr(config, key)}: choose {' or '.join(known)}")
    if config.n_embd % config.n_head:
        sys.exit(f"n_embd={config.n_embd} must be a multiple of n_head={config.n_head}")
    if config.pos == "rope" and config.n_embd // config.n_head % 2:
        sys.exit(f"pos=rope turns pairs: n_embd / n_head = {config.n_embd // config.n_head} must be even")


class GPT(nn.Module):
    activation_checkpointing = False  # True: keep only the blocks' inputs, compute the rest again for backward

    def __init__(self, config):
        super().__init__()
        check_config(config)
        self.config = config
        # A vocabulary of a multiple of 64 rows keeps the largest matmul on the tensor cores' fast path. The extra rows
        # never reach a softmax: forward cuts the logits to vocab_size.
        rows = -(-config.vocab_size // 64) * 64
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(rows, config.n_embd)})
        if config.pos == "learned":
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        if config.embd_norm:  # https://arxiv.org/abs/2110.02861
            self.transformer["ln_e"] = new_norm(config, config.n_embd)
        self.transformer["h"] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer["ln_f"] = new_norm(config, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, rows, bias=False)
        if config.tied:  # https://arxiv.org/abs/1608.05859
            self.lm_head.weight = self.transformer.wte.weight
        self.apply(self._init_weights)
        if not config.tied:
            nn.init.normal_(self.transformer.wte.weight)
            nn.init.zeros_(self.lm_head.weight)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):
            # Two residual additions a layer: scale them so that the stream's variance does not grow with depth (GPT-2
            # paper, section 2.3). apply() has been to a module's children by now.
            for proj in (module.attn.c_proj, module.mlp.c_proj):
                std = 0 if self.config.zero_init else 0.02 * (2 * self.config.n_layer) ** -0.5
                nn.init.normal_(proj.weight, std=std)

    def hidden(self, idx, cache=None, pos=0, positions=None, mask=None):
        """The final hidden states (B, T, C) of token ids idx (B, T).

        The tokens stand at pos, pos + 1, ..., behind what is in cache, and see those before them; or at positions (B,
        T), and see those that mask (B, 1, T, T) says.
        """
        T = idx.size(1)
        if positions is None:
            assert pos + T <= self.config.block_size, f"{pos + T} tokens, context {self.config.block_size}"
            positions = torch.arange(pos, pos + T, device=idx.device)
        x, turn = self.transformer.wte(idx), None  # (B, T, C)
        if self.config.pos == "learned":
            x = x + self.transformer.wpe(positions)
        else:
            turn = rotation(positions, self.config.n_embd // self.config.n_head)
            if positions.dim() == 2:  # one angle for all heads
                turn = [t[:, None] for t in turn]
        if self.config.embd_norm:
            x = self.transformer.ln_e(x)
        kind = x.device.type
        if torch.is_grad_enabled() and torch.is_autocast_enabled(kind) and kind != "cpu":
            # On GPUs training keeps the stream itself in bfloat16: a quarter less traffic. Over 8 seeds of 300 steps on
            # CPUs that moved the loss by 0.002 +- 0.004 (GPT-2's parts) and -0.002 +- 0.002; seeds vary by 0.02, 0.01.
            x = x.to(torch.bfloat16 if torch.get_autocast_dtype(kind) == torch.bfloat16 else x.dtype)
        for i, block in enumerate(self.transformer.h):
            args = (x, None if cache is None else cache[i], pos, mask, turn)
            x = recompute(block, *args, everything=self.activation_checkpointing)
        return self.transformer.ln_f(x)

    def logits(self, x):
        """Hidden states (..., C) to logits (..., vocab_size)."""
        return capped(self.lm_head(x)[..., : self.config.vocab_size], self.config.softcap)

    def forward(self, idx, targets=None, with_accuracy=False):
        """Logits (B, T, vocab_size) of token ids idx (B, T); with targets (B, T) the loss instead.

        The loss is the mean cross-entropy in nats over the targets that are not -1 (a scalar, float32). Without
        gradients, with_accuracy returns (loss, the share of them that are the likeliest token).
        """
        x = GPT.hidden(self, idx)  # not self.hidden: FSDP wraps that for calls from outside
        if targets is None:
            return GPT.logits(self, x)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        rows = (x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        how = (self.config.vocab_size, self.config.softcap, torch.is_grad_enabled())
        loss, accuracy = LinearCrossEntropy.apply(*rows, *how)
        return (loss, accuracy) if with_accuracy else loss

    def num_params(self):
        """Number of parameters, without the rows that only pad the vocabulary."""
        padding = self.transformer.wte.num_embeddings - self.config.vocab_size
        return sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd * (2 - self.config.tied)

    def flops_per_token(self, T):
        """Training FLOPs a token at context T, forward and backward: 6N + 12 n_layer n_embd T.

        PaLM's count (https://arxiv.org/abs/2204.02311, appendix B), which MFU is defined by. N leaves out embeddings,
        which are looked up, and keeps the output layer.
        """
        c, N = self.config, self.num_params()
        N -= c.block_size * c.n_embd if c.pos == "learned" else 0
        N -= 0 if c.tied else c.vocab_size * c.n_embd
        return 6 * N + 12 * c.n_layer * c.n_embd * T

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, num_samples=1, vocab_size=None, **sampling):
        """Yield the next token ids, a (B * num_samples,) tensor each time, max_new_tokens times.

        idx (B, T) holds B prompts of one length, of which the last block_size tokens count; each is read once and
        continued num_samples times. Ids from vocab_size on are never drawn; `sampling` are the settings of
        sample_token. When the context is full, its newer half is read again as the new context, so that the cost of a
        token stays what it was.
        """
        block_size = self.config.block_size
        idx = idx[:, -block_size:]
        cache, pos = None, 0  # pos: positions read so far
        for _ in range(max_new_tokens):
            if 0 < pos < block_size:
                x = self.hidden(idx[:, -1:], cache, pos)
                pos += 1
            else:
                if pos == block_size:
                    idx = idx[:, -(block_size // 2 + 1) :]
                cache = self.new_cache(len(idx), min(block_size, idx.size(1) + max_new_tokens))
                x = self.hidden(idx, cache)[:, -1:]
                pos = idx.size(1)
                if num_samples > 1:  # the prompts have been read: from here on each sample is a row
                    cache = cache.repeat_interleave(num_samples, dim=2)
                    x, idx = (t.repeat_interleave(num_samples, dim=0) for t in (x, idx))
                    num_samples = 1
            token = sample_token(self.logits(x[:, -1])[:, :vocab_size].float(), **sampling)  # (B,)
            yield token
            idx = torch.cat((idx, token[:, None]), dim=1)

    def new_cache(self, B, length):
        """Room for the keys and values of B sequences of `length` tokens, for hidden(cache=...).

        In float32 on a CPU, whose attention of one query takes a sixth of bfloat16's time (900 keys of 124M).
        """
        c, w = self.config, self.transformer.wte.weight
        device = w.device.type
        dtype = torch.float32 if device == "cpu" else w.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        shape = (c.n_layer, 2, B, c.n_head, length, c.n_embd // c.n_head)
        return torch.empty(shape, dtype=dtype, device=w.device)

    @classmethod
    def from_state_dict(cls, config, state, source):
        """A GPT around the tensors of a state dict, which it keeps; exits if they do not fit config."""
        with torch.device("meta"):
            model = cls(config)
        try:
            model.load_state_dict(state, assign=True)
        except (RuntimeError, TypeError) as e:
            first = str(e).splitlines()[-1].strip()
            sys.exit(f"{source}: its weights are not those of a GPT-2 with {config}: {first}")
        if config.tied:
            model.lm_head.weight = model.transformer.wte.weight
        return model

    @classmethod
    def from_pretrained(cls, source):
        """A GPT with the weights of a name on the hub ("gpt2" ... "gpt2-xl", owner/name) or a local folder."""
        config, state = read_hugging_face(source)
        return cls.from_state_dict(GPTConfig(**config), state, source)


def sample_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw one token id a row: logits (B, V) -> (B,).

    temperature 0 is greedy; top_k 0 and top_p 1 keep every token; generator seeds the draws. top_p is nucleus sampling
    (https://arxiv.org/abs/1904.09751): it keeps the fewest tokens, at least one, whose probabilities reach top_p.
    """
    if temperature < 1e-6:  # beyond which float32 overflows
        return logits.argmax(dim=-1)
    tokens = None  # that the columns stand for; None: each for its own number
    if 0 < top_k < logits.size(-1):
        logits, tokens = logits.topk(top_k, dim=-1)
    probs = (logits / temperature).softmax(dim=-1)
    if top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True)
        ranked[ranked.cumsum(dim=-1) - ranked >= top_p] = 0  # the tokens before it reach top_p already
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)
    drawn = torch.multinomial(probs, 1, generator=generator)  # (B, 1)
    return (drawn if tokens is None else tokens.gather(1, drawn)).squeeze(1)


def load_model(ckpt="latest", device="cpu", log_dir="log"):
    """(model, enc): the GPT, in eval mode on `device`, and its tiktoken.Encoding.

    ckpt: "latest" (the last log_dir/model_*.pt, by its step), "best" (the one of the lowest validation loss), a .pt
    path, also of nanoGPT or build-nanogpt, a name on the hub ("gpt2" ... "gpt2-xl", owner/name), or a local folder of
    Hugging Face's. Says which file it is on stderr. Exits with one line if it cannot be had.
    """
    on_hub = ckpt in OPENAI_MODELS or (re.fullmatch(r"[\w.-]+/[\w.-]+", ckpt) and not os.path.exists(ckpt))
    if (on_hub and not ckpt.endswith(".pt")) or os.path.isdir(ckpt):
        folder = download_model(ckpt) if on_hub else ckpt
        model = GPT.from_pretrained(folder)
        vocab_size = model.config.vocab_size
        enc = load_tokenizer("gpt2") if ckpt in OPENAI_MODELS else tokenizer_beside(folder, vocab_size)
    else:
        path = find_checkpoint(ckpt, log_dir)
        config, weights, tokenizer, step = read_checkpoint(path)
        try:
            model = GPT.from_state_dict(GPTConfig(**config), weights, path)
        except TypeError as e:
            sys.exit(f"{path}: not a checkpoint of this project's GPT-2 ({e})")
        enc = load_tokenizer(tokenizer)
        if is_rank_0():
            print(f"{path}: step {step}", file=sys.stderr)
    return model.float().to(device).eval(), enc  # float: export.py can have written it in bfloat16
