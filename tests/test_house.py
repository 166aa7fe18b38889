"""The style of the code: imports that point down, functions that fit a screen, size and density."""

import ast
import tokenize

from conftest import ROOT

import pytest

PATHS = sorted(
    path
    for pattern in ("*.py", "data/*.py", "training/*.py", "dev/*.py")
    for path in ROOT.glob(pattern)
)
FILES = {str(path.relative_to(ROOT)): path.read_text() for path in PATHS}
MODULES = {name.removesuffix(".py").replace("/", "."): name for name in FILES}
SCRIPTS = {name for name, source in FILES.items() if "configure(globals()" in source}
SCRIPTS -= {"script.py", "configurator.py"}  # they only explain it


def imports(name):
    """The project's files that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {MODULES[module] for module in found if module in MODULES}


def reachable(name):
    """The project's files that importing a file imports."""
    found = [name]
    for other in found:
        found += sorted(imports(other) - set(found))
    return set(found)


def test_no_circle_of_imports():
    left = {name: imports(name) for name in FILES}
    assert "data/shards.py" in left["data/loader.py"], "imports are found"
    while left:
        ground = [name for name, needs in left.items() if not needs & left.keys()]
        assert ground, f"these import each other: {left}"
        for name in ground:
            del left[name]


def test_scripts_are_known():
    assert {"train_gpt2.py", "fineweb.py", "sample.py", "dev/bench.py"} <= SCRIPTS
    assert not {"model.py", "configurator.py", "training/evals.py"} & SCRIPTS


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name):
    folder = name.partition("/")[0]
    if folder == "data":
        assert not [x for x in reachable(name) if x.startswith("training/") or x == "model.py"]
    if name not in SCRIPTS:
        assert not imports(name) & SCRIPTS, "only scripts import scripts"
    if folder != "dev":
        assert not [x for x in imports(name) if x.startswith("dev/")]


def test_text_to_shards_without_torch():
    """Importing torch takes longer than tokenizing a small text."""
    assert "data/shards.py" in reachable("fineweb.py")
    assert not [x for x in reachable("fineweb.py") if "import torch" in FILES[x]]


@pytest.mark.parametrize("name", FILES)
def test_functions_fit_a_screen(name):
    for node in ast.walk(ast.parse(FILES[name])):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= (80 if node.name == "main" else 60), f"{node.name} has {lines} lines"


@pytest.mark.parametrize("name", FILES)
def test_files_can_be_read_in_one_go(name):
    lines = FILES[name].splitlines()
    long_ones = ("train_gpt2.py", "model.py", "dev/bench.py")
    assert len(lines) <= (500 if name in long_ones else 450)
    assert [i for i, line in enumerate(lines, start=1) if len(line) > 100] == []


@pytest.mark.parametrize("name", FILES)
def test_only_a_starting_script_exits(name):
    """Everything else raises UserError, so that it can be called from a notebook."""
    calls = [
        ast.unparse(n.func) for n in ast.walk(ast.parse(FILES[name])) if isinstance(n, ast.Call)
    ]
    allowed = {
        "script.py": ["sys.exit"],  # run_as_script
        "configurator.py": ["sys.exit"],  # --help
        "training/distributed.py": ["os._exit"],  # cleanup_distributed
    }
    exits = [call for call in calls if call in ("sys.exit", "os._exit", "exit", "quit")]
    assert exits == allowed.get(name, [])


LAYOUT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENCODING, tokenize.ENDMARKER,
}  # fmt: skip


def measure(source):
    """(tokens of code, statements, lines, comment lines), as size is measured in this project."""
    lines = source.splitlines(keepends=True)
    tokens = list(tokenize.generate_tokens(iter(lines).__next__))
    statements = sum(token.type == tokenize.NEWLINE for token in tokens)
    code = [token for token in tokens if token.type not in LAYOUT]
    code = [token for token in code if not token.string.lstrip("rR").startswith('"""')]
    comments = sum(line.lstrip().startswith("#") for line in lines)
    return len(code), statements, len(lines), comments


def test_size_and_density():
    """Tokens, not lines, since a limit on lines rewards packing them."""
    sizes = [measure(source) for name, source in FILES.items() if not name.startswith("dev/")]
    tokens, statements, lines, comments = map(sum, zip(*sizes, strict=True))
    assert tokens <= 51_000
    assert tokens / statements <= 9.4
    assert comments / lines >= 0.06
