"""Export a checkpoint: as a Hugging Face folder, an ONNX file, or weights to share.

    python export.py --ckpt --out_dir=hf_model              # for transformers' Auto classes
    python export.py --format=onnx --out=model.onnx         # input_ids (batch, length) -> logits
    python export.py --format=pt --out=model.pt             # bfloat16: half the size

The folder needs none of our code: the model is a GPT2LMHeadModel or, if its settings match, a
NanoChatForCausalLM or LlamaForCausalLM, without the rows that pad the vocabulary (huggingface.py).
"""

import dataclasses
import json
import logging
import os
import shutil

from configurator import check_choice, check_command_line, configure

if __name__ == "__main__":
    check_command_line(__file__)  # before torch is imported, which takes seconds

from data.tokenizer import EOT, encode, to_tokenizer_json, tokenizer_state
from device import DTYPES
from files import atomic_write
from huggingface import to_hugging_face
from model import load_model
from script import UserError, run_as_script
from weights import save_tensors

import torch

# -- settings: override any with --key=value --------------------------------------
ckpt = "latest"  # latest or best (of log_dir), a .pt file, a hub name or a Hugging Face folder
log_dir = "log"  # the folder in which to look for latest and best
format = "hf"  # hf (a folder), onnx or pt (files)
out_dir = "hf_model"  # the folder to write, with --format=hf
out = ""  # the file to write, with --format=onnx or pt; empty: model.onnx or model.pt
dtype = "float32"  # the dtype of the folder's weights: float32, bfloat16 or float16

# Text on which the exported tokenizer must agree with the model's own.
PROBE = (
    f"It's 12345 o'clock.\n\n  def f(x):\n\treturn x  # naïve 日本語 🙂 ʼs ſ Σς İ {EOT}{EOT} I'LL  "
    "\r\n\r\n x\u00a0y \u200bz ½ ٣٤ _a-b \n \n"
)


def tokenizer_json(enc):
    """The text of a tokenizer.json that encodes as enc does; raises UserError if there is none."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError("exporting a tokenizer needs tokenizers: pip install tokenizers")
    # Both libraries must make the same tokens of a difficult text.
    text = json.dumps(to_tokenizer_json(enc), ensure_ascii=False)
    probe = PROBE + "".join(sorted(enc.special_tokens_set))
    if Tokenizer.from_str(text).encode(probe).ids != encode(enc, probe, allow_eot=True).tolist():
        raise UserError(
            f"the tokenizer {enc.name} cannot be exported: Hugging Face's tokenizers read "
            "its pattern differently; tokenizers from train_tokenizer.py can be exported"
        )
    return text


def write_folder(model, enc, folder, dtype):
    """Write config.json, model.safetensors, generation_config.json and the tokenizer's files."""
    from safetensors.torch import save

    # The model.
    config, tensors = to_hugging_face(model, enc.n_vocab)
    special_tokens = {
        "bos_token_id": enc.eot_token,
        "eos_token_id": enc.eot_token,
        "pad_token_id": enc.eot_token,
    }
    config |= {"dtype": str(dtype).removeprefix("torch."), **special_tokens}
    # The tokenizer: <|endoftext|> has all special roles, as in GPT-2.
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.block_size,
        "clean_up_tokenization_spaces": False,
        "bos_token": EOT,
        "eos_token": EOT,
        "unk_token": EOT,
        "pad_token": EOT,
    }
    # safetensors cannot hold views: make the tensors contiguous.
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    files = {
        "config.json": json.dumps(config, indent=2).encode(),
        "generation_config.json": json.dumps(special_tokens, indent=2).encode(),
        "tokenizer.json": tokenizer_json(enc).encode(),
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2).encode(),
        "model.safetensors": save(tensors, metadata={"format": "pt"}),
    }
    # Nothing is written before all of it is there.
    os.makedirs(folder, exist_ok=True)
    for name, content in files.items():
        atomic_write(f"{folder}/{name}", lambda f, content=content: f.write(content))


def write_onnx(model, path):
    """Write ONNX: input_ids (batch, length), int64, -> logits (batch, length, vocab_size)."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError("--format=onnx needs onnx and onnxscript: pip install onnx onnxscript")
    if 4 * model.num_params() > 2e9:
        raise UserError(
            "--format=onnx: an ONNX file holds 2 GB at most, this model is larger; use --format=hf"
        )
    # It warns that torchvision is missing, which is not needed.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    model.requires_grad_(False)  # so that the graph has no custom autograd.Function
    # Batch and length stay free in the graph.
    length = torch.export.Dim("length", min=1, max=model.config.block_size)
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 8, dtype=torch.long),),
        input_names=["input_ids"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch"), 1: length},),
        dynamo=True,
        verbose=False,
    )
    atomic_write(path, lambda f: f.write(program.model_proto.SerializeToString()))


def write_pt(model, enc, path):
    """Write a checkpoint with weights in bfloat16 and nothing about the run they come from."""
    # The same format as a checkpoint of a run, so that everything that takes one takes this.
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        state["lm_head.weight"] = state["transformer.wte.weight"]  # one tensor, stored once
    checkpoint = {
        "model": state,
        "config": dataclasses.asdict(model.config),
        "step": 0,
        "val_loss": None,
        "settings": {},
        "tokenizer": tokenizer_state(enc),
    }
    save_tensors(path, checkpoint)


def main():
    check_choice("format", format, ("hf", "onnx", "pt"))
    check_choice("dtype", dtype, tuple(DTYPES))
    # An export never replaces anything.
    key = "out_dir" if format == "hf" else "out"
    path = out_dir if format == "hf" else out or f"model.{format}"
    is_empty_folder = os.path.isdir(path) and not os.listdir(path)
    if os.path.exists(path) and not (format == "hf" and is_empty_folder):
        raise UserError(f"--{key}={path}: exists already; choose another, or delete it")
    model, enc = load_model(ckpt, "cpu", log_dir)
    try:
        # Nothing half-written stays, so that the next export is not refused.
        if format == "hf":
            write_folder(model, enc, path, DTYPES[dtype])
            size = f"{model.num_params() / 1e6:.2f}M parameters in {dtype}"
            print(f"{path}: {size}, tokenizer {enc.name}")
            print(f"  AutoModelForCausalLM.from_pretrained({path!r})")
            print(f"  AutoTokenizer.from_pretrained({path!r})")
        elif format == "onnx":
            write_onnx(model, path)
            shape = f"length up to {model.config.block_size}"
            print(f"{path}: input_ids (batch, length) -> logits; {shape}")
        else:
            write_pt(model, enc, path)
            megabytes = os.path.getsize(path) / 1e6
            print(f"{path}: {megabytes:.1f} MB; python sample.py --ckpt={path}")
    except OSError as e:
        if format == "hf":  # it was absent or empty before: half of it would block the next export
            shutil.rmtree(path, ignore_errors=True)
        raise UserError(f"{path}: cannot be written ({e.strerror or e})")


if __name__ == "__main__":
    with run_as_script():
        configure(globals())
        main()
