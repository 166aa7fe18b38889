"""The files that a model comes from: checkpoints of ours, OpenAI's weights, Hugging Face folders, tokenizers.

They are read for model.py's load_model(), and turned into what model.py calls them.
"""

import json
import os
import pickle
import re
import sys

from tokenizer import load_hugging_face, load_tokenizer, load_vocab_json

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
        sys.exit(f"no checkpoint in {log_dir}/: python train_gpt2.py makes one, --ckpt= names another")
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
        sys.exit(f"{path}: not a whole checkpoint file ({str(e).partition(chr(10))[0] or type(e).__name__})")


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
    """(config, state) of an OpenAI name ("gpt2" ... "gpt2-xl") or a local Hugging Face folder.

    config is a GPTConfig as a dict, state the state dict of such a GPT. Reads safetensors or .bin files, whole or
    sharded, of a GPT2LMHeadModel or a GPT2Model; exits with one line for anything else.
    """
    folder = download_openai(source) if source in OPENAI_MODELS else source
    try:
        with open(os.path.join(folder, "config.json")) as f:
            hf = json.load(f)
    except (OSError, ValueError) as e:
        sys.exit(f"{source}: not a Hugging Face model folder, its config.json cannot be read ({e})")
    config = config_from_hf(hf, source)
    tensors = read_hf_tensors(folder)
    if "wte.weight" in tensors:  # a GPT2Model, without the language-model head
        tensors = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    if "transformer.wte.weight" not in tensors:
        sys.exit(f"{source}: holds no GPT-2, there is no wte.weight among its tensors")
    wte = tensors["transformer.wte.weight"]
    if not torch.equal(tensors.pop("lm_head.weight", wte), wte):
        sys.exit(f"{source}: its lm_head differs from its embedding; GPT-2 ties the two")
    state = {}
    for name, tensor in tensors.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask, which old transformers versions saved
        if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            tensor = tensor.t().contiguous()  # OpenAI's Conv1D holds (in, out)
        state[name] = tensor.float()
    padding = -len(wte) % 64  # model.py's vocabularies are multiples of 64
    state["transformer.wte.weight"] = F.pad(state["transformer.wte.weight"], (0, 0, 0, padding))
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return config, state


def download_openai(name):
    """The local folder of OpenAI's weights, from the Hugging Face cache or, once, its hub."""
    from huggingface_hub import constants, hf_hub_download

    for file in ("config.json", "model.safetensors"):
        for cached in (True, False):  # the weights never change: what is in the cache needs no network
            try:
                path = hf_hub_download(f"openai-community/{name}", file, local_files_only=cached)
                break
            except (OSError, ValueError) as e:
                if not cached:
                    why = f"not in {constants.HF_HUB_CACHE}, and the hub cannot be reached ({type(e).__name__})"
                    sys.exit(f"cannot get {file} of openai-community/{name}: {why}: go online once, or name a folder")
    return os.path.dirname(path)


def config_from_hf(hf, source):
    """The GPTConfig, as a dict, of a Hugging Face config.json; exits for what is not GPT-2 as released."""
    released = {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    for key, value in released.items():
        if hf.get(key, value) != value:
            sys.exit(f"{source}: its config.json says {key}={hf[key]}; GPT-2 as released has {value}")
    try:
        config = {key: hf[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
        config["block_size"] = hf["n_positions"]
    except KeyError as e:
        sys.exit(f"{source}: its config.json has no {e}")
    if hf.get("n_inner") not in (None, 4 * config["n_embd"]):
        sys.exit(f"{source}: its config.json says n_inner={hf['n_inner']}; GPT-2 as released has 4 * n_embd")
    return config


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
    path = os.path.join(source, "tokenizer.json")
    if os.path.exists(path):
        enc = load_hugging_face(path)
        if enc.n_vocab > vocab_size:
            sys.exit(f"{source}: its tokenizer has {enc.n_vocab} tokens, its model only {vocab_size}")
        return enc
    if os.path.exists(os.path.join(source, "vocab.json")):
        return load_vocab_json(os.path.join(source, "vocab.json"))
    names = {257: "bytes"} | dict.fromkeys(range(50257, 50257 + 64), "gpt2")  # 64: a padded vocabulary
    if vocab_size not in names:
        sys.exit(f"{source}: no tokenizer.json, and {vocab_size} tokens are neither gpt2's vocabulary nor bytes'")
    return load_tokenizer(names[vocab_size])
