"""Settings of flat scripts: module globals with a literal default, set from the command line.

    python train_gpt2.py --max_steps=100 --compile=False     # --key=value
    python train_gpt2.py --max-steps 100 --resume            # --key value; a bare --flag is true
    python sample.py --ckpt                                  # a bare --key keeps a string's default
    python train_gpt2.py my_run.py --seed=2                  # a file of `key = literal` lines
    python train_gpt2.py --help                              # every setting and its default

A script calls check_command_line() before its slow imports, and configure(globals()) before its
main(). Files of settings are parsed, never executed. After nanoGPT's configurator.py, which exec()s
them.
"""

import ast
import difflib
import os
import sys
import textwrap

from script import UserError, is_rank_0, run_as_script

# Names that nanoGPT and Hugging Face use, and our own former names -> ours.
ALIASES = {
    "lr": "max_lr",
    "learning_rate": "max_lr",
    "batch_size": "B",
    "per_device_train_batch_size": "B",
    "block_size": "T",
    "n_ctx": "T",
    "context_length": "T",
    "max_iters": "max_steps",
    "lr_decay_iters": "max_steps",
    "warmup_iters": "warmup_steps",
    "eval_interval": "eval_every",
    "save_steps": "save_every",
    "gradient_accumulation_steps": "total_batch_size",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "hidden_size": "n_embd",
    "max_grad_norm": "grad_clip",
    "output_dir": "log_dir",
    "out_dir": "log_dir",
    "dataset": "data_dir",
    "resume_from_checkpoint": "resume",
    "max_length": "max_new_tokens",
    "model": "ckpt",
    "start": "prompt",
    "init_from": "ckpt",
    "wandb_project": "wandb",
    "wandb_log": "wandb",
    "wandb_run_name": "wandb_name",
    "tied": "tie_embeddings",
    "save_minutes": "save_every_minutes",
}
# Names of other projects that have no counterpart, for scripts that have a setting.
STEPS = "give the length in steps, as --max_steps=; the trainer prints the steps per epoch"
HINTS = {
    "epochs": ("max_steps", STEPS),
    "num_train_epochs": ("max_steps", STEPS),
    "dropout": ("weight_decay", "there is none; against overfitting raise --weight_decay="),
}
# What a value of each type is called in messages.
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
BOOLS = {"true": True, "1": True, "false": False, "0": False}


def read_settings(path):
    """The settings that a script declares: {name: (default, comment)}, in the order of the file.

    A setting is a lower-case name or a single letter, such as B, that is assigned a literal bool,
    int, float or str at the top level.
    """
    with open(path, encoding="utf-8") as f:
        source = f.read()
    # The file is parsed rather than imported, so that --help answers at once.
    lines = source.splitlines()
    settings = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        name = node.targets[0].id
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            continue
        # The comment is what follows the value on its line.
        if (name.islower() or len(name) == 1) and type(default) in EXPECTED:
            line = lines[node.end_lineno - 1].encode()  # the offset counts bytes
            comment = line[node.end_col_offset :].decode().strip().lstrip("# ")
            settings[name] = (default, comment)
    return settings


def current_settings(module):
    """{name: value} of a script's settings as they are now; module: the script's globals()."""
    return {name: module[name] for name in read_settings(module["__file__"])}


def convert(text, default, prefix):
    """Convert text to the type of `default`; raises UserError, which starts with prefix."""
    kind = type(default)
    try:
        if kind is bool:
            return BOOLS[text.lower()]
        if kind is int:
            return parse_int(text)
        return kind(text)
    except (KeyError, ValueError, OverflowError):
        raise UserError(f"{prefix}: expected {EXPECTED[kind]}, such as {default}")


def parse_int(text):
    """The integer in 19073, 19_073 or 1e8; raises ValueError or OverflowError if it is none."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


def check_name(key, settings, prefix):
    """Raise UserError, with the closest name, if there is no setting `key`."""
    if key in settings:
        return
    # A name from another project, or a former name of ours.
    if ALIASES.get(key) in settings:
        raise UserError(f"{prefix}: that is --{ALIASES[key]}= here; --help says what it counts")
    needs, hint = HINTS.get(key, ("", ""))
    if needs in settings:
        raise UserError(f"{prefix}: {hint}")
    # Or else a typing error.
    close = difflib.get_close_matches(key, settings, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else "--help lists them all"
    raise UserError(f"{prefix}: there is no setting {key!r}; {hint}")


def check_min(minimum, **numbers):
    """Raise UserError if one of the settings, given as name=value, is below the minimum or nan."""
    for key, value in numbers.items():
        if not value >= minimum:
            raise UserError(f"--{key}={value}: must be at least {minimum}")


def check_choice(key, value, choices):
    """Raise UserError if a setting's value is not one of its choices."""
    if value not in choices:
        # For example "auto, tiny or gpt2".
        *others, last = choices
        listed = f"{', '.join(others)} or {last}" if others else last
        raise UserError(f"--{key}={value}: choose {listed}")


def read_file(path, settings):
    """{key: value} from a file of `key = literal` lines."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            body = ast.parse(f.read()).body
    except OSError as e:
        raise UserError(f"{path}: cannot read this settings file ({e.strerror})")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a settings file in UTF-8")
    except (SyntaxError, ValueError) as e:
        line = getattr(e, "lineno", "?")
        raise UserError(f"{path} line {line}: expected lines of key = literal")

    # Each line must be a plain assignment of a literal: nothing is executed.
    values = {}
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        prefix = f"{path} line {node.lineno}"
        try:
            (target,) = node.targets
            key = target.id
            value = ast.literal_eval(node.value)
            if type(value) not in EXPECTED:
                raise ValueError
        except (AttributeError, ValueError, TypeError):
            raise UserError(f"{prefix}: expected key = literal, such as max_steps = 1000")
        check_name(key, settings, prefix)
        values[key] = convert(str(value), settings[key][0], f"{prefix}: {key} = {value!r}")
    return values


def parse_command_line(args, settings):
    """{key: value} of a list of arguments, in the grammar described at the top of this file."""
    values = {}
    args = list(args)
    # Later arguments win over earlier ones.
    while args:
        arg = args.pop(0)
        if not arg.startswith("--"):
            if not arg.endswith(".py"):
                raise UserError(
                    f"{arg}: settings are given as --key=value, files of settings as run.py"
                )
            values.update(read_file(arg, settings))
            continue

        # --key=value, or only --key.
        key, equals, text = arg[2:].partition("=")
        key = key.replace("-", "_")
        if key == "local_rank":  # older launchers pass what LOCAL_RANK says
            if not equals and args and args[0].isdigit():
                args.pop(0)
            continue
        check_name(key, settings, arg)
        default = settings[key][0]
        if not equals:
            # The value can be the next argument. A bool needs none, and so does a string whose
            # default names something (--ckpt).
            next_arg = args[0] if args and not args[0].startswith("--") else None
            if type(default) is bool and (next_arg is None or next_arg.lower() not in BOOLS):
                text = "true"
            elif next_arg is not None:
                text = args.pop(0)
            elif type(default) is str and default not in ("", "auto"):
                text = default
            else:
                raise UserError(
                    f"--{key} needs a value: {EXPECTED[type(default)]}, as in --{key}={default}"
                )
            arg = f"--{key} {text}"
        values[key] = convert(text, default, arg)
    return values


def read_headings(path):
    """{name: the heading above it} of a script's settings: the last line that is a comment."""
    headings = {}
    heading = ""
    with open(path, encoding="utf-8") as f:
        for line in f:
            if line.startswith("# "):
                heading = line.strip("# -\n")
            elif " = " in line:
                headings.setdefault(line.partition(" = ")[0], heading)
    return headings


def print_help(path, settings, values):
    """Print a script's docstring, and each setting with its value and its comment, in groups."""
    with open(path, encoding="utf-8") as f:
        print(ast.get_docstring(ast.parse(f.read())) or "")
    # Groups as in the source: a line of comment above some settings is their heading.
    headings = read_headings(path)
    heading = None
    for name, (_, comment) in settings.items():
        if headings.get(name) != heading:
            heading = headings.get(name)
            print(f"\n{heading}")
        shown = f"  --{name}={values[name]}".replace("\n", "\\n")
        indent = " " * 32
        if len(shown) > 30:
            print(shown)
            shown = ""
        print(textwrap.fill(comment, 100, initial_indent=f"{shown:<32}", subsequent_indent=indent))
    print("\nNames that nanoGPT and Hugging Face use are answered with ours.")


def check_command_line(path, presets=None):
    """Print the help or an error message of the script at `path`, and exit, if either is due.

    Called before torch is imported, so that the answer comes at once. presets, {name: {key:
    value}}: what --preset=name changes.
    """
    settings = read_settings(path)
    args = [arg for arg in sys.argv[1:] if arg not in ("--help", "-h")]
    wants_help = len(args) < len(sys.argv) - 1
    with run_as_script():
        overrides = parse_command_line(args, settings)
        # Help shows a preset's values, before the trainer scales them to max_steps and n_embd.
        values = {key: default for key, (default, _) in settings.items()}
        if presets:
            preset = overrides.get("preset", "auto")
            check_choice("preset", preset, ("auto", *presets))
            values.update(presets.get(preset, {}))
        if not wants_help:
            return
        if is_rank_0():
            print_help(path, settings, {**values, **overrides})
        sys.exit(0)


def expand_value(key, value):
    """Expand ~ in paths (also in a list of them) and \\n in prompts; other values stay the same."""
    if not isinstance(value, str):
        return value
    # Everything but a prompt is a path, a list of paths, or has no ~ in it.
    if "prompt" not in key:
        return ",".join(map(os.path.expanduser, value.split(",")))
    if value != value.encode(errors="replace").decode():
        raise UserError(f"--{key}: is not UTF-8")
    return value.replace("\\n", "\n")


def configure(module, get_settings=None):
    """Set the settings in `module`, a script's globals(), from sys.argv.

    get_settings, if given, is a function from the settings on the command line to all those to set,
    which can differ from the defaults. Returns the settings on the command line, {key: value}.
    Raises UserError for a mistake.
    """
    settings = read_settings(module["__file__"])
    overrides = parse_command_line(sys.argv[1:], settings)
    overrides = {key: expand_value(key, value) for key, value in overrides.items()}
    values = get_settings(overrides) if get_settings else overrides
    module.update(values)
    for key in settings:
        module[key] = expand_value(key, module[key])
    return overrides
