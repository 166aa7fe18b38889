"""Generate text from a model.

    python sample.py                                              # the latest checkpoint in log/
    python sample.py --ckpt=gpt2-xl --prompt="The meaning of life is" --num_samples=3
    python sample.py --prompt=FILE:story.txt --temperature=0      # a prompt from a file, greedy
    python sample.py --interactive=True                           # type prompts; an empty line ends

Text streams to the terminal as it is generated. All samples are rows of one batch: the first
streams, the others are printed when it is done.
"""

import codecs
import contextlib
import os
import sys

from configurator import check_command_line, check_min, configure

if __name__ == "__main__":
    check_command_line(__file__)  # before torch is imported, which takes seconds

from data.tokenizer import encode
from device import eager_mode, pick_device, pick_dtype
from model import load_model
from script import UserError, run_as_script

import torch
import torch.nn as nn

# -- settings: override any with --key=value --------------------------------------
ckpt = "latest"  # latest or best (of log_dir), a .pt file, a hub name or a Hugging Face folder
log_dir = "log"  # the folder in which to look for latest and best
prompt = "\n"  # the start of the text; FILE:path reads it from a file; empty: a new document
num_samples = 1  # how many texts to generate
max_new_tokens = 300  # the length of a sample, unless <|endoftext|> ends it
temperature = 0.8  # 1: as the model says; lower: more predictable; 0: always the likeliest token
top_k = 200  # choose among the top_k likeliest tokens; 0: all
top_p = 1.0  # choose among the likeliest tokens whose probabilities sum to this; 1: all
seed = 1337  # the same seed gives the same text
out = ""  # a file to write the samples to as well
interactive = False  # ask for one prompt after another
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # float16 weights on CPUs (if torch has FBGEMM); otherwise as in train_gpt2.py

SEPARATOR = "-" * 80  # between samples


def stream_text(model, enc, prompt, max_new_tokens, num_samples=1, **sampling):
    """Continue a prompt; yield, token by token, the new text of each sample: num_samples strings.

    An empty prompt starts a new document. A sample ends at <|endoftext|>, after which its strings
    are empty, or at max_new_tokens. `sampling` are arguments of sample_token.
    """
    ids = encode(enc, prompt, allow_eot=True).tolist() or [enc.eot_token]
    idx = torch.tensor([ids], device=model.transformer.wte.weight.device)
    # A character can span tokens: the decoder keeps the bytes of an incomplete one.
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(num_samples)]
    ended = [False] * num_samples
    for tokens in model.generate(idx, max_new_tokens, num_samples, enc.n_vocab, **sampling):
        pieces = [""] * num_samples
        # A sample that has ended stays in the batch, and its tokens are ignored.
        for i, token in enumerate(tokens.tolist()):
            if token == enc.eot_token:
                ended[i] = True
            if not ended[i]:
                pieces[i] = decoders[i].decode(enc.decode_single_token_bytes(token))
        yield pieces
        if all(ended):
            break
    yield [decoder.decode(b"", final=True) for decoder in decoders]


class DynamicFP16Linear(nn.Module):
    """A linear layer with float16 weights and float32 activations (FBGEMM, arXiv 2101.05615)."""

    def __init__(self, linear):
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach()
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.detach(), bias)

    def forward(self, x):
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


def prepare_for_sampling(model, dtype, device):
    """The model, converted for the fastest sampling on its device; it cannot be trained any more.

    On CPUs, dtype "auto" means float16 for the weights of linear layers, if torch was built with
    FBGEMM: one row of 124M takes half the time of bfloat16, and its logits are closer to float32's.
    """
    has_fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
    # On GPUs and Macs, the whole model in one dtype.
    if device != "cpu" or not has_fbgemm or dtype not in ("auto", "float16"):
        return model.to(pick_dtype(dtype, device)).eval()
    # Replace every linear layer; embeddings and norms stay in float32.
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, DynamicFP16Linear(child))
    return model.float().eval()


def read_prompt():
    """The prompt that the settings name."""
    if not prompt.startswith("FILE:"):
        return prompt
    # nanoGPT's way to give a long prompt.
    path = os.path.expanduser(prompt.removeprefix("FILE:"))
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompt={prompt}: cannot read this file ({e})")


def write_to_file(text, mode):
    """Write text to the file --out=, opened in this mode."""
    try:
        with open(out, mode, encoding="utf-8") as f:
            f.write(text)
    except OSError as e:
        raise UserError(f"--out={out}: cannot write this file ({e.strerror})")


@eager_mode()
@torch.inference_mode()
def print_samples(model, enc, start, generator):
    """Print the samples that continue a prompt, and write them to --out=."""
    print(start, end="", flush=True)
    # Print the first sample as it grows, and the others when all are done.
    texts = [start] * num_samples
    for pieces in stream_text(
        model,
        enc,
        start,
        max_new_tokens,
        num_samples,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
    ):
        print(pieces[0], end="", flush=True)
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    for text in texts[1:]:
        print(f"\n{SEPARATOR}\n{text}", end="")
    print()
    if out:
        write_to_file("".join(f"{text}\n{SEPARATOR}\n" for text in texts), "a")


def main():
    if abs(seed) >= 1 << 63:
        raise UserError(f"--seed={seed}: must be less than 2^63")
    check_min(1, num_samples=num_samples, max_new_tokens=max_new_tokens)
    check_min(0, temperature=temperature, top_k=top_k)
    if not 0 < top_p <= 1:
        raise UserError(f"--top_p={top_p}: must be more than 0, and 1 at most")
    start = read_prompt()
    device_name = pick_device(device)
    model, enc = load_model(ckpt, device_name, log_dir)
    model = prepare_for_sampling(model, dtype, device_name)
    if out:
        write_to_file("", "w")  # empty it: each prompt appends to it
    # One generator for all prompts, so that a session can be repeated.
    generator = torch.Generator(device_name).manual_seed(seed)
    if not interactive:
        print_samples(model, enc, start, generator)
        return
    with contextlib.suppress(EOFError):
        while sys.stdin:
            line = input("prompt> ")
            if not line:
                break
            print_samples(model, enc, line, generator)


if __name__ == "__main__":
    with run_as_script():
        configure(globals())
        main()
