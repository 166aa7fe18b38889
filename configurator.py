"""Settings for flat scripts: module globals with a literal default, overridden from the command line.

    python train_gpt2.py --max_steps=100 --compile=False     # --key=value
    python train_gpt2.py --max_steps 100 --resume            # --key value; a bare --flag sets a bool
    python sample.py --ckpt                                  # a bare --key keeps a string's default
    python train_gpt2.py my_run.py --seed=2                  # a file of `key = literal` lines, in order
    python train_gpt2.py --help                              # every setting, its default and its comment

A script ends with `configure(globals())` and then calls its main(). Files of settings are parsed, never executed. After
nanoGPT's configurator.py, which exec()s them. from_environment() and cores() are what a launcher and the machine set.
"""

import ast
import contextlib
import difflib
import os
import sys

# What nanoGPT and Hugging Face call some of them.
ALIASES = dict(
    lr="max_lr", learning_rate="max_lr", batch_size="B", per_device_train_batch_size="B", block_size="T", n_ctx="T",
    context_length="T", max_iters="max_steps", lr_decay_iters="max_steps", warmup_iters="warmup_steps",
    eval_interval="eval_every", save_steps="save_every", gradient_accumulation_steps="total_batch_size",
    num_layers="n_layer", num_heads="n_head", hidden_size="n_embd", max_grad_norm="grad_clip", output_dir="log_dir",
    out_dir="log_dir", dataset="data_dir",
    resume_from_checkpoint="resume", max_length="max_new_tokens", model="ckpt", start="prompt",
)  # fmt: skip
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def read_settings(path):
    """The settings a script declares: {name: (default, comment)}, in the order of the file.

    A setting is a lower-case name or a single letter, such as B, that is assigned a literal bool, int, float or str at
    the top level.
    """
    with open(path, encoding="utf-8") as f:
        source = f.read()
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        name = node.targets[0].id
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            continue
        if (name.islower() or len(name) == 1) and type(default) in EXPECTED:
            rest = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()
            found[name] = (default, rest.lstrip("# "))
    return found


def current_settings(module):
    """{name: value} of a script's settings as they stand; `module` is its globals()."""
    return {name: module[name] for name in read_settings(module["__file__"])}


def convert(text, default, where):
    """`text` as the type of `default`; exits with one line that starts with `where` if it is not."""
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is int:
            try:
                return int(text)  # exact, and takes 19_073
            except ValueError:
                number = float(text)  # 1e8
                if not number.is_integer():
                    raise
                return int(number)
        return kind(text)
    except (KeyError, ValueError, OverflowError):
        sys.exit(f"{where}: expected {EXPECTED[kind]}, such as {default}")


def check_name(key, settings, where):
    if key not in settings:
        if ALIASES.get(key) in settings:
            sys.exit(f"{where}: that is --{ALIASES[key]}= here; --help says what it counts")
        close = difflib.get_close_matches(key, settings, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else "--help lists them all"
        sys.exit(f"{where}: there is no setting {key!r}; {hint}")


def check_numbers(least=0, **numbers):
    """Exit if a setting is less than it can be, or nan."""
    for key, value in numbers.items():
        if not value >= least:
            sys.exit(f"--{key}={value}: must be at least {least}")


def read_file(path, settings):
    """{key: value} from a file of `key = literal` lines."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            body = ast.parse(f.read()).body
    except OSError as e:
        sys.exit(f"{path}: cannot read this settings file ({e.strerror})")
    except UnicodeDecodeError:
        sys.exit(f"{path}: not a settings file in UTF-8")
    except (SyntaxError, ValueError) as e:
        sys.exit(f"{path} line {getattr(e, 'lineno', '?')}: expected lines of key = literal")
    given = {}
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        where = f"{path} line {node.lineno}"
        try:
            (target,) = node.targets
            key, value = target.id, ast.literal_eval(node.value)
            if type(value) not in EXPECTED:
                raise ValueError
        except (AttributeError, ValueError, TypeError):
            sys.exit(f"{where}: expected key = literal, such as max_steps = 1000")
        check_name(key, settings, where)
        given[key] = convert(str(value), settings[key][0], f"{where}: {key} = {value!r}")
    return given


def parse_command_line(args, settings):
    """{key: value} for a list of arguments, in the grammar at the top of this file."""
    given = {}
    args = list(args)
    while args:
        arg = args.pop(0)
        if not arg.startswith("--"):
            if not arg.endswith(".py"):
                sys.exit(f"{arg}: settings are given as --key=value, files of settings as run.py")
            given.update(read_file(arg, settings))
            continue
        key, equals, text = arg[2:].partition("=")
        check_name(key, settings, arg)
        default = settings[key][0]
        if not equals:
            follows = args[0] if args and not args[0].startswith("--") else None
            if type(default) is bool and (follows or "").lower() not in ("true", "false", "1", "0"):
                text = "true"
            elif follows is not None:
                text = args.pop(0)
            elif type(default) is str and default not in ("", "auto"):
                text = default
            else:
                sys.exit(f"--{key} needs a value: {EXPECTED[type(default)]}, as in --{key}={default}")
        given[key] = convert(text, default, arg if equals else f"--{key} {text}")
    return given


def print_help(module, settings):
    print((module["__doc__"] or "").strip())
    print("\nsettings:")
    shown = {name: f"--{name}={default}".replace("\n", "\\n") for name, (default, _) in settings.items()}
    width = max(map(len, shown.values()))
    for name, (_, comment) in settings.items():
        print(f"  {shown[name]:<{width}}  {comment}".rstrip())


def complete(key, value):
    """A setting's text as it is meant: ~ is the home folder, in a list too; in a prompt, \\n is a line end."""
    if not isinstance(value, str):
        return value
    if "prompt" not in key:
        return ",".join(map(os.path.expanduser, value.split(",")))
    if value != value.encode(errors="replace").decode():
        sys.exit(f"--{key}: is not UTF-8")
    return value.replace("\\n", "\n")


def from_environment(name, default):
    """The whole number in a variable that torchrun, or another launcher, sets."""
    return int(os.environ.get(name) or default)


def cores():
    """How many cores this process may use: of this machine, of taskset's, of a container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/cpu.max") as f:
        quota, period = map(int, f.read().split())  # "max 100000" where there is none
        count = min(count, max(1, round(quota / period)))
    return count


class Output:
    """stdout or stderr, whose reader may be gone (| head, tee after Ctrl-C, a closed terminal): the script goes on."""

    def __init__(self, stream):
        self.stream = stream = stream or open(os.devnull, "w")  # None: it was closed from the start
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows another

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self._try(self.stream.write, text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, call, *args):
        try:
            return call(*args)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def hide_interrupt(kind, error, traceback):
    """What Python calls for an exception that nobody handled: Ctrl-C ends a script without a traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = hide_interrupt  # from the import on: that of torch takes a while


def configure(module, presets=None):
    """Set the settings in `module`, a script's globals(), from sys.argv.

    `presets`, if given, maps the settings from the command line to a dict of settings that are applied before them.
    Returns the settings from the command line, {key: value}. A mistake in them ends the program with one line on stderr
    and exit status 1; --help prints and exits 0.
    """
    if not isinstance(sys.stdout, Output):
        sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    settings = read_settings(os.path.abspath(module["__file__"]))
    if {"--help", "-h"} & set(sys.argv[1:]):
        print_help(module, settings)
        sys.exit(0)
    given = {key: complete(key, value) for key, value in parse_command_line(sys.argv[1:], settings).items()}
    module.update(presets(given) if presets else {})
    module.update(given)
    module.update({key: complete(key, module[key]) for key in settings})
    return given
