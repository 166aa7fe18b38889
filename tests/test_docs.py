"""The commands, settings, links and names in README.md and docs/ exist, and the short ones run."""

import re
import shlex

from configurator import parse_command_line, read_settings
from conftest import ROOT, TEXT
import train_gpt2
from training.settings import check_settings

import pytest

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "dev" / "LOG.md"]


def commands():
    """(page, arguments of a script) of each command line in the ```sh blocks and tables."""
    found = []
    for page in PAGES:
        text = page.read_text()
        lines = [
            line
            for block in re.findall(r"```sh\n(.*?)```", text, re.S)
            for line in block.splitlines()
        ]
        lines += re.findall(r"`((?:python|torchrun) [^`]*\.py[^`]*)`", text)
        for line in lines:
            for part in line.split("#")[0].split("&&"):
                words = shlex.split(part)
                scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
                if scripts and words[0] in ("python", "torchrun") and "-m" not in words[:2]:
                    found.append((page.name, words[scripts[0] :]))
    return found


@pytest.mark.parametrize(("page", "words"), commands(), ids=lambda x: " ".join(x)[:60])
def test_each_command_is_understood(page, words, tmp_path, monkeypatch):
    """Its script and settings exist, their values have the right types, and they go together."""
    script, *args = words
    assert (ROOT / script).exists()
    settings = read_settings(ROOT / script)
    args = [arg for arg in args if not arg.endswith(".py")]  # a file of the user's settings
    overrides = parse_command_line(args, settings)
    if script == "train_gpt2.py" and "resume_step" not in overrides:
        monkeypatch.chdir(tmp_path)
        overrides.setdefault("preset", "gpt2")
        check_settings(train_gpt2.initial_settings(overrides))


def test_links():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page.name, target)


def test_settings_that_are_named():
    """Every --name= in a page is a setting of some script."""
    known = {name for path in ROOT.glob("*.py") for name in read_settings(path)}
    known |= set(read_settings(ROOT / "dev" / "bench.py"))
    others = {
        "help", "key", "standalone", "nproc_per_node", "nnodes", "rdzv", "signals", "max", "kills",
        "master_port", "shutdown", "outtype", "outfile", "model_args", "flag", "index",
    }  # fmt: skip
    for page in PAGES:
        for name in re.findall(r"(?<![\w-])--([a-zA-Z_]\w*)", page.read_text()):
            assert name in known | others, (page.name, name)


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.encode()) <= 9000


def test_layout_in_readme():
    """Each module is listed, with its length."""
    text = (ROOT / "README.md").read_text()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("training/*.py")]:
        if path.name == "__init__.py":
            continue
        match = re.search(rf"\b{path.stem}(?:\.py)? +(\d+)", text)
        assert match, f"{path.name} is not in README.md"
        lines = len(path.read_text().splitlines())
        assert abs(int(match[1]) - lines) <= 25, f"{path.name} has {lines} lines, not {match[1]}"


def test_your_own_text(run, tmp_path):
    """README's three commands, with a run of a few steps."""
    (tmp_path / "my_texts").mkdir()
    for i in range(5):
        (tmp_path / "my_texts" / f"{i}.txt").write_text(TEXT)
    block = (ROOT / "README.md").read_text().partition("## Your own text")[2]
    lines = re.search(r"```sh\n(.*?)```", block, re.S)[1].splitlines()
    assert len(lines) == 3
    for line in lines:
        _, script, *args = shlex.split(line.split("#")[0])
        short = {
            "train_gpt2.py": ["--max_steps=3", "--val_tokens=500"],
            "sample.py": ["--max_new_tokens=9"],
        }
        out = run(script, *args, *short.get(script, []))
    assert out.count("Once") == 3
    assert (tmp_path / "log" / "model_00003.pt").exists()
