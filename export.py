"""A checkpoint for the rest of the world: a Hugging Face folder, an ONNX file, or weights to share.

    python export.py --ckpt --out_dir=hf_model              # AutoModelForCausalLM and AutoTokenizer load it
    python export.py --format=onnx --out=model.onnx         # input_ids (batch, length) -> logits
    python export.py --format=pt --out=model.pt             # bfloat16, half the size; sample.py --ckpt=model.pt

The folder needs no code of ours: the model is a GPT2LMHeadModel or, where its settings are theirs, a NanoChat-, Llama-
or Qwen3ForCausalLM, without the rows that pad the vocabulary; the tokenizer is a byte-level BPE.
"""

import dataclasses
import itertools
import json
import logging
import os
import shutil
import sys

from configurator import configure
from model import GPTConfig, load_model
from shards import write_whole
from tokenizer import EOT, byte_characters, tokenizer_state
from weights import LLAMAS, llama_names, turned

import torch

# -- settings: override any with --key=value --------------------------------------
ckpt = "latest"  # latest or best (in log_dir), a .pt file, a name on the hub (gpt2, owner/name), or its folder
log_dir = "log"  # where latest is looked for
format = "hf"  # hf (a folder), onnx or pt (files)
out_dir = "hf_model"  # the folder of --format=hf
out = ""  # the file of --format=onnx and pt; empty: model.onnx, model.pt
dtype = "float32"  # of the folder's weights: float32, bfloat16 or float16

# Text on which the exported tokenizer must agree with the model's own.
PROBE = (
    f"It's 12345 o'clock.\n\n  def f(x):\n\treturn x  # naïve 日本語 🙂 ʼs ſ Σς İ {EOT}{EOT} I'LL  \r\n\r\n"
    " x\u00a0y \u200bz ½ ٣٤ _a-b \n \n"
)


def merges(ranks):
    """The pair of tokens that each token of a BPE is made of, in the order of rank."""
    found = []
    for token in sorted(ranks, key=ranks.get):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:  # encode the token itself, with only the merges that came before it
            pairs = [(ranks.get(a + b, ranks[token]), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
            i = min(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            found.append(tuple(parts))
    return found


def to_hugging_face(enc):
    """A tokenizers.Tokenizer that encodes as enc does; exits if it cannot."""
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        sys.exit("exporting a tokenizer needs tokenizers: pip install tokenizers (transformers brings it)")
    characters = byte_characters()

    def text(token):
        return "".join(characters[b] for b in token)

    ranks = enc._mergeable_ranks
    pairs = [(text(a), text(b)) for a, b in merges(ranks)]
    vocab = {text(token): i for token, i in ranks.items()} | enc._special_tokens
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=True))
    pieces = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=enc.name == "gpt2")]
    if enc.name not in ("gpt2", "bytes"):
        pieces.insert(0, pre_tokenizers.Split(Regex(enc._pat_str), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces) if len(pieces) > 1 else pieces[0]
    tokenizer.decoder = decoders.ByteLevel()
    special = sorted(enc._special_tokens, key=enc._special_tokens.get)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    if tokenizer.encode(PROBE).ids != enc.encode(PROBE, allowed_special="all"):
        why = "its pattern means something else to Hugging Face's tokenizers; those of train_tokenizer.py do not"
        sys.exit(f"the tokenizer {enc.name} cannot be exported: {why}")
    return tokenizer


def gpt2(model):
    """(config.json's dict, {name: tensor}) of a model as transformers' GPT2LMHeadModel."""
    c = model.config
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new"}
    config |= {"n_positions": c.block_size, "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head}
    config |= {"n_inner": None, "layer_norm_epsilon": 1e-5}
    config |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    tensors = {}
    for name, tensor in model.state_dict().items():
        turned = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
        tensors[name] = tensor.t() if turned else tensor  # OpenAI's Conv1D holds (in, out)
    return config, tensors


def llama(model, kind):
    """The same as one of LLAMAS: LlamaForCausalLM, or one of its kin."""
    c = model.config
    acts = {"swiglu": "silu", "relu2": "relu2", "gelu": "gelu_pytorch_tanh"}
    config = {"architectures": [f"{LLAMAS[kind]}ForCausalLM"], "model_type": kind, "hidden_act": acts[c.mlp]}
    config |= {"hidden_size": c.n_embd, "intermediate_size": model.transformer.h[0].mlp.c_proj.in_features}
    config |= {"num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head, "num_key_value_heads": c.n_head}
    config |= {"head_dim": c.n_embd // c.n_head, "max_position_embeddings": c.block_size}
    config |= {"rms_norm_eps": model.transformer.ln_f.eps, "rope_theta": 10000.0, "rope_scaling": None}
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}  # transformers from 5 on
    config |= {"attention_bias": False, "mlp_bias": False}
    if kind == "nanochat":
        config["final_logit_softcapping"] = c.softcap or None
    weights, tensors = model.state_dict(), {}
    for ours, theirs in llama_names(kind, c.n_layer, c.tied).items():
        parts = weights[f"{ours}.weight"].chunk(len(theirs))
        tensors |= {f"{x}.weight": turned(kind, x, part, c.n_head) for x, part in zip(theirs, parts, strict=True)}
    return config, tensors


def to_architecture(model):
    """gpt2(model) or llama(model), whichever the model is; exits if it is neither."""
    c = model.config
    fields = ("pos", "norm", "mlp", "qk_norm", "bias", "embd_norm", "softcap", "tied")
    parts = {key: getattr(c, key) for key in fields}
    if parts == {key: getattr(GPTConfig, key) for key in fields}:
        return gpt2(model)
    same = (c.pos, c.bias) == ("rope", False)
    if same and (c.norm, c.qk_norm, c.embd_norm) == ("weightless", True, True) and c.mlp != "swiglu":
        return llama(model, "nanochat")
    if same and (c.norm, c.mlp, c.embd_norm, c.softcap, c.tied) == ("rmsnorm", "swiglu", False, 0, True):
        return llama(model, "qwen3" if c.qk_norm else "llama")
    parts = ", ".join(f"{key}={value}" for key, value in parts.items())
    sys.exit(f"no architecture of transformers has {parts}; --format=pt and onnx take any")


def write_folder(model, enc, folder, dtype):
    """Write config.json, model.safetensors, generation_config.json, tokenizer.json, tokenizer_config.json."""
    from safetensors.torch import save

    config, weights = to_architecture(model)
    tokenizer = to_hugging_face(enc)
    ends = {"bos_token_id": enc.eot_token, "eos_token_id": enc.eot_token, "pad_token_id": enc.eot_token}
    config |= {"vocab_size": enc.n_vocab, "tie_word_embeddings": model.config.tied, "dtype": str(dtype)[6:], **ends}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.block_size,
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), EOT),
    }
    if model.config.tied:
        weights.pop("lm_head.weight", None)
    for name in {"transformer.wte.weight", "model.embed_tokens.weight", "lm_head.weight"} & weights.keys():
        weights[name] = weights[name][: enc.n_vocab]
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
    files = {
        "config.json": json.dumps(config, indent=2).encode(),
        "generation_config.json": json.dumps(ends, indent=2).encode(),
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2).encode(),
        "model.safetensors": save(tensors, metadata={"format": "pt"}),
    }
    os.makedirs(folder, exist_ok=True)
    for name, content in files.items():
        write_whole(os.path.join(folder, name), lambda f, content=content: f.write(content))


def write_onnx(model, path):
    """Write the model as ONNX: input_ids (batch, length), int64, to logits (batch, length, vocab_size)."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        sys.exit("--format=onnx needs onnx and onnxscript: pip install onnx onnxscript")
    if 4 * model.num_params() > 2e9:
        sys.exit("--format=onnx: a file of ONNX holds 2 GB at most, this model is larger; use --format=hf")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which is not needed
    model.requires_grad_(False)  # no backward pass of our own in it
    length = torch.export.Dim("length", min=1, max=model.config.block_size)
    program = torch.onnx.export(
        model, (torch.zeros(2, 8, dtype=torch.long),),
        input_names=["input_ids"], output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch"), 1: length},),
        dynamo=True, verbose=False,
    )  # fmt: skip
    write_whole(path, lambda f: f.write(program.model_proto.SerializeToString()))


def write_pt(model, enc, path):
    """Write a checkpoint with the weights in bfloat16 and nothing of the run they come from."""
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    if model.config.tied:
        state["lm_head.weight"] = state["transformer.wte.weight"]  # one tensor, saved once
    checkpoint = {"model": state, "config": dataclasses.asdict(model.config), "tokenizer": tokenizer_state(enc)}
    checkpoint |= {"step": 0, "val_loss": None, "settings": {}}
    write_whole(path, lambda f: torch.save(checkpoint, f))


def main():
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if format not in ("hf", "onnx", "pt"):
        sys.exit(f"--format={format}: choose hf, onnx or pt")
    if dtype not in dtypes:
        sys.exit(f"--dtype={dtype}: choose {', '.join(dtypes)}")
    path = out_dir if format == "hf" else out or f"model.{format}"
    if os.path.exists(path) and not (format == "hf" and os.path.isdir(path) and not os.listdir(path)):
        sys.exit(f"{'--out_dir' if format == 'hf' else '--out'}={path}: exists already; choose another, or delete it")
    model, enc = load_model(ckpt, "cpu", log_dir)
    try:
        if format == "hf":
            write_folder(model, enc, path, dtypes[dtype])
            print(f"{path}: {model.num_params() / 1e6:.2f}M parameters in {dtype}, tokenizer {enc.name}")
            print(f"  AutoModelForCausalLM.from_pretrained({path!r}), AutoTokenizer.from_pretrained({path!r})")
        elif format == "onnx":
            write_onnx(model, path)
            print(f"{path}: input_ids (batch, length) -> logits; length up to {model.config.block_size}")
        else:
            write_pt(model, enc, path)
            print(f"{path}: {os.path.getsize(path) / 1e6:.1f} MB; python sample.py --ckpt={path}")
    except OSError as e:
        if format == "hf":  # which was not there before, or empty: half of one would be refused the next time
            shutil.rmtree(path, ignore_errors=True)
        sys.exit(f"{path}: cannot be written ({e.strerror or e})")


if __name__ == "__main__":
    configure(globals())
    main()
