"""Configurations and weights to and from Hugging Face; each mapping stands next to its inverse.

Three architectures of transformers have the same mathematics as some GPTConfigs:

gpt2        GPT2LMHeadModel: the defaults
nanochat    NanoChatForCausalLM: --preset=modern
llama       LlamaForCausalLM: --pos=rope --norm=rmsnorm --mlp=swiglu --bias=False
"""

import dataclasses
import json
import os

from data.tokenizer import load_tokenizer
from script import UserError
from training.checkpoint import load_checkpoint

import torch
from torch.nn import functional as F

OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "nanochat": "NanoChatForCausalLM",
    "llama": "LlamaForCausalLM",
}
# The fields in which an architecture differs from GPTConfig's defaults, and those it leaves open.
NANOCHAT = {"pos": "rope", "norm": "rmsnorm_noaffine", "qk_norm": True, "bias": False}
FIELDS = {
    "gpt2": {},
    "nanochat": {**NANOCHAT, "embd_norm": True},
    "llama": {"pos": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False},
}
OPEN_FIELDS = {"gpt2": (), "nanochat": ("mlp", "softcap", "tie_embeddings"), "llama": ()}
SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
ACTIVATIONS = {"gelu": "gelu_pytorch_tanh", "relu2": "relu2", "swiglu": "silu"}

# {key in config.json: field of GPTConfig}, for both directions.
GPT2_KEYS = {
    "n_positions": "block_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
ROPE_KEYS = {
    "max_position_embeddings": "block_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "n_embd",
}


# -- configurations -----------------------------------------------------------------
def fixed_values(kind, n_embd, n_head):
    """{key in config.json: values with the same mathematics as ours}; export writes the first."""
    if kind == "gpt2":
        return {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
            "layer_norm_epsilon": (1e-5,),
            "scale_attn_weights": (True,),
            "add_cross_attention": (False,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "n_inner": (None, 4 * n_embd),
        }
    is_nanochat = kind == "nanochat"
    width = 4 * n_embd if is_nanochat else round(8 * n_embd / 3 / 8) * 8
    values = {
        "num_key_value_heads": (n_head,),
        "head_dim": (n_embd // n_head, None),
        "intermediate_size": (width,),
        "rms_norm_eps": (1e-6 if is_nanochat else 1e-5,),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_theta": (1e4,),
    }
    if not is_nanochat:
        values["tie_word_embeddings"] = (True,)
    return values


def config_from_hf(kind, hf, source):
    """A GPTConfig, as a dict, from the dict of config.json; UserError if it differs from ours."""
    keys = GPT2_KEYS if kind == "gpt2" else ROPE_KEYS
    config = {**FIELDS[kind], "vocab_size": hf["vocab_size"]}
    # Sizes have other names there.
    for key, field in keys.items():
        config[field] = hf[key]
    supported = fixed_values(kind, config["n_embd"], config["n_head"])
    if kind != "gpt2":
        # Where transformers keeps the rotary embedding's settings depends on its version.
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        hf = {"rope_type": "default", **hf, **rope}
        supported["rope_type"] = ("default",)
        mlps = ("gelu", "relu2") if kind == "nanochat" else ("swiglu",)
        supported["hidden_act"] = tuple(ACTIVATIONS[mlp] for mlp in mlps)
    check_config_values(hf, source, supported)
    if kind == "nanochat":
        config["mlp"] = "relu2" if hf["hidden_act"] == "relu2" else "gelu"
        config["softcap"] = hf.get("final_logit_softcapping", 15) or 0.0
        config["tie_embeddings"] = hf.get("tie_word_embeddings", False)
    return config


def config_to_hf(kind, c):
    """The inverse: what config.json says of a GPTConfig."""
    keys = GPT2_KEYS if kind == "gpt2" else ROPE_KEYS
    config = {"architectures": [CLASSES[kind]], "model_type": kind}
    for key, field in keys.items():
        config[key] = getattr(c, field)
    for key, values in fixed_values(kind, c.n_embd, c.n_head).items():
        config[key] = values[0]
    if kind == "gpt2":
        for key in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
            config[key] = 0.0
    else:
        config["hidden_act"] = ACTIVATIONS[c.mlp]
        config["rope_scaling"] = None
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    if kind == "nanochat":
        config["final_logit_softcapping"] = c.softcap or None
    config["tie_word_embeddings"] = c.tie_embeddings
    return config


def check_config_values(hf, source, supported):
    """Raise UserError if a value in config.json is not one of those supported, {key: values}."""
    for key, values in supported.items():
        value = hf.get(key, values[0])
        if value not in values:
            raise UserError(
                f"{source}: its config.json says {key}={value}; this project supports {values[0]}"
            )


def find_architecture(c):
    """The architecture that a GPTConfig has; raises UserError if transformers has none for it."""
    for kind, fields in FIELDS.items():
        # All fields count, also those that are added to GPTConfig later, so that a new option is
        # never exported as something that it is not.
        expected = {**dataclasses.asdict(type(c)()), **fields}
        given = dataclasses.asdict(c)
        if kind == "nanochat" and c.mlp == "swiglu":
            continue
        # zero_init only matters before training
        ignored = (*SIZES, "zero_init", *OPEN_FIELDS[kind])
        if all(given[key] == expected[key] for key in expected if key not in ignored):
            return kind
    # Say which fields are in the way.
    parts = []
    for key, default in dataclasses.asdict(type(c)()).items():
        if key not in SIZES and given[key] != default:
            parts.append(f"{key}={given[key]}")
    raise UserError(
        f"no architecture of transformers has {', '.join(parts)}; --format=pt and onnx take any"
    )


# -- weights ------------------------------------------------------------------------
def transpose_conv1d(tensors):
    """GPT-2's linear layers are OpenAI's Conv1D, which holds (in, out). This is its own inverse."""
    transposed = {}
    for name, tensor in tensors.items():
        if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            tensor = tensor.t()
        transposed[name] = tensor
    return transposed


def rope_names(kind, n_layer, tie_embeddings):
    """{our parameter: NanoChat's or Llama's parameters, concatenated along dim 0}."""
    # Embedding, output layer, last norm, then the blocks.
    names = {"transformer.wte": ["model.embed_tokens"]}
    if not tie_embeddings:
        names["lm_head"] = ["lm_head"]
    if kind == "llama":
        names["transformer.ln_f"] = ["model.norm"]
    for i in range(n_layer):
        ours = f"transformer.h.{i}"
        theirs = f"model.layers.{i}"
        # Our c_attn is query, key and value, one above the other.
        qkv = [f"{theirs}.self_attn.{x}_proj" for x in "qkv"]
        names[f"{ours}.attn.c_attn"] = qkv
        names[f"{ours}.attn.c_proj"] = [f"{theirs}.self_attn.o_proj"]
        if kind == "nanochat":
            names[f"{ours}.mlp.c_fc"] = [f"{theirs}.mlp.fc1"]
            names[f"{ours}.mlp.c_proj"] = [f"{theirs}.mlp.fc2"]
        else:
            names[f"{ours}.ln_1"] = [f"{theirs}.input_layernorm"]
            names[f"{ours}.ln_2"] = [f"{theirs}.post_attention_layernorm"]
            names[f"{ours}.mlp.c_fc"] = [f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj"]
            names[f"{ours}.mlp.c_proj"] = [f"{theirs}.mlp.down_proj"]
    return names


def convert_rope_layout(kind, name, weight, n_head):
    """NanoChat rotates in the other direction: negate the second half of each query and key head.

    The angles between queries and keys stay the same. This is its own inverse.
    """
    if kind != "nanochat" or not name.endswith(("q_proj", "k_proj")):
        return weight
    first, second = weight.unflatten(0, (n_head, 2, -1)).unbind(1)
    return torch.stack((first, -second), 1).view_as(weight)


def rope_from_hf_tensors(kind, tensors, config):
    """Our state dict from NanoChat's or Llama's; tensors without a counterpart stay in it."""
    state = dict(tensors)
    for ours, theirs in rope_names(
        kind, config["n_layer"], config.get("tie_embeddings", True)
    ).items():
        parts = []
        for name in theirs:
            weight = state.pop(f"{name}.weight")
            parts.append(convert_rope_layout(kind, name, weight, config["n_head"]))
        state[f"{ours}.weight"] = torch.cat(parts)
    return state


def rope_to_hf_tensors(kind, state, c):
    tensors = {}
    for ours, theirs in rope_names(kind, c.n_layer, c.tie_embeddings).items():
        parts = state[f"{ours}.weight"].chunk(len(theirs))
        for name, part in zip(theirs, parts, strict=True):
            tensors[f"{name}.weight"] = convert_rope_layout(kind, name, part, c.n_head)
    return tensors


# -- to Hugging Face ----------------------------------------------------------------
def to_hugging_face(model, vocab_size):
    """(config.json's dict, {name: tensor}) of a GPT, its tables cut to vocab_size rows."""
    c = model.config
    kind = find_architecture(c)
    config = {**config_to_hf(kind, c), "vocab_size": vocab_size}
    state = model.state_dict()
    tensors = transpose_conv1d(state) if kind == "gpt2" else rope_to_hf_tensors(kind, state, c)
    if c.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    # The rows that pad the vocabulary are only ours.
    for name in ("transformer.wte.weight", "model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][:vocab_size]
    return config, tensors


# -- from Hugging Face --------------------------------------------------------------
def read_hugging_face(source):
    """(config, state) of a model on the hub ("gpt2", "distilbert/distilgpt2") or a local folder.

    config is a GPTConfig as a dict, state the state dict of such a GPT, float32. Reads safetensors
    or .bin files, sharded or not, of GPT-2 (GPT2LMHeadModel or GPT2Model), and of what export.py
    writes. Raises UserError for anything else.
    """
    folder = source if os.path.isdir(source) else download_model(source)
    try:
        with open(f"{folder}/config.json") as f:
            hf = json.load(f)
    except (OSError, ValueError) as e:
        raise UserError(
            f"{source}: not a Hugging Face model folder, its config.json cannot be read ({e})"
        )
    kind = hf.get("model_type", "gpt2")
    if kind not in CLASSES:
        raise UserError(
            f"{source}: its config.json says model_type={kind}; known are {', '.join(CLASSES)}"
        )
    try:
        config = config_from_hf(kind, hf, source)
    except (KeyError, TypeError) as e:
        raise UserError(f"{source}: its config.json has no {e}")

    tensors = read_hf_tensors(folder)
    # The embedding is named differently, but always there.
    names = [name for name in tensors if name.endswith(("wte.weight", "embed_tokens.weight"))]
    if not names:
        raise UserError(f"{source}: holds no GPT-2, there is no wte.weight among its tensors")
    wte = tensors[names[0]]
    if config.get("tie_embeddings", True):
        lm_head = tensors.pop("lm_head.weight", wte)
        if not torch.equal(lm_head, wte):
            raise UserError(f"{source}: its lm_head differs from its embedding; GPT-2 ties the two")
    # Rename, transpose and concatenate to our state dict.
    if kind == "gpt2":
        if not names[0].startswith("transformer."):  # a GPT2Model, which has no language-model head
            tensors = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
        tensors = transpose_conv1d(tensors)
    else:
        try:
            tensors = rope_from_hf_tensors(kind, tensors, config)
        except KeyError as e:
            raise UserError(f"{source}: holds no {e}")

    state = {}
    for name, tensor in tensors.items():
        # Old versions of transformers saved the causal mask.
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            state[name] = tensor.float().contiguous()
    state.setdefault("lm_head.weight", state["transformer.wte.weight"])
    for name in ("transformer.wte.weight", "lm_head.weight"):
        padding = -len(state[name]) % 64  # see GPT.__init__
        state[name] = F.pad(state[name], (0, 0, 0, padding))
    return config, state


def download_model(name):
    """The local folder of a model on the hub, from the Hugging Face cache or downloaded once."""
    from huggingface_hub import constants, snapshot_download

    # OpenAI's models have moved to an organization of their own.
    repository = f"openai-community/{name}" if name in OPENAI_MODELS else name
    files = ["config.json", "*.safetensors*", "tokenizer*.json", "vocab.json", "added_tokens.json"]
    for local_files_only in (
        True,
        False,
    ):  # OpenAI's weights never change: the cache needs no network
        reason = "it has no safetensors"
        try:
            folder = snapshot_download(
                repository, allow_patterns=files, local_files_only=local_files_only
            )
            if any(file.endswith(".safetensors") for file in os.listdir(folder)):
                return folder
        except (OSError, ValueError) as e:
            reason = type(e).__name__
    raise UserError(
        f"cannot get {repository}: not in {constants.HF_HUB_CACHE}, and the hub cannot be reached "
        f"or has no safetensors of it ({reason}): go online once, or name a folder"
    )


def read_hf_tensors(folder):
    """{name: tensor} of all weights in a Hugging Face folder; safetensors are preferred to .bin."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        path = f"{folder}/{stem}"
        paths = weight_files(path)
        if not paths:
            continue
        tensors = {}
        for path in paths:
            tensors |= read_weight_file(path)
        return tensors
    raise UserError(f"{folder}: holds no model.safetensors or pytorch_model.bin, sharded or not")


def weight_files(path):
    """[path], or the shards that path.index.json lists; [] if there is neither."""
    index = path + ".index.json"
    if not os.path.exists(index):
        return [path] if os.path.exists(path) else []
    try:
        with open(index) as f:
            names = sorted(set(json.load(f)["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as e:
        raise UserError(f"{index}: cannot be read ({type(e).__name__}: {e})")
    return [os.path.join(os.path.dirname(path), name) for name in names]


def read_weight_file(path):
    """{name: tensor} of one .safetensors or .bin file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.endswith(".safetensors"):
        return load_checkpoint(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: cannot be read ({e})")


def tokenizer_from_folder(folder, vocab_size):
    """The tiktoken.Encoding of a Hugging Face folder: its own, or the one vocab_size implies."""
    # Its own tokenizer, or one of the two that can be recognized by their size.
    files = ("tokenizer.json", "vocab.json")
    if any(os.path.exists(f"{folder}/{name}") for name in files):
        enc = load_tokenizer(folder)
        if enc.n_vocab > vocab_size:
            raise UserError(
                f"{folder}: its tokenizer has {enc.n_vocab} tokens, its model only {vocab_size}"
            )
        return enc
    if vocab_size == 257:
        return load_tokenizer("bytes")
    if 50257 <= vocab_size < 50257 + 64:  # perhaps padded
        return load_tokenizer("gpt2")
    raise UserError(
        f"{folder}: no tokenizer.json, and {vocab_size} tokens are neither gpt2's nor bytes'"
    )
