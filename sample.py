"""Text from a model.

    python sample.py                                              # the newest checkpoint in log/
    python sample.py --ckpt=gpt2-xl --prompt="The meaning of life is" --num_samples=3
    python sample.py --prompt=FILE:story.txt --temperature=0      # a prompt from a file, greedy
    python sample.py --interactive=True                           # type prompts; an empty line ends

Text streams to the terminal as it is made. All samples are made at once, as rows of one batch: the first one streams,
the others follow when it is done.
"""

import codecs
import contextlib
import os
import sys

from configurator import configure
from model import load_model
from parallel import any_shape, pick_device, pick_dtype, run_script
from tokenizer import encode

import torch
import torch.nn as nn

# -- settings: override any with --key=value --------------------------------------
ckpt = "latest"  # latest or best (in log_dir), a .pt file, a name on the hub (gpt2, owner/name), or its folder
log_dir = "log"  # where latest is looked for
prompt = "\n"  # how the text starts; FILE:path reads it from a file; empty: a new document, <|endoftext|>
num_samples = 1
max_new_tokens = 300  # a sample ends there or at <|endoftext|>
temperature = 0.8  # 1: as the model says; lower: more predictable; 0: always the likeliest token
top_k = 200  # choose among the top_k likeliest tokens; 0: all
top_p = 1.0  # choose among the likeliest tokens that make up this probability; 1: all
seed = 1337  # the same seed gives the same text
out = ""  # also write the samples to this file
interactive = False  # ask for one prompt after the other
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # float16 weights on CPUs, else bfloat16 where the hardware has it, else float16

RULE = "-" * 80  # between samples


def stream_text(model, enc, prompt, max_new_tokens, num_samples=1, **sampling):
    """Continue a prompt; yield, token after token, the new text of each sample: num_samples strings.

    An empty prompt is a new document. A sample ends at <|endoftext|>, after which its strings are empty, and at
    max_new_tokens. sampling: the settings of sample_token.
    """
    ids = encode(enc, prompt, eot=True).tolist() or [enc.eot_token]
    idx = torch.tensor([ids], device=model.transformer.wte.weight.device)
    # A character can span tokens: the decoder holds back the bytes of an unfinished one.
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(num_samples)]
    ended = [False] * num_samples
    for tokens in model.generate(idx, max_new_tokens, num_samples, vocab_size=enc.n_vocab, **sampling):
        pieces = [""] * num_samples
        for i, token in enumerate(tokens.tolist()):
            ended[i] = ended[i] or token == enc.eot_token
            if not ended[i]:
                pieces[i] = decoders[i].decode(enc.decode_single_token_bytes(token))
        yield pieces
        if all(ended):
            break
    yield [decoder.decode(b"", final=True) for decoder in decoders]


class HalfLinear(nn.Module):
    """A linear layer with float16 weights, between float32 tensors, by FBGEMM (https://arxiv.org/abs/2101.05615)."""

    def __init__(self, linear):
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach()
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.detach(), bias)

    def forward(self, x):
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


def ready(model, dtype, device):
    """The model in a dtype, as it samples fastest on its device; it cannot be trained any more.

    On CPUs, dtype "auto" is float16 for the weights of linear layers alone, if torch was built with FBGEMM: one row of
    124M takes half the time that it takes in bfloat16, and the logits are nearer to float32's.
    """
    fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
    if device == "cpu" and fbgemm and dtype in ("auto", "float16"):
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, HalfLinear(child))
        return model.float().eval()
    return model.to(pick_dtype(dtype, device)).eval()


def write_out(text, mode):
    """Write to the file --out=, in the mode of open(); exits if it cannot be written."""
    try:
        with open(out, mode, encoding="utf-8") as f:
            f.write(text)
    except OSError as e:
        sys.exit(f"--out={out}: cannot write this file ({e.strerror})")


def main():
    if abs(seed) >= 1 << 63:
        sys.exit(f"--seed={seed}: must be less than 2^63")
    if num_samples < 1 or max_new_tokens < 1 or not temperature >= 0 or top_k < 0 or not 0 < top_p <= 1:
        sys.exit("expected num_samples >= 1, max_new_tokens >= 1, temperature >= 0, top_k >= 0, 0 < top_p <= 1")
    start = prompt
    if prompt.startswith("FILE:"):
        try:
            with open(os.path.expanduser(prompt[5:]), encoding="utf-8") as f:
                start = f.read()
        except (OSError, UnicodeDecodeError) as e:
            sys.exit(f"--prompt={prompt}: cannot read this file ({e})")
    where = pick_device(device)
    model, enc = load_model(ckpt, where, log_dir)
    model = ready(model, dtype, where)
    if out:
        write_out("", "w")  # empty it now: each prompt adds to it
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampling["generator"] = torch.Generator(where).manual_seed(seed)

    @any_shape()
    @torch.inference_mode()
    def sample(start):
        print(start, end="", flush=True)
        texts = [start] * num_samples
        for pieces in stream_text(model, enc, start, max_new_tokens, num_samples, **sampling):
            print(pieces[0], end="", flush=True)
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        print("".join(f"\n{RULE}\n{text}" for text in texts[1:]))
        if out:
            write_out("".join(f"{text}\n{RULE}\n" for text in texts), "a")

    if not interactive:
        return sample(start)
    with contextlib.suppress(EOFError):
        while sys.stdin and (line := input("prompt> ")):
            sample(line)


if __name__ == "__main__":
    configure(globals())
    run_script(main)
