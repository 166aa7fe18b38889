"""bench.py: the table, and that its contenders do the same work; sweep.py."""

import copy
import re

import bench
from conftest import MODERN_PARTS
from script import UserError
import sweep

import pytest
import torch

TINY = [
    "--n_layer=1",
    "--n_head=2",
    "--n_embd=32",
    "--B=1",
    "--T=16",
    "--rounds=1",
    "--dtype=float32",
]


@pytest.fixture
def tiny(monkeypatch):
    """bench's settings, for a model that takes no time."""
    for key, value in dict(
        n_layer=2, n_head=2, n_embd=32, B=2, T=16, items=3, device="cpu", dtype="float32"
    ).items():
        monkeypatch.setattr(bench, key, value)


def test_the_table(spawn):
    result = spawn("dev/bench.py", *TINY, "--what=train", "--against=limit,nanoGPT")
    assert result.returncode == 0, result.stderr
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in result.stdout.splitlines()
        if line[:1] == "|"
    ]
    assert rows[0] == ["what", "ours", "beside it", "theirs", "ratio", "peak memory"]
    (limit,) = (row for row in rows if row[2] == "limit: matrix product")
    ours, theirs = (
        float(re.match(r"[\d,.]+", cell)[0].replace(",", "")) for cell in (limit[1], limit[3])
    )
    assert 0 < ours < theirs
    assert float(limit[4].strip("*")) == pytest.approx(ours / theirs, abs=0.02)
    assert re.fullmatch(r"[\d.]+ / [\d.]+ GB = [\d.]+", limit[5])
    assert [row[3] for row in rows if row[2] == "nanoGPT"] == [
        "left out: there is no clone of it: --nanogpt= or --build_nanogpt= names one"
    ]


def test_a_step_of_modern(tiny):
    repeat, units = bench.train_ours("modern")
    assert units == 32 and repeat() > repeat() > 0


def test_unknown_part(run):
    with pytest.raises(SystemExit, match=r"--what=trane: choose among train,sample"):
        run("dev/bench.py", "--what=trane")


def test_transformers_has_our_weights(tiny):
    ours, theirs = bench.new_model().eval(), bench.transformers_model(torch.float32).eval()
    x = torch.randint(bench.VOCAB, (2, 16))
    torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-4, rtol=1e-4)


def test_other_peoples_scripts_are_not_run(tmp_path):
    (tmp_path / "theirs.py").write_text(
        "import math\nclass GPT:\n    size = math.pi\nraise SystemExit('it ran')\n"
    )
    assert bench.import_definitions(str(tmp_path), "theirs.py", extra=3).GPT.size == pytest.approx(
        3.14159, abs=1e-4
    )


def test_weights_in_float16_are_near_those_in_float32():
    import sample

    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("torch was built without FBGEMM")
    torch.manual_seed(0)
    for settings in (
        {},
        MODERN_PARTS | {"tie_embeddings": True},
        MODERN_PARTS | {"tie_embeddings": True, "mlp": "swiglu"},
    ):
        plain = bench.GPT(bench.GPTConfig(64, 257, 2, 2, 64, **settings)).eval()
        half, brain = (
            sample.prepare_for_sampling(copy.deepcopy(plain), dtype, "cpu")
            for dtype in ("auto", "bfloat16")
        )
        assert sum(isinstance(m, sample.DynamicFP16Linear) for m in half.modules()) == 9
        idx = torch.randint(257, (3, 40))
        near, far = ((plain(idx) - other(idx)).abs().max() for other in (half, brain))
        assert 0 < near < far / 4
        for model in (half, brain):
            assert len(list(model.generate(idx, 40, 2, temperature=0))) == 40  # past the context


def test_runs_of_a_sweep(tmp_path, monkeypatch):
    """Each combination once, at the rate of the preset, times a factor."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "records", "runs.jsonl")
    monkeypatch.setattr(sweep, "data_dir", "shards")
    monkeypatch.setattr(sweep, "grid", "n_embd=192,768 lr_factor=1,2 total_batch_size=8192")
    monkeypatch.setattr(sweep, "train", lambda settings, log_dir: {"0": 9.0, "61": 5.5})
    for _ in range(2):
        sweep.main()
    settings = [record["settings"] for record in sweep.read_records()]
    assert [x["max_lr"] for x in settings] == ["0.0072", "0.0144", "0.0036", "0.0072"]
    assert [x["n_head"] for x in settings] == ["3", "3", "6", "6"]
    assert {x["max_steps"] for x in settings} == {"61"}
    monkeypatch.setattr(sweep, "draw", "rates.png")
    sweep.main()
    assert (tmp_path / "rates.png").stat().st_size > 10_000
    for grid in ("n_embd", "n_embd=a"):
        monkeypatch.setattr(sweep, "grid", grid)
        monkeypatch.setattr(sweep, "draw", "")
        with pytest.raises(UserError):
            sweep.main()
