"""The house: imports that point down, functions that fit a screen, files that can be read in one go."""

import ast

from conftest import ROOT

import pytest

FILES = {path.stem: path.read_text() for path in sorted(ROOT.glob("*.py"))}


def imports(name):
    """The project's files that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found & FILES.keys()


def test_no_circle_of_imports():
    left = {name: imports(name) for name in FILES}
    assert "shards" in left["order"] and "train_gpt2" in left, "imports are found"
    while left:
        ground = [name for name, needs in left.items() if not needs & left.keys()]
        assert ground, f"these import each other: {left}"
        for name in ground:
            del left[name]


def test_only_scripts_import_scripts():
    scripts = {name for name, source in FILES.items() if "configure(globals()" in source} - {"configurator"}
    assert {"train_gpt2", "fineweb", "sample", "bench"} <= scripts and "model" not in scripts
    for name in FILES.keys() - scripts - {"evals"}:  # evals.py shows a sample as sample.py makes it
        assert not imports(name) & scripts, name


def test_text_to_shards_without_torch():
    """Whose import takes longer than the tokens of a small text."""
    reached = ["fineweb"]
    for name in reached:
        reached += imports(name) - set(reached)
    assert "shards" in reached and not [name for name in reached if "import torch" in FILES[name]]


@pytest.mark.parametrize("name", FILES)
def test_functions_fit_a_screen(name):
    for node in ast.walk(ast.parse(FILES[name])):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= (80 if node.name == "main" else 60), f"{node.name} has {lines} lines"


def test_sizes():
    lines = {name: source.count("\n") for name, source in FILES.items()}
    for name, count in lines.items():
        assert count < (500 if name in ("train_gpt2", "model", "bench") else 450), f"{name}.py has {count} lines"
    assert sum(lines.values()) < 6200
