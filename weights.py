"""The files that a model comes from: checkpoints of ours, OpenAI's weights, Hugging Face folders, tokenizers.

They are read for model.py's load_model(), and turned into what model.py calls them.
"""

import json
import os
import pickle
import re
import sys

from tokenizer import load_tokenizer

import torch
from torch.nn import functional as F

OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def find_checkpoint(ckpt, log_dir):
    """The path of a .pt file, or of the latest, by its step, or best, by its validation loss, of log_dir; or exits."""
    if ckpt not in ("latest", "best"):
        if not os.path.isfile(ckpt):
            choices = f"latest, best, {', '.join(OPENAI_MODELS)}, a .pt file or a Hugging Face folder"
            sys.exit(f"{ckpt}: no such checkpoint; use {choices}")
        return ckpt
    names = os.listdir(log_dir) if os.path.isdir(log_dir) else []
    found = {int(m[1]): os.path.join(log_dir, m[0]) for name in names if (m := re.fullmatch(r"model_(\d+)\.pt", name))}
    if not found:
        sys.exit(f"no checkpoint in {log_dir}/: python train_gpt2.py makes one, --ckpt= or --init_from= names another")
    if ckpt == "latest":
        return found[max(found)]
    losses = {path: load_checkpoint(path, mmap=True).get("val_loss") for path in found.values()}
    losses = {path: loss for path, loss in losses.items() if loss is not None and loss == loss}
    return min(losses, key=losses.get) if losses else sys.exit(f"no checkpoint in {log_dir}/ has a validation loss")


class PeersConfig:
    """What build-nanogpt's checkpoints hold as __main__.GPTConfig: its values are all that is taken from them."""


def load_checkpoint(path, mmap=False):
    """The dict in a .pt file, on the CPU. Plain tensors and values only: a file with code is refused."""
    try:
        with torch.serialization.safe_globals([(PeersConfig, "__main__.GPTConfig")]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        sys.exit(f"{path}: refused, it holds something else than tensors and plain values")
    except Exception as e:  # torch's reader raises whatever its parts do on a file that is none
        why = str(e).partition("\n")[0].partition(". ")[0] or type(e).__name__
        back = "; --resume_step= goes back to an earlier one" if "resume" in os.path.basename(path) else ""
        sys.exit(f"{path}: not a whole checkpoint file ({why}){back}")


def read_checkpoint(path):
    """(config, state, tokenizer, step) of a .pt file: ours, nanoGPT's ckpt.pt or build-nanogpt's model_*.pt.

    nanoGPT computes GELU exactly, and this project by tanh: its losses differ in the fourth digit here.
    """
    saved = load_checkpoint(path)
    try:
        if "tokenizer" in saved:
            return saved["config"], saved["model"], saved["tokenizer"], saved.get("step", 0)
        theirs = saved["model_args"] if "model_args" in saved else vars(saved["config"])
        config = {"vocab_size": 50257, "bias": theirs.get("bias", True)}
        config |= {key: theirs[key] for key in ("block_size", "n_layer", "n_head", "n_embd")}
        state = {name.removeprefix("_orig_mod."): tensor for name, tensor in saved["model"].items()}
        state = {name: tensor for name, tensor in state.items() if not name.endswith(".attn.bias")}  # a causal mask
        wte, step = state["transformer.wte.weight"], saved.get("iter_num", saved.get("step"))
    except (KeyError, TypeError, AttributeError) as e:
        sys.exit(f"{path}: not a checkpoint of this project's GPT-2, of nanoGPT or build-nanogpt ({e})")
    if len(wte) not in (50257, 50304):
        sys.exit(f"{path}: its {len(wte)} tokens are not GPT-2's: are they meta.pkl's characters?")
    state["transformer.wte.weight"] = state["lm_head.weight"] = F.pad(wte, (0, 0, 0, 50304 - len(wte)))
    return config, state, "gpt2", step


def read_hugging_face(source):
    """(config, state) of a model on the hub, by its name ("gpt2", "distilbert/distilgpt2"), or a local folder.

    config is a GPTConfig as a dict, state the state dict of such a GPT. Reads safetensors or .bin files, whole or
    sharded, of a GPT2LMHeadModel or GPT2Model, and of what export.py writes; exits with one line for anything else.
    """
    folder = source if os.path.isdir(source) else download_model(source)
    try:
        with open(os.path.join(folder, "config.json")) as f:
            hf = json.load(f)
    except (OSError, ValueError) as e:
        sys.exit(f"{source}: not a Hugging Face model folder, its config.json cannot be read ({e})")
    kind = hf.get("model_type")
    try:
        config = llama_config(hf, source) if kind in LLAMAS else gpt2_config(hf, source)
    except (KeyError, TypeError) as e:
        sys.exit(f"{source}: its config.json has no {e}")
    tensors, state = read_hf_tensors(folder), {}
    wte = next((name for name in tensors if name.endswith(("wte.weight", "embed_tokens.weight"))), None)
    if wte is None:
        sys.exit(f"{source}: holds no GPT-2, there is no wte.weight among its tensors")
    if config.get("tied", True) and not torch.equal(tensors.pop("lm_head.weight", tensors[wte]), tensors[wte]):
        sys.exit(f"{source}: its lm_head differs from its embedding; GPT-2 ties the two")
    if kind in LLAMAS:
        try:
            for ours, theirs in llama_names(kind, config["n_layer"], config["tied"]).items():
                parts = [turned(kind, x, tensors.pop(f"{x}.weight"), config["n_head"]) for x in theirs]
                state[f"{ours}.weight"] = torch.cat(parts).float()
        except KeyError as e:
            sys.exit(f"{source}: holds no {e}")
    for name, tensor in tensors.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask, which old transformers versions saved
        if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            tensor = tensor.t().contiguous()  # OpenAI's Conv1D holds (in, out)
        # a GPT2Model is one without the language-model head
        state[name if wte.startswith(("transformer.", "model.")) else f"transformer.{name}"] = tensor.float()
    state.setdefault("lm_head.weight", state["transformer.wte.weight"])
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state[name] = F.pad(state[name], (0, 0, 0, -len(state[name]) % 64))  # as model.py has it
    return config, state


def download_model(name):
    """The local folder of a model on the hub, from the Hugging Face cache or, once, from there."""
    from huggingface_hub import constants, snapshot_download

    repository = f"openai-community/{name}" if name in OPENAI_MODELS else name
    files = ["config.json", "*.safetensors*", "tokenizer*.json", "vocab.json", "added_tokens.json"]
    for cached in (True, False):  # OpenAI's weights never change: what is in the cache needs no network
        why = "it has no safetensors"
        try:
            folder = snapshot_download(repository, allow_patterns=files, local_files_only=cached)
            if any(name.endswith(".safetensors") for name in os.listdir(folder)):
                return folder
        except (OSError, ValueError) as e:
            why = type(e).__name__
    why = f"not in {constants.HF_HUB_CACHE}, and the hub cannot be reached or has no safetensors of it ({why})"
    sys.exit(f"cannot get {repository}: {why}: go online once, or name a folder")


def gpt2_config(hf, source):
    """The GPTConfig, as a dict, of a Hugging Face config.json; exits for what is not GPT-2 as released."""
    released = {"model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")}
    released |= {"layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,), "add_cross_attention": (False,)}
    released |= {"scale_attn_by_inverse_layer_idx": (False,), "n_inner": (None, 4 * hf.get("n_embd", 0))}
    refuse_others(hf, source, released, "GPT-2 as released")
    config = {key: hf[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    return config | {"block_size": hf["n_positions"]}


def refuse_others(hf, source, known, whose):
    for key, values in known.items():
        if hf.get(key, values[0]) not in values:
            sys.exit(f"{source}: its config.json says {key}={hf[key]}; {whose} has {values[0]}")


# {model type: class} of what is this project's with pos=rope, and of which export.py writes some.
LLAMAS = {"llama": "Llama", "qwen3": "Qwen3", "nanochat": "NanoChat"}


def llama_config(hf, source):
    """The same of one of LLAMAS; exits for what export.py does not write."""
    n_embd, n_head, nanochat = hf["hidden_size"], hf["num_attention_heads"], hf["model_type"] == "nanochat"
    acts = {"relu2": "relu2", "gelu_pytorch_tanh": "gelu"} if nanochat else {"silu": "swiglu"}
    width = 4 * n_embd if nanochat else round(8 * n_embd / 3 / 8) * 8
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta, kind = rope.get("rope_theta", hf.get("rope_theta", 1e4)), rope.get("rope_type", "default")
    known = {"num_key_value_heads": (n_head,), "head_dim": (n_embd // n_head, None), "intermediate_size": (width,)}
    known |= {"rms_norm_eps": (1e-6 if nanochat else 1e-5,), "rope_theta": (1e4,), "rope_type": ("default",)}
    known |= {"attention_bias": (False,), "mlp_bias": (False,)}
    known |= {} if nanochat else {"tie_word_embeddings": (True,)}
    known |= {"hidden_act": tuple(acts)}
    refuse_others(hf | {"rope_theta": theta, "rope_type": kind}, source, known, "what export.py writes")
    config = {"n_layer": hf["num_hidden_layers"], "n_head": n_head, "n_embd": n_embd, "bias": False, "pos": "rope"}
    config |= {"vocab_size": hf["vocab_size"], "block_size": hf["max_position_embeddings"]}
    config |= {"mlp": acts[hf["hidden_act"]], "qk_norm": hf["model_type"] != "llama", "norm": "rmsnorm"}
    config |= {"tied": not nanochat or hf.get("tie_word_embeddings", False)}
    if nanochat:
        config |= {"norm": "weightless", "embd_norm": True, "softcap": hf.get("final_logit_softcapping", 15) or 0}
    return config


def llama_names(kind, n_layer, tied):
    """{a weight of ours: the weights of one of LLAMAS that it is, one above the other}."""
    block = {"attn.c_attn": [f"self_attn.{x}_proj" for x in "qkv"], "attn.c_proj": ["self_attn.o_proj"]}
    names = {"transformer.wte": ["model.embed_tokens"]} | ({} if tied else {"lm_head": ["lm_head"]})
    if kind == "nanochat":
        block |= {"mlp.c_fc": ["mlp.fc1"], "mlp.c_proj": ["mlp.fc2"]}
    else:
        block |= {"ln_1": ["input_layernorm"], "ln_2": ["post_attention_layernorm"]}
        block |= {"mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"], "mlp.c_proj": ["mlp.down_proj"]}
        block |= {f"attn.{x}_norm": [f"self_attn.{x}_norm"] for x in "qk" if kind == "qwen3"}
        names |= {"transformer.ln_f": ["model.norm"]}
    for i in range(n_layer):
        names |= {f"transformer.h.{i}.{k}": [f"model.layers.{i}.{x}" for x in theirs] for k, theirs in block.items()}
    return names


def turned(kind, name, weight, n_head):
    """A query or key weight (n_head * hs, C) of ours as NanoChat's, whose rotary embedding turns back; and vice versa.

    With the second half of each head negated, the angles between queries and keys are the same.
    """
    if kind != "nanochat" or not name.endswith(("q_proj", "k_proj")):
        return weight
    a, b = weight.unflatten(0, (n_head, 2, -1)).unbind(1)
    return torch.stack((a, -b), 1).view_as(weight)


def read_hf_tensors(folder):
    """{name: tensor} of all weights in a Hugging Face folder, safetensors before .bin."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for stem in ("model.safetensors", "pytorch_model.bin"):
        path = os.path.join(folder, stem)
        paths = [path]
        if os.path.exists(path + ".index.json"):
            try:
                with open(path + ".index.json") as f:
                    names = sorted(set(json.load(f)["weight_map"].values()))
            except (OSError, ValueError, KeyError, AttributeError) as e:
                sys.exit(f"{path}.index.json: cannot be read ({type(e).__name__}: {e})")
            paths = [os.path.join(folder, name) for name in names]
        if paths != [path] or os.path.exists(path):
            tensors = {}
            for path in paths:
                try:
                    tensors |= load_file(path) if path.endswith(".safetensors") else load_checkpoint(path)
                except (OSError, SafetensorError) as e:
                    sys.exit(f"{path}: cannot be read ({e})")
            return tensors
    sys.exit(f"{folder}: holds neither model.safetensors nor pytorch_model.bin, whole or sharded")


def tokenizer_beside(source, vocab_size):
    """The tiktoken.Encoding of a Hugging Face folder: its own, or that of the model's vocab_size."""
    if any(os.path.exists(os.path.join(source, name)) for name in ("tokenizer.json", "vocab.json")):
        enc = load_tokenizer(source)
        if enc.n_vocab > vocab_size:
            sys.exit(f"{source}: its tokenizer has {enc.n_vocab} tokens, its model only {vocab_size}")
        return enc
    names = {257: "bytes"} | dict.fromkeys(range(50257, 50257 + 64), "gpt2")  # 64: a padded vocabulary
    if vocab_size not in names:
        sys.exit(f"{source}: no tokenizer.json, and {vocab_size} tokens are neither gpt2's vocabulary nor bytes'")
    return load_tokenizer(names[vocab_size])
