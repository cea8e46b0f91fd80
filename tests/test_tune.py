"""bench/tune.py without a GPU: what it would try, and the table that it writes."""

import importlib.util
import os
import subprocess
import sys
import tomllib
from itertools import product

import pytest
import torch

from slmperf import arch
from slmperf.ops.linear import table
from slmperf.ops.linear.table import Call
from slmperf.testing.linear_cases import SCHEMES


@pytest.fixture(scope="module")
def tune(root):
    spec = importlib.util.spec_from_file_location("tune", root / "bench" / "tune.py")
    module = sys.modules["tune"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_candidates_fit_and_hold_what_the_tables_have(tune):
    """Shared memory for all the programs that a multiprocessor is to run, sums in registers; none
    twice; and a search does not start behind where the tables are."""
    tried = set()
    for capability in (80, 90):
        for weights in tune.classes(capability):
            for rows in tune.ROWS:
                found = tune.candidates(weights, rows, capability)
                assert 1 < len(found) < 60
                assert len({tuple(tile.values()) for tile in found}) == len(found)
                for tile in found:
                    block = tile["m"] * weights.input_bytes + tile["n"] * weights.weight_bytes
                    shared = block * tile["k"] * tile["stages"] * tile["programs"]
                    assert shared <= tune.SHARED[capability], tile
                    assert tile["m"] * tile["n"] <= 128 * 32 * tile["warps"], tile
                    tried.add((weights.op, *(tile[name] for name in ("m", "n", "k", "warps"))))
    for capability in (80, 90):
        for row in table.read(f"sm_{capability}"):
            if row.config:
                tile = tuple(row.config[name] for name in ("m", "n", "k", "warps"))
                assert (row.op, *tile) in tried, row


def test_a_gpu_without_fp8_units_is_not_measured_with_them(tune):
    assert [one.scheme for one in tune.classes(80, "linear_fp8")] == ["fp8-weight"]
    assert len(tune.classes(89, "linear_fp8")) == 3


def faked(fastest):
    """Times as `measured` gives them: the n-th tile takes 10 + n us; `fastest` other ones."""

    def measured(weights, rows, shape, tiles, rivals, seconds):
        found = {tuple(tile.values()): 10.0 + n for n, tile in enumerate(tiles)}
        found |= {name: 11.0 for name in rivals}
        found |= {name: us for (op, most, name), us in fastest.items()
                  if (op, most) == (weights.op, rows)}  # fmt: skip
        return found

    return measured


def test_the_table_that_is_written(tune, tmp_path, monkeypatch, capsys):
    """The fastest first; a rival that is no faster by more than 3 % is not named; a tile always."""
    fastest = {("linear_int4", 16, "cuda"): 5.0, ("linear_int8", 8192, "torch"): 9.8,
               ("linear_fp8", 8192, "torch"): 5.0}  # fmt: skip
    monkeypatch.setattr(tune, "measured", faked(fastest))
    monkeypatch.setattr(arch, "cuda_capability", lambda device=0: (9, 0))
    monkeypatch.setattr(arch, "cuda_name", lambda device=0: "a GPU")
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    for name in ("sm_80", "sm_90"):
        (tmp_path / f"{name}.toml").write_text("row = []\n")
    table.read.cache_clear(), table.device_class.cache_clear(), table.on_gpu.cache_clear()
    assert tune.main([]) == 0
    table.read.cache_clear()
    try:
        text = (tmp_path / "sm_90.toml").read_text()
        assert "Measured by bench/tune.py on a GPU, 20" in text and torch.__version__ in text

        def impls(op, rows, **other):
            call = Call(op, rows, 4096, 4096, torch.bfloat16, **other)
            return [row.impl for row in table.on_gpu(call, 90)][:2]

        assert impls("linear_int4", 16) == ["cuda", "triton"]
        assert impls("linear_int4", 17) == ["triton", "triton"]
        assert impls("linear_int8", 9000, rounded=True) == ["triton"]
        assert impls("linear_fp8", 9000, rounded=True) == ["torch", "triton"]
        assert impls("linear_fp8", 9000, rounded=True, experts=4) == ["triton"]
        call = Call("linear_fp8", 9000, 4104, 4096, torch.bfloat16, rounded=True)
        assert [row.impl for row in table.on_gpu(call, 90)] == ["triton"]
        call = call._replace(dtype=torch.float32, op="linear_int4", rounded=False)
        assert table.on_gpu(call, 90)[0].impl == "torch"

        # One op alone: the others' rows stay, to the letter.
        before = table.read("sm_90")
        assert tune.main(["--op", "linear_int8", "--out", str(tmp_path / "sm_91.toml")]) == 0
        after = table.read("sm_91")
        for op in ("linear_int4", "linear_int8", "linear_fp8"):
            assert [r for r in after if r.op == op] == [r for r in before if r.op == op]
    finally:
        table.read.cache_clear(), table.device_class.cache_clear(), table.on_gpu.cache_clear()


def unanswered(rows):
    """Calls of any scheme for which no row that needs nothing but Triton holds."""
    found = []
    for (name, scheme), m, dtype, experts in product(
        SCHEMES.items(), (1, 64, 1000, 9000), (torch.bfloat16, torch.float32), (0, 3)
    ):
        op = "linear_" + name.split("-")[0]
        # Inputs that are to be rounded are not, where a GPU has no units for their codes.
        for rounded in (False, True) if scheme.activations else (False,):
            blocks = scheme.spec.block is not None
            call = Call(op, m * max(1, experts), 4096, 4096, dtype, rounded, blocks, experts)
            if not any(row.impl == "triton" and row.holds(call) for row in rows):
                found.append(call)
    return found


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
@pytest.mark.parametrize("op", [None, "linear_fp8", "linear_int8"])
def test_a_written_table_answers_every_scheme(tune, tmp_path, monkeypatch, capsys, capability, op):
    """An A100's, too, which cannot measure fp8 inputs: rows of what is not measured stay."""
    monkeypatch.setattr(tune, "measured", faked({("linear_fp8", 64, "torch"): 1.0}))
    monkeypatch.setattr(arch, "cuda_capability", lambda device=0: capability)
    monkeypatch.setattr(arch, "cuda_name", lambda device=0: "a GPU")
    number, out = 10 * capability[0] + capability[1], tmp_path / "written.toml"
    assert tune.main([*(["--op", op] if op else []), "--out", str(out)]) == 0
    written = [table.Row(**row) for row in tomllib.loads(out.read_text())["row"]]
    old = table.read(table.device_class(number))
    assert not unanswered(old) and not unanswered(written)

    def of_class(rows, one):
        said = {"op": one.op} | one.says
        return [row for row in rows if all(getattr(row, k) in (None, v) for k, v in said.items())]

    for one in tune.CLASSES:
        if one not in tune.classes(number, op):
            assert of_class(written, one) == of_class(old, one)


def test_a_class_without_a_tile_that_runs_keeps_its_rows(tune, tmp_path, monkeypatch, capsys):
    times = faked({})

    def measured(weights, *arguments):
        found = times(weights, *arguments)
        return {"torch": 5.0} if weights.scheme == "fp8-block" else found

    monkeypatch.setattr(tune, "measured", measured)
    monkeypatch.setattr(arch, "cuda_capability", lambda device=0: (9, 0))
    monkeypatch.setattr(arch, "cuda_name", lambda device=0: "a GPU")
    out = tmp_path / "written.toml"
    assert tune.main(["--op", "linear_fp8", "--out", str(out)]) == 0
    assert "linear_fp8 fp8-block: not every M has a tile, the old rows stay" in (
        capsys.readouterr().out
    )
    written = [table.Row(**row) for row in tomllib.loads(out.read_text())["row"]]
    assert not unanswered(written)
    of_blocks = [row for row in table.read("sm_90") if row.blocks]
    assert of_blocks and [row for row in written if row.blocks] == of_blocks


def test_without_a_gpu_it_says_so(tune, monkeypatch, capsys):
    monkeypatch.setattr(arch, "cuda_capability", lambda device=0: None)
    assert tune.main([]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().out


def test_dry_run_compiles(root):
    """One tile of weight-only fp8 for an A100, as a command compiles it."""
    pytest.importorskip("triton")
    code = "import sys, tune; tune.ROWS = (16,); sys.exit(tune.main(sys.argv[1:]))"
    wanted = ["--dry-run", "--arch", "80", "--op", "linear_fp8", "--limit", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code, *wanted], cwd=root / "bench", capture_output=True, text=True,
        env=environment | {"PYTHONSAFEPATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    first, last = done.stdout.splitlines()
    assert first.startswith("linear_fp8 fp8-weight M<=16 {'m': 16, ") and "bytes shared" in first
    assert last == "1 tiles for sm_80, 0 do not fit"
