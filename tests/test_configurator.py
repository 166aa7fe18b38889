"""The grammar of the command line, on a script made for it."""

import re
import runpy
import subprocess
import sys

from configurator import check_command_line
from conftest import ROOT, command
from script import UserError

import pytest

SCRIPT = '''"""What it does."""
from configurator import configure, current_settings
max_steps = 19_073  # how long
B = 64  # micro-batch
max_lr = 6e-4  # the rate
resume = False  # go on
ckpt = "latest"  # which
init_from = ""  # from where
compile = "auto"  # or not
LIMIT = 5
names = ["not a setting"]
given = configure(globals(), lambda given: {"B": 32, "max_lr": 0.5, **given})
settings = current_settings(globals())
'''


@pytest.fixture
def configured(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)

    def call(*args):
        monkeypatch.setattr(sys, "argv", [str(script), *args])
        return runpy.run_path(str(script))

    return call


def test_presets_come_before_the_command_line(configured):
    result = configured("--B=8")
    assert (result["B"], result["max_lr"], result["max_steps"]) == (8, 0.5, 19073)
    assert result["given"] == {"B": 8}
    assert list(result["settings"]) == [
        "max_steps",
        "B",
        "max_lr",
        "resume",
        "ckpt",
        "init_from",
        "compile",
    ]


@pytest.mark.parametrize(
    ("args", "key", "value"),
    [
        (["--max_steps=1e3"], "max_steps", 1000),
        (["--max_steps=1_000"], "max_steps", 1000),
        (["--max_steps", "7"], "max_steps", 7),
        (["--max_lr=1"], "max_lr", 1.0),
        (["--max_lr", "-1e-3"], "max_lr", -1e-3),
        (["--resume"], "resume", True),
        (["--resume", "--B=1"], "resume", True),
        (["--resume=false"], "resume", False),
        (["--resume", "0"], "resume", False),
        (["--ckpt"], "ckpt", "latest"),
        (["--ckpt", "--B=1"], "ckpt", "latest"),
        (["--ckpt", "gpt2"], "ckpt", "gpt2"),
        (["--ckpt=a=b"], "ckpt", "a=b"),
        (["--init_from="], "init_from", ""),
        (["--compile=False"], "compile", "False"),
        (["--B=1", "--B=2"], "B", 2),
    ],
)
def test_values(configured, args, key, value):
    result = configured(*args)[key]
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--max_step=5"], "--max_step=5: there is no setting 'max_step'; did you mean max_steps?"),
        (["--zzz=5"], "--zzz=5: there is no setting 'zzz'; --help lists them all"),
        (["--LIMIT=5"], "--LIMIT=5: there is no setting 'LIMIT'; --help lists them all"),
        (["--max_steps=abc"], "--max_steps=abc: expected a whole number, such as 19073"),
        (["--max_steps=1.5"], "--max_steps=1.5: expected a whole number, such as 19073"),
        (["--max_steps=inf"], "--max_steps=inf: expected a whole number, such as 19073"),
        (["--max_lr=fast"], "--max_lr=fast: expected a number, such as 0.0006"),
        (["--resume=maybe"], "--resume=maybe: expected true or false, such as False"),
        (["--max_steps"], "--max_steps needs a value: a whole number, as in --max_steps=19073"),
        (["--init_from"], "--init_from needs a value: text, as in --init_from="),
        (["--compile"], "--compile needs a value: text, as in --compile=auto"),
        (["foo"], "foo: settings are given as --key=value, files of settings as run.py"),
        (["gone.py"], "gone.py: cannot read this settings file (No such file or directory)"),
    ],
)
def test_mistakes_are_one_line(configured, args, message):
    with pytest.raises(UserError) as e:
        configured(*args)
    assert str(e.value) == message


def test_files_of_settings(configured, tmp_path):
    (tmp_path / "run.py").write_text(
        '"""A run."""\nmax_steps = 1e2  # short\nmax_lr = 3\ncompile = False\nB = 1\n'
    )
    result = configured("run.py", "--B=2")
    assert (result["max_steps"], result["max_lr"], result["compile"], result["B"]) == (
        100,
        3.0,
        "False",
        2,
    )
    assert configured("--B=2", "run.py")["B"] == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_step = 5", "bad.py line 2: there is no setting 'max_step'; did you mean max_steps?"),
        (
            "max_steps = 'x'",
            "bad.py line 2: max_steps = 'x': expected a whole number, such as 19073",
        ),
        ("import os", "bad.py line 2: expected key = literal, such as max_steps = 1000"),
        ("B = print('ran')", "bad.py line 2: expected key = literal, such as max_steps = 1000"),
        ("B = = 1", "bad.py line 2: expected lines of key = literal"),
    ],
)
def test_files_are_parsed_and_never_run(configured, tmp_path, capsys, line, message):
    (tmp_path / "bad.py").write_text(f"B = 4\n{line}\n")
    with pytest.raises(UserError) as e:
        configured("bad.py")
    assert str(e.value) == message
    assert capsys.readouterr().out == ""


def test_help_lists_defaults_and_comments(tmp_path, monkeypatch, capsys):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as e:
        check_command_line(script)
    assert e.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("What it does.\n")
    assert re.search(r"  --max_steps=19073 +how long\n", out)
    assert re.search(r"  --compile=auto +or not\n", out)
    assert "LIMIT" not in out


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], {"--n_embd=768", "--B=64"}),
        (["--preset=tiny", "--T=64"], {"--n_embd=128", "--B=16", "--T=64"}),
        (["--preset=modern"], {"--n_embd=768", "--optimizer=muon", "--max_lr=0.0036"}),
    ],
)
def test_help_of_the_trainer(tmp_path, args, expected):
    """In groups, at most 100 columns wide, with the values that apply."""
    out = subprocess.check_output(
        command("train_gpt2.py", "--help", *args), cwd=tmp_path, text=True
    )
    assert expected <= set(out.split())
    headings = [line for line in out.splitlines() if re.fullmatch(r"[a-z ,]+", line)]
    assert headings[0] == "what most people change"
    assert {"model", "batch", "machine"} < set(headings)
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("args", "status"),
    [(["--help"], 0), (["--max_step=5"], 1), (["--seed"], 1), (["--preset=big"], 1)],
)
def test_help_and_mistakes_do_not_wait_for_torch(tmp_path, args, status):
    scripts = [ROOT / "train_gpt2.py"]
    if args == ["--help"]:
        scripts = [path for path in ROOT.glob("*.py") if "configure(globals()" in path.read_text()]
        scripts = [path for path in scripts if path.name not in ("script.py", "configurator.py")]
        assert len(scripts) == 8
    for script in scripts:
        line = [sys.executable, "-X", "importtime", str(script), *args]
        result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
        modules = re.findall(r"\| +(\S+)$", result.stderr, re.MULTILINE)
        assert result.returncode == status and "configurator" in modules
        assert not {"torch", "numpy"} & set(modules), f"{script}: slow"


@pytest.mark.parametrize("script", ["train_gpt2.py", "fineweb.py", "sample.py"])
def test_every_setting_of_every_script_is_explained(script):
    from configurator import read_settings

    plain = {"n_layer", "n_head", "n_embd", "beta1", "beta2", "num_samples"}  # the name says it
    for name, (_, comment) in read_settings(ROOT / script).items():
        assert comment or name in plain, f"{script}: {name} has no comment"
