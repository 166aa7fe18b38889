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
from files import check_lfs_pointer
from script import UserError
from weights import load_checkpoint

import torch
from torch.nn import functional as F

OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# For each architecture, the fields of GPTConfig that differ from the defaults...
REQUIRED = {
    "gpt2": {},
    "nanochat": {
        "pos": "rope",
        "norm": "rmsnorm_noaffine",
        "qk_norm": True,
        "bias": False,
        "embd_norm": True,
    },
    "llama": {"pos": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False},
}
# ... and those that may have any value: sizes, what only matters before training, and some more.
SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
FREE = {"gpt2": (), "nanochat": ("mlp", "softcap", "tie_embeddings"), "llama": ()}


def find_architecture(c):
    """The architecture of transformers that a GPTConfig has; raises UserError if there is none."""
    defaults = dataclasses.asdict(type(c)())
    config = dataclasses.asdict(c)
    differences = {}
    for architecture, required in REQUIRED.items():
        # All fields count, also those that GPTConfig will get later, so that a new option is never
        # exported as something that it is not.
        ignored = (*SIZES, "zero_init", *FREE[architecture])
        different = []
        for key, value in {**defaults, **required}.items():
            if key not in ignored and config[key] != value:
                different.append(f"{key}={config[key]}")
        # NanoChat has relu2 or GELU, but no SwiGLU.
        if architecture == "nanochat" and c.mlp == "swiglu":
            different.append("mlp=swiglu")
        if not different:
            return architecture
        differences[architecture] = different
    # Name what is in the way of the architecture that comes closest.
    closest = min(differences, key=lambda architecture: len(differences[architecture]))
    raise UserError(
        f"no architecture of transformers has these settings ({closest} differs in "
        f"{', '.join(differences[closest])}); --format=pt and onnx take any"
    )


def check_config_values(hf, source, supported):
    """Raise UserError if a value in config.json is not one of those supported, {key: values}."""
    for key, values in supported.items():
        value = hf.get(key, values[0])
        if value not in values:
            raise UserError(
                f"{source}: its config.json says {key}={value}; this project supports {values[0]}"
            )


# -- configurations: GPT-2 ----------------------------------------------------------
def gpt2_config_from_hf(hf, source):
    """A GPTConfig, as a dict, from config.json; raises UserError unless it is GPT-2 as released."""
    # export.py writes the first value of each; the others mean the same mathematics.
    supported = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "add_cross_attention": (False,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "n_inner": (None, 4 * hf["n_embd"]),
    }
    check_config_values(hf, source, supported)
    config = {key: hf[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    return {**config, "block_size": hf["n_positions"]}


def gpt2_config_to_hf(c):
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_positions": c.block_size,
        "n_ctx": c.block_size,  # its former name, which llama.cpp reads
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "n_embd": c.n_embd,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


# -- configurations: NanoChat and Llama ---------------------------------------------
def rope_config_from_hf(hf, source):
    """A GPTConfig, as a dict, from config.json of a NanoChat or Llama that a GPTConfig can be."""
    architecture = hf["model_type"]
    config = {
        **REQUIRED[architecture],
        "block_size": hf["max_position_embeddings"],
        "vocab_size": hf["vocab_size"],
        "n_layer": hf["num_hidden_layers"],
        "n_head": hf["num_attention_heads"],
        "n_embd": hf["hidden_size"],
    }
    n_embd = config["n_embd"]
    supported = {
        "num_key_value_heads": (config["n_head"],),
        "head_dim": (n_embd // config["n_head"], None),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_theta": (1e4,),
        "rope_type": ("default",),
    }
    if architecture == "nanochat":
        supported["intermediate_size"] = (4 * n_embd,)
        supported["rms_norm_eps"] = (1e-6,)
        supported["hidden_act"] = ("relu2", "gelu_pytorch_tanh")
        config["mlp"] = "gelu" if hf["hidden_act"] == "gelu_pytorch_tanh" else "relu2"
        config["softcap"] = hf.get("final_logit_softcapping", 15) or 0.0
        config["tie_embeddings"] = hf.get("tie_word_embeddings", False)
    else:
        supported["intermediate_size"] = (round(8 * n_embd / 3 / 8) * 8,)
        supported["rms_norm_eps"] = (1e-5,)
        supported["hidden_act"] = ("silu",)
        supported["tie_word_embeddings"] = (True,)
    # Where transformers keeps the settings of the rotary embedding depends on its version.
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    check_config_values({**hf, **rope}, source, supported)
    return config


def rope_config_to_hf(c, architecture, intermediate_size):
    is_nanochat = architecture == "nanochat"
    config = {
        "architectures": ["NanoChatForCausalLM" if is_nanochat else "LlamaForCausalLM"],
        "model_type": architecture,
        "max_position_embeddings": c.block_size,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_head,
        "hidden_size": c.n_embd,
        "head_dim": c.n_embd // c.n_head,
        "intermediate_size": intermediate_size,
        "hidden_act": {"swiglu": "silu", "gelu": "gelu_pytorch_tanh", "relu2": "relu2"}[c.mlp],
        "rms_norm_eps": 1e-6 if is_nanochat else 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        # Older versions of transformers read the first two, newer ones rope_parameters.
        "rope_theta": 1e4,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    if is_nanochat:
        config["final_logit_softcapping"] = c.softcap or None
    return config


# -- weights ------------------------------------------------------------------------
def transpose_conv1d(tensors):
    """GPT-2's linear layers are OpenAI's Conv1D, which holds (in, out). This is its own inverse."""
    transposed = {}
    for name, tensor in tensors.items():
        if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            tensor = tensor.t()
        transposed[name] = tensor
    return transposed


def rope_names(architecture, n_layer, tie_embeddings):
    """{our parameter: NanoChat's or Llama's parameters, concatenated along dim 0}."""
    # Embedding, output layer, last norm, then the blocks.
    names = {"transformer.wte": ["model.embed_tokens"]}
    if not tie_embeddings:
        names["lm_head"] = ["lm_head"]
    if architecture == "llama":
        names["transformer.ln_f"] = ["model.norm"]
    for i in range(n_layer):
        ours = f"transformer.h.{i}"
        theirs = f"model.layers.{i}"
        # Our c_attn is query, key and value, one above the other.
        qkv = [f"{theirs}.self_attn.{x}_proj" for x in "qkv"]
        names[f"{ours}.attn.c_attn"] = qkv
        names[f"{ours}.attn.c_proj"] = [f"{theirs}.self_attn.o_proj"]
        if architecture == "nanochat":
            names[f"{ours}.mlp.c_fc"] = [f"{theirs}.mlp.fc1"]
            names[f"{ours}.mlp.c_proj"] = [f"{theirs}.mlp.fc2"]
        else:
            names[f"{ours}.ln_1"] = [f"{theirs}.input_layernorm"]
            names[f"{ours}.ln_2"] = [f"{theirs}.post_attention_layernorm"]
            names[f"{ours}.mlp.c_fc"] = [f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj"]
            names[f"{ours}.mlp.c_proj"] = [f"{theirs}.mlp.down_proj"]
    return names


def convert_rope_layout(architecture, name, weight, n_head):
    """NanoChat rotates in the other direction: negate the second half of each query and key head.

    The angles between queries and keys stay the same. This is its own inverse.
    """
    if architecture != "nanochat" or not name.endswith(("q_proj", "k_proj")):
        return weight
    first, second = weight.unflatten(0, (n_head, 2, -1)).unbind(1)
    return torch.stack((first, -second), 1).view_as(weight)


def rope_from_hf_tensors(architecture, tensors, config):
    """Our state dict from NanoChat's or Llama's; tensors without a counterpart stay in it."""
    state = dict(tensors)
    for ours, theirs in rope_names(
        architecture, config["n_layer"], config.get("tie_embeddings", True)
    ).items():
        # Several of theirs make one of ours: query, key and value are c_attn.
        parts = []
        for name in theirs:
            weight = state.pop(f"{name}.weight")
            parts.append(convert_rope_layout(architecture, name, weight, config["n_head"]))
        state[f"{ours}.weight"] = torch.cat(parts)
    return state


def rope_to_hf_tensors(architecture, state, c):
    tensors = {}
    for ours, theirs in rope_names(architecture, c.n_layer, c.tie_embeddings).items():
        parts = state[f"{ours}.weight"].chunk(len(theirs))
        for name, part in zip(theirs, parts, strict=True):
            tensors[f"{name}.weight"] = convert_rope_layout(architecture, name, part, c.n_head)
    return tensors


# -- to Hugging Face ----------------------------------------------------------------
def to_hugging_face(model, vocab_size):
    """(config.json's dict, {name: tensor}) of a GPT, its tables cut to vocab_size rows."""
    c = model.config
    architecture = find_architecture(c)
    if architecture == "gpt2":
        config = gpt2_config_to_hf(c)
        tensors = transpose_conv1d(model.state_dict())
    else:
        width = model.transformer.h[0].mlp.c_proj.in_features
        config = rope_config_to_hf(c, architecture, width)
        tensors = rope_to_hf_tensors(architecture, model.state_dict(), c)
    # Tied weights are stored once, and the rows that pad the vocabulary not at all.
    if c.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    for name in ("transformer.wte.weight", "model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][:vocab_size]
    config["vocab_size"] = vocab_size
    config["tie_word_embeddings"] = c.tie_embeddings
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
    architecture = hf.get("model_type", "gpt2")
    if architecture not in REQUIRED:
        raise UserError(
            f"{source}: model_type={architecture} in config.json; known are {', '.join(REQUIRED)}"
        )
    try:
        from_hf = gpt2_config_from_hf if architecture == "gpt2" else rope_config_from_hf
        config = from_hf(hf, source)
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
    if architecture == "gpt2":
        if not names[0].startswith("transformer."):  # a GPT2Model, which has no language-model head
            tensors = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
        tensors = transpose_conv1d(tensors)
    else:
        try:
            tensors = rope_from_hf_tensors(architecture, tensors, config)
        except KeyError as e:
            raise UserError(f"{source}: the tensor {e} is missing")

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
    # First the cache, which needs no network: OpenAI's weights never change. Then the hub.
    for from_cache in (True, False):
        reason = "it has no safetensors"
        try:
            folder = snapshot_download(
                repository, allow_patterns=files, local_files_only=from_cache
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
        check_lfs_pointer(path)
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: cannot be read ({e})")


def tokenizer_from_folder(folder, vocab_size):
    """The tiktoken.Encoding of a Hugging Face folder: its own, or the one vocab_size implies."""
    files = ("tokenizer.json", "vocab.json")
    if any(os.path.exists(f"{folder}/{name}") for name in files):
        enc = load_tokenizer(folder)
        if enc.n_vocab > vocab_size:
            raise UserError(
                f"{folder}: its tokenizer has {enc.n_vocab} tokens, its model only {vocab_size}"
            )
        return enc
    # Without one, two tokenizers can be recognized by their size.
    if vocab_size == 257:
        return load_tokenizer("bytes")
    if 50257 <= vocab_size < 50257 + 64:  # perhaps padded
        return load_tokenizer("gpt2")
    raise UserError(
        f"{folder}: no tokenizer.json, and {vocab_size} tokens are neither gpt2's nor bytes'"
    )
