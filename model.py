"""GPT-2: the model, its loss, how it generates, and how its weights are loaded.

Architecture and initialization follow OpenAI's release (https://github.com/openai/gpt-2) and the
GPT-2 and GPT-3 papers: learned positions, pre-LayerNorm with bias, tanh-GELU, fused QKV, tied
embeddings. State-dict names are those of Hugging Face's GPT2LMHeadModel; with the same weights the
logits are equal too. The last fields of GPTConfig replace parts of GPT-2 by later inventions; with
the defaults it is GPT-2.

    model = GPT(GPTConfig(n_layer=12, n_head=12, n_embd=768))          # fresh weights
    model, enc = load_model("latest")                                  # the latest in log/
    model, enc = load_model("gpt2-xl")                                 # OpenAI's weights
"""

from dataclasses import dataclass, replace
import os
import re
import sys

from data.tokenizer import load_tokenizer
from huggingface import OPENAI_MODELS, download_model, read_hugging_face, tokenizer_from_folder
from kernels import (
    LinearCrossEntropy,
    attention,
    layer_norm,
    rms_norm,
    run_block,
    softcap_logits,
)
from script import UserError, is_rank_0
from weights import checkpoint_paths, find_checkpoint, read_checkpoint

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@dataclass
class GPTConfig:  # each field but the first two is a setting of train_gpt2.py
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    pos: str = "learned"  # positions: learned or rope
    norm: str = "layernorm"  # layernorm, rmsnorm or rmsnorm_noaffine (RMSNorm without weights)
    mlp: str = "gelu"  # gelu, swiglu or relu2
    qk_norm: bool = False  # normalize each head's queries and keys (RMSNorm)
    bias: bool = True  # biases in linear layers and LayerNorms
    embd_norm: bool = False  # normalize the embedding output
    softcap: float = 0.0  # cap the logits at +-softcap with tanh; 0: no cap
    zero_init: bool = False  # initialize the residual projections (c_proj) to zero
    tie_embeddings: bool = True  # the output layer shares the weights of the token embedding


CHOICES = {
    "pos": ("learned", "rope"),
    "norm": ("layernorm", "rmsnorm", "rmsnorm_noaffine"),
    "mlp": ("gelu", "swiglu", "relu2"),
}


def check_config(config):
    """Raise UserError if a GPTConfig is invalid."""
    for key, choices in CHOICES.items():
        value = getattr(config, key)
        if value not in choices:
            raise UserError(f"{key}={value}: choose {' or '.join(choices)}")
    if config.n_embd % config.n_head:
        raise UserError(f"n_embd={config.n_embd} must be a multiple of n_head={config.n_head}")
    # Rotary embeddings work on pairs of channels.
    head_size = config.n_embd // config.n_head
    if config.pos == "rope" and head_size % 2:
        raise UserError(f"pos=rope rotates pairs: n_embd / n_head = {head_size} must be even")


# -- layers -------------------------------------------------------------------------
class RMSNorm(nn.RMSNorm):
    """https://arxiv.org/abs/1910.07467"""

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """https://arxiv.org/abs/1607.06450"""

    def forward(self, x):
        return layer_norm(x, self.weight, self.bias, self.eps)


def new_norm(config, size):
    """The normalization that config asks for, over vectors of `size`."""
    if config.norm == "layernorm":
        return LayerNorm(size, bias=config.bias)
    if config.norm == "rmsnorm":
        return RMSNorm(size, eps=1e-5)
    return RMSNorm(size, eps=1e-6, elementwise_affine=False)


def rope_cos_sin(positions, head_size):
    """cos and sin, (..., T, head_size / 2) float32, of rotary embeddings at positions (..., T).

    https://arxiv.org/abs/2104.09864, with base 10,000. As in Llama, a head's first half is paired
    with its second half.
    """
    # The i-th pair rotates by position * 10,000^(-2i / head_size): the first pairs fastest.
    exponent = torch.arange(0, head_size, 2, device=positions.device) / head_size
    angle = positions[..., None].float() * 10_000**-exponent
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    """Rotate the pairs of x (B, nh, T, hs); cos and sin are (T, hs / 2) or (B, 1, T, hs / 2)."""
    # A rotation of the plane that the pair (a, b) spans.
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        # Query, key and value projections of all heads in one matrix; then the output projection.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, config.bias)
        self.qk_norm = config.qk_norm
        # Normalized queries and keys keep attention logits from growing during training: RMSNorm in
        # any case, since only their length matters (https://arxiv.org/abs/2302.05442).
        if config.qk_norm:
            if config.norm == "layernorm":
                config = replace(config, norm="rmsnorm")
            head_size = config.n_embd // config.n_head
            self.q_norm = new_norm(config, head_size)
            self.k_norm = new_norm(config, head_size)

    def forward(self, x, cache=None, pos=0, mask=None, cos_sin=None):
        """x (B, T, C) -> (B, T, C); mask: bool, (B, 1, T, T); cos_sin: what rope_cos_sin() returns.

        cache (2, B, nh, max_len, hs): keys and values of `pos` earlier tokens, with room for these.
        """
        # nh is the number of heads, hs = C / nh the size of a head.
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        # (B, T, C) -> (B, nh, T, hs)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        # Norms and rotations are computed in float32, attention in the dtype of the values.
        dtype = v.dtype
        if self.qk_norm:
            q = self.q_norm(q.float())
            k = self.k_norm(k.float())
        if cos_sin is not None:
            q = apply_rope(q.float(), *cos_sin)
            k = apply_rope(k.float(), *cos_sin)
        q = q.to(dtype)
        k = k.to(dtype)
        # When generating, cache (2, B, nh, max_len, hs) has the keys and values before pos.
        if cache is not None:
            cache[0, :, :, pos : pos + T] = k
            cache[1, :, :, pos : pos + T] = v
            k, v = cache[:, :, :, : pos + T]
            q = q.to(cache.dtype)
            if pos > 0 and T > 1:  # several new tokens after a cached prefix: a shifted causal mask
                mask = torch.ones(T, pos + T, dtype=torch.bool, device=q.device).tril(pos)
        # A single new token may attend to the whole cache.
        y = attention(q, k, v, mask, is_causal=pos == 0)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        # A float32 cache makes y float32.
        return self.c_proj(y.to(dtype))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        # The hidden layer is four times as wide as the model.
        width = 4 * config.n_embd
        if config.mlp == "swiglu":
            # Two input layers instead of one: 2/3 of the width keeps the number of parameters.
            width = round(2 * width / 3 / 8) * 8
            self.c_fc = nn.Linear(config.n_embd, 2 * width, config.bias)
        else:
            self.c_fc = nn.Linear(config.n_embd, width, config.bias)
        self.c_proj = nn.Linear(width, config.n_embd, config.bias)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        x = self.c_fc(x)
        if self.kind == "swiglu":  # https://arxiv.org/abs/2002.05202
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        elif self.kind == "relu2":  # https://arxiv.org/abs/2109.08668
            x = F.relu(x).square()
        else:
            x = F.gelu(x, approximate="tanh")
        return self.c_proj(x)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        # Pre-norm: each branch normalizes its input, and the residual stream itself is never
        # normalized.
        self.ln_1 = new_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = new_norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, pos=0, mask=None, cos_sin=None):
        x = x + self.attn(self.ln_1(x), cache, pos, mask, cos_sin)
        return x + self.mlp(self.ln_2(x))


# -- the model ----------------------------------------------------------------------
class SkipInit(TorchFunctionMode):
    """torch.nn.init does nothing inside: on meta tensors it imports torch's compiler, a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


class GPT(nn.Module):
    # True: save only the blocks' inputs and compute the rest again in the backward pass.
    activation_checkpointing = False

    def __init__(self, config):
        super().__init__()
        check_config(config)
        self.config = config
        # A multiple of 64 keeps the largest matmul on the tensor cores' fast path. The extra rows
        # never reach a softmax: logits are cut to vocab_size.
        padded_vocab_size = -(-config.vocab_size // 64) * 64
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(padded_vocab_size, config.n_embd)})
        if config.pos == "learned":
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        if config.embd_norm:  # https://arxiv.org/abs/2110.02861
            self.transformer["ln_e"] = new_norm(config, config.n_embd)
        # The blocks, and a last norm before the output layer.
        self.transformer["h"] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer["ln_f"] = new_norm(config, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, padded_vocab_size, bias=False)
        if config.tie_embeddings:  # https://arxiv.org/abs/1608.05859
            self.lm_head.weight = self.transformer.wte.weight
        # An untied output layer starts at zero, so that the first loss is exactly ln(vocab_size),
        # and an untied embedding with a standard deviation of 1 (nanochat).
        self.apply(self._init_weights)
        if not config.tie_embeddings:
            nn.init.normal_(self.transformer.wte.weight)
            nn.init.zeros_(self.lm_head.weight)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):
            # There are two residual additions in each block. Scaling them keeps the variance of the
            # residual stream from growing with depth (GPT-2 paper, section 2.3). apply() visits
            # children first, so this comes after their own initialization.
            std = 0 if self.config.zero_init else 0.02 * (2 * self.config.n_layer) ** -0.5
            nn.init.normal_(module.attn.c_proj.weight, std=std)
            nn.init.normal_(module.mlp.c_proj.weight, std=std)

    def hidden(self, idx, cache=None, pos=0, positions=None, mask=None):
        """The final hidden states (B, T, C) of token ids idx (B, T).

        By default idx continues the `pos` tokens in cache (see new_cache), with causal attention.
        Or give positions (B, T) and mask (B, 1, T, T), which is True where a token may attend.
        """
        # Which positions do the tokens have?
        T = idx.size(1)
        if positions is None:
            end = pos + T
            assert end <= self.config.block_size, f"{end} tokens, context {self.config.block_size}"
            positions = torch.arange(pos, end, device=idx.device)
        # Token embeddings, and position embeddings or rotations.
        x = self.transformer.wte(idx)  # (B, T, C)
        cos_sin = None
        if self.config.pos == "learned":
            x = x + self.transformer.wpe(positions)
        else:
            cos_sin = rope_cos_sin(positions, self.config.n_embd // self.config.n_head)
            if positions.dim() == 2:  # (B, T, hs / 2) -> (B, 1, T, hs / 2): the same for all heads
                cos_sin = [t[:, None] for t in cos_sin]
        if self.config.embd_norm:
            x = self.transformer.ln_e(x)
        x = self._to_stream_dtype(x)
        for i, block in enumerate(self.transformer.h):
            block_cache = None if cache is None else cache[i]
            x = run_block(
                block, x, block_cache, pos, mask, cos_sin, full=self.activation_checkpointing
            )
        return self.transformer.ln_f(x)

    def _to_stream_dtype(self, x):
        """Cast x to bfloat16 when training under bfloat16 autocast on a GPU: 1/4 less traffic.

        On CPUs, over 8 seeds of 300 steps, that moved the loss by 0.002 +- 0.004 (GPT-2) and by
        -0.002 +- 0.002 (modern), where seeds vary by 0.02 and 0.01.
        """
        device = x.device.type
        if device == "cpu" or not torch.is_grad_enabled() or not torch.is_autocast_enabled(device):
            return x
        if torch.get_autocast_dtype(device) == torch.bfloat16:
            return x.to(torch.bfloat16)
        return x

    def logits(self, x):
        """Hidden states (..., C) -> logits (..., vocab_size)."""
        # Without the rows that pad the vocabulary, which are never trained.
        logits = self.lm_head(x)[..., : self.config.vocab_size]
        return softcap_logits(logits, self.config.softcap)

    def forward(self, idx, targets=None, with_accuracy=False):
        """Logits (B, T, vocab_size) of token ids idx (B, T); with targets (B, T), the loss instead.

        The loss is the mean cross-entropy in nats over the targets that are not -1 (a scalar,
        float32). Without gradients, with_accuracy returns (loss, next-token accuracy).
        """
        x = GPT.hidden(self, idx)  # FSDP wraps self.hidden for other callers, see apply_fsdp()
        if targets is None:
            return GPT.logits(self, x)
        # Autocast does not reach into a function with a backward pass of its own.
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        loss, accuracy = LinearCrossEntropy.apply(
            x.flatten(0, 1),
            self.lm_head.weight,
            targets.flatten(),
            self.config.vocab_size,
            self.config.softcap,
            torch.is_grad_enabled(),
        )
        return (loss, accuracy) if with_accuracy else loss

    def num_params(self):
        """The number of parameters, without the rows that pad the vocabulary."""
        total = sum(p.numel() for p in self.parameters())
        padding = self.transformer.wte.num_embeddings - self.config.vocab_size
        tables = 1 if self.config.tie_embeddings else 2
        return total - padding * self.config.n_embd * tables

    def flops_per_token(self, T):
        """Training FLOPs per token at context T, forward and backward: 6N + 12 n_layer n_embd T.

        PaLM's count (https://arxiv.org/abs/2204.02311, appendix B), used for MFU, the share of the
        hardware's peak FLOP/s that training achieves. N leaves out embeddings, which are looked up,
        and includes the output layer.
        """
        c = self.config
        N = self.num_params()
        if c.pos == "learned":
            N -= c.block_size * c.n_embd
        if not c.tie_embeddings:
            N -= c.vocab_size * c.n_embd
        return 6 * N + 12 * c.n_layer * c.n_embd * T

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, num_samples=1, vocab_size=None, **sampling):
        """Yield the next token ids, a (B * num_samples,) tensor, max_new_tokens times.

        idx (B, T) holds B prompts of the same length, cut to the last block_size tokens. Each is
        read once and continued num_samples times. Ids from vocab_size on are never drawn;
        `sampling` are arguments of sample_token. When the context is full, its second half is read
        again as the new context, so that the cost per token stays constant.
        """
        block_size = self.config.block_size
        idx = idx[:, -block_size:]
        cache = None
        pos = 0  # positions in the cache
        for _ in range(max_new_tokens):
            # Usually only the last token is new: the cache has the others.
            if 0 < pos < block_size:
                x = self.hidden(idx[:, -1:], cache, pos)
                pos += 1
            else:
                # The first time, and whenever the context is full, read the whole context.
                if pos == block_size:
                    idx = idx[:, -(block_size // 2 + 1) :]
                cache = self.new_cache(len(idx), min(block_size, idx.size(1) + max_new_tokens))
                x = self.hidden(idx, cache)[:, -1:]
                pos = idx.size(1)
                if num_samples > 1:  # the prompts have been read: from now on each sample is a row
                    cache = cache.repeat_interleave(num_samples, dim=2)
                    x = x.repeat_interleave(num_samples, dim=0)
                    idx = idx.repeat_interleave(num_samples, dim=0)
                    num_samples = 1
            # A tokenizer can have fewer tokens than the model: the others are never drawn.
            logits = self.logits(x[:, -1])[:, :vocab_size].float()
            token = sample_token(logits, **sampling)  # (B,)
            yield token
            idx = torch.cat((idx, token[:, None]), dim=1)

    def new_cache(self, B, length):
        """An empty cache for hidden(): keys and values of B sequences of `length` tokens.

        (n_layer, 2, B, n_head, length, head_size); without autocast, float32 on a CPU, where
        attention for one query takes a sixth of bfloat16's time (900 keys of 124M).
        """
        c = self.config
        # Autocast converts queries, keys and values, so the cache has its dtype.
        weight = self.transformer.wte.weight
        device = weight.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        else:
            dtype = torch.float32 if device == "cpu" else weight.dtype
        shape = (c.n_layer, 2, B, c.n_head, length, c.n_embd // c.n_head)
        return torch.empty(shape, dtype=dtype, device=weight.device)

    @classmethod
    def from_state_dict(cls, config, state, source):
        """A GPT that takes over (does not copy) the tensors of a state dict.

        Raises UserError, which names the source, if they do not fit config.
        """
        # Build the modules without memory, then put the given tensors in their place.
        with torch.device("meta"), SkipInit():
            model = cls(config)
        try:
            model.load_state_dict(state, assign=True)
        except (RuntimeError, TypeError) as e:
            reason = str(e).splitlines()[-1].strip()
            raise UserError(
                f"{source}: its weights are not those of a GPT-2 with {config}: {reason}"
            )
        if config.tie_embeddings:
            model.lm_head.weight = model.transformer.wte.weight
        return model

    @classmethod
    def from_pretrained(cls, source):
        """A GPT with weights from the hub ("gpt2" ... "gpt2-xl", owner/name) or a local folder."""
        config, state = read_hugging_face(source)
        return cls.from_state_dict(GPTConfig(**config), state, source)


# -- text ---------------------------------------------------------------------------
def sample_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw one token id from each row: logits (B, V) -> (B,).

    temperature 0 is greedy; top_k 0 and top_p 1 keep every token; generator makes draws repeatable.
    top_p is nucleus sampling (https://arxiv.org/abs/1904.09751): it keeps the fewest tokens, at
    least one, whose probabilities sum to top_p or more.
    """
    if temperature < 1e-6:  # dividing by less overflows float32
        return logits.argmax(dim=-1)
    token_ids = None  # the token id of each column; None: the column's index
    if 0 < top_k < logits.size(-1):
        logits, token_ids = logits.topk(top_k, dim=-1)
    probs = (logits / temperature).softmax(dim=-1)
    if top_p < 1:
        # Keep a token if the likelier ones together have less than top_p.
        sorted_probs, order = probs.sort(dim=-1, descending=True)
        sum_before = sorted_probs.cumsum(dim=-1) - sorted_probs
        sorted_probs[sum_before >= top_p] = 0
        probs = torch.zeros_like(probs).scatter(-1, order, sorted_probs)
    column = torch.multinomial(probs, 1, generator=generator)  # (B, 1)
    if token_ids is not None:
        column = token_ids.gather(1, column)
    return column.squeeze(1)


def load_model(ckpt="latest", device="cpu", log_dir="log"):
    """(model, enc): a GPT in eval mode, float32, on `device`, and its tiktoken.Encoding.

    ckpt: "latest" (the highest step of log_dir/model_*.pt), "best" (the lowest validation loss), a
    .pt path (also nanoGPT's or build-nanogpt's), a log folder (its latest), a name on the hub
    ("gpt2" ... "gpt2-xl", owner/name), or a local Hugging Face folder. Prints which file it loads
    to stderr. Raises UserError if it cannot be loaded.
    """
    # OpenAI's names come first; another name is looked for here, and then on the hub.
    on_hub = ckpt in OPENAI_MODELS
    if not os.path.exists(ckpt) and not ckpt.endswith(".pt"):
        on_hub = on_hub or re.fullmatch(r"[\w.-]+/[\w.-]+", ckpt) is not None
    if on_hub or (os.path.isdir(ckpt) and not checkpoint_paths(ckpt)):
        folder = download_model(ckpt) if on_hub else ckpt
        model = GPT.from_pretrained(folder)
        if ckpt in OPENAI_MODELS:
            enc = load_tokenizer("gpt2")
        else:
            enc = tokenizer_from_folder(folder, model.config.vocab_size)
    else:
        # A .pt file: of ours, of nanoGPT or of build-nanogpt.
        path = find_checkpoint(ckpt, log_dir)
        config, weights, tokenizer, step = read_checkpoint(path)
        try:
            model = GPT.from_state_dict(GPTConfig(**config), weights, path)
        except TypeError as e:
            raise UserError(f"{path}: not a checkpoint of this project's GPT-2 ({e})")
        enc = load_tokenizer(tokenizer)
        if is_rank_0():
            print(f"{path}: step {step}", file=sys.stderr)
    # A file that export.py wrote can hold bfloat16.
    return model.float().to(device).eval(), enc
