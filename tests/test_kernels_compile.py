"""Every kernel compiles for an A100 and an H100 without either, and is no worse than recorded."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def kernels_check(root, kernels_compiled):
    spec = importlib.util.spec_from_file_location("kernels_check", root / "bench/kernels_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "part", [["--sample"], pytest.param([], marks=pytest.mark.slow)], ids=["sample", "all"]
)
def test_every_kernel_is_as_recorded(kernels_check, capsys, part):
    """`make kernels-check` itself; every kernel, once one source of them has changed."""
    code = kernels_check.main(part)
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err


def test_a_changed_source_is_compiled_whole(kernels_check, monkeypatch):
    """What the record says of other sources, or of another triton, stands in for nothing."""
    assert kernels_check._as_recorded(), "bench/kernels.json is older than triton_kernels"
    hashes = kernels_check.source_hashes
    changed = {"triton_kernels/encode.py": "another"}
    monkeypatch.setattr(kernels_check, "source_hashes", lambda rows: hashes(rows) | changed)
    assert kernels_check._as_recorded() == {}
    monkeypatch.setattr(kernels_check, "source_hashes", hashes)
    monkeypatch.setattr(kernels_check, "version", lambda name: "3.6.0")
    assert kernels_check._as_recorded() == {}


def test_every_divergence_config_is_among_them(kernels_check):
    """The table's entries, each with every kernel and kind."""
    from slmperf.triton_kernels.divergence import CONFIGS

    rows, _ = kernels_check.triton_rows(None, kernels_check.CACHE, sample=True)
    for (capability, _), (block, warps) in CONFIGS.items():
        if capability == 0:
            continue  # the interpreter's
        found = {
            row["launch"] for row in rows
            if row["sm"] == f"sm_{capability}" and row["launch"].endswith(f"num_warps={warps})")
        }  # fmt: skip
        kinds = [f"KIND={kind}, " for kind in ("forward_kl", "reverse_kl", "jsd")]
        wanted = [("_softmax_ranges(", f"{kind}SPLITS=") for kind in kinds]
        wanted += [("_gradient(", kind) for kind in kinds] + [("_mixture_ranges(", "")]
        for kernel, kind in wanted:
            assert any(
                name.startswith(kernel) and kind in name and f"BLOCK_V={block}," in name
                for name in found
            ), f"{kernel} {kind} BLOCK_V={block} sm_{capability}"


# What a change can do to a kernel. `fine` reaches the H100's matrix units; with 16 rows there is no
# warpgroup instruction, and a product in fp32 has none at all and spills.
PLANTED = """
import triton
import triton.language as tl

from slmperf.testing.offline import Launch

MATRIX_EXEMPT = {"few_rows(*": "16 rows are less than a warpgroup's tile"}


@triton.jit
def fine(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    c = tl.dot(a, b, input_precision="ieee")
    tl.store(c_ptr + m[:, None] * N + n[None, :], c)


@triton.jit
def few_rows(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    fine(a_ptr, b_ptr, c_ptr, M, N, K)


def launch(kernel, rows, warps, dtype="*bf16"):
    types = [("a_ptr", dtype), ("b_ptr", dtype), ("c_ptr", "*fp32")]
    constants = {"M": rows, "N": 64, "K": 64}
    signature = (*types, *((name, "constexpr") for name in constants))
    return Launch(kernel, signature, tuple(constants.items()), ("a_ptr", "b_ptr", "c_ptr"),
                  (("num_warps", warps),))


def launches(capability):
    return [launch(fine, 64, 4), launch(few_rows, 16, 2)]
"""


def planted_check(root, folder, source, *options):
    """The command on planted kernels: exit code and its lines."""
    file = folder / "planted.py"
    file.write_text(source)
    (folder / "cuda").mkdir(exist_ok=True)
    command = [sys.executable, "bench/kernels_check.py", "--launches", file, *options]
    command += ["--record", folder / "kernels.json", "--cuda", folder / "cuda"]
    done = subprocess.run(
        [*map(str, command), "--cache", str(folder / "cache")], cwd=root, text=True,
        capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.fixture(scope="module")
def planted(root, tmp_path_factory):
    """A folder in which the good kernels are recorded, and what recording them said."""
    folder = tmp_path_factory.mktemp("planted")
    return folder, planted_check(root, folder, PLANTED, "--update")


def failures(lines):
    return [line.removeprefix("FAIL: ") for line in lines if line.startswith("FAIL: ")]


def test_good_kernels_are_recorded_and_pass(root, planted):
    folder, (code, lines, errors) = planted
    assert code == 0 and not failures(lines), (lines, errors)
    record = json.loads((folder / "kernels.json").read_text())
    matrix = {(row["kernel"], row["sm"]): set(row["matrix"]) for row in record["rows"]}
    assert matrix == {
        ("fine", "sm_80"): {"HMMA"}, ("fine", "sm_90"): {"HGMMA"},
        ("few_rows", "sm_80"): {"HMMA"}, ("few_rows", "sm_90"): {"HMMA"},
    }  # fmt: skip
    reasons = {row["kernel"]: row.get("exempt") for row in record["rows"]}
    assert reasons == {"fine": None, "few_rows": "16 rows are less than a warpgroup's tile"}
    code, lines, errors = planted_check(root, folder, PLANTED)
    assert code == 0 and lines[-1].endswith("4 with matrix instructions, 0 spill, 0 faults"), lines


def test_a_kernel_that_spills_or_drops_hgmma_fails(root, planted):
    """The same kernels edited: fp32 operands in one, 16 rows without exemption in the other."""
    folder, _ = planted
    spoilt = PLANTED.replace(
        'tl.dot(a, b, input_precision="ieee")',
        'tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")',
    )
    spoilt = spoilt.replace("launch(few_rows, 16, 2)", "launch(few_rows, 16, 2, '*fp16')")
    spoilt = spoilt.replace("MATRIX_EXEMPT =", "EXEMPTED_NO_MORE =")
    code, lines, errors = planted_check(root, folder, spoilt)
    assert code == 1, (lines, errors)
    found = failures(lines)

    def one(*words):
        chosen = [line for line in found if all(word in line for word in words)]
        assert len(chosen) == 1, (words, found)
        return chosen[0]

    for sm, lost in (("sm_80", "HMMA"), ("sm_90", "HGMMA")):
        kernel = f"{sm} fine(*bf16:16 *bf16:16 *fp32:16; M=64, N=64, K=64, num_warps=4)"
        assert "recorded 0" in one(kernel, "spills ", " bytes (", " loads and stores)")
        assert "now none" in one(kernel, f"lost {lost} (recorded ")
        assert lost in one(kernel, "has tl.dot but none of ")
        one(sm, "few_rows(*fp16", "is not in kernels.json")
        one(sm, "few_rows(*bf16", "is in kernels.json but there is no such kernel")
    one("sm_90 few_rows(*fp16", "has tl.dot but none of HGMMA, IGMMA, QGMMA")
    assert "make kernels-check UPDATE=1 records the kernels as they are now" in lines

    # Recording it hides nothing: the spill is printed, what no record excuses still fails.
    before = (folder / "kernels.json").read_text()
    code, lines, _ = planted_check(root, folder, spoilt, "--update")
    assert code == 1 and all("has tl.dot" in line for line in failures(lines))
    assert any(line.startswith("changed: sm_90 fine") and "spills" in line for line in lines)
    code, lines, _ = planted_check(root, folder, spoilt)
    assert code == 1 and all("has tl.dot" in line for line in failures(lines))
    (folder / "kernels.json").write_text(before)


# Arguments of every kind, as a launcher gives them.
ARGUMENTS = """
import torch
import triton
import triton.language as tl

from slmperf.testing import offline


@triton.jit
def mixed(x_ptr, bias_ptr, y_ptr, size, far, one, scale, flag, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * scale
    if bias_ptr is not None:
        x += tl.load(bias_ptr + at, mask=inside, other=0.0)
    x = tl.where(flag, x, -x)
    tl.store(y_ptr + at * one + far, x, mask=inside)


def launches(capability):
    y = torch.empty(1024)
    given = [torch.empty(64, dtype=dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)]
    with offline._as_if_on(capability) as seen:
        for x in given if capability == 90 else given[1:]:  # an A100 has no fp8e4nv
            kernel = triton.runtime.jit.JITFunction(mixed.fn)
            kernel[(1,)](x, None, y[1:], 64, 2**40 + 1, 1, 0.5, True, BLOCK=64, num_warps=2)
    return seen
"""


def test_arguments_are_what_triton_takes_them_for(root, tmp_path):
    """fp8, None, a bool, 1, a long integer and a tensor off 16 bytes; and all of it compiles."""
    code, lines, errors = planted_check(root, tmp_path, ARGUMENTS, "--update")
    assert code == 0 and not failures(lines), (lines, errors)
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    rest = "*fp32 i32:16 i64 fp32 u1; bias_ptr=None, one=1, BLOCK=64, num_warps=2)"
    assert [(row["sm"], row["launch"]) for row in rows] == [
        ("sm_80", f"mixed(*fp8e5:16 {rest}"),
        ("sm_90", f"mixed(*fp8e4nv:16 {rest}"),
        ("sm_90", f"mixed(*fp8e5:16 {rest}"),
    ]


def test_a_kernel_that_does_not_compile_and_an_idle_exemption_fail(root, tmp_path):
    broken = PLANTED.replace("few_rows(*", "nothing(*").replace("tl.dot(", "tl.dot(c_ptr, ")
    code, lines, errors = planted_check(root, tmp_path, broken)
    assert code == 1, errors
    assert any("sm_90 fine" in line and "does not compile: " in line for line in failures(lines))
    assert "MATRIX_EXEMPT 'nothing(*' exempts no launch" in failures(lines)


SPILLING_CUDA = """
template <int N>
__global__ void __launch_bounds__(1024) mix(const float* x, float* y) {
  float v[N];
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = x[i * 1024 + threadIdx.x];
  for (int r = 0; r < 9; ++r) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = v[i] * v[(i + 7) % N] + v[N - 1 - i];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) y[i * 1024 + threadIdx.x] = v[i];
}
template __global__ void mix<SIZE>(const float*, float*);
"""


def test_cuda_that_spills_fails(kernels_check, tmp_path):
    nvcc, release = kernels_check.find_nvcc()
    if nvcc is None:
        pytest.skip(f"no CUDA C++ here: {release}")
    source = tmp_path / "mix.cu"
    same = lambda row: True  # noqa: E731
    recorded = {"rows": []}
    for size in (16, 96):
        source.write_text(SPILLING_CUDA.replace("SIZE", str(size)))
        rows = kernels_check.cuda_rows(nvcc, release, tmp_path, tmp_path / "cache")
        assert [row["sm"] for row in rows] == ["sm_80", "sm_90a"]
        assert all(row["threads"] == 1024 and row["registers"] <= 64 for row in rows)
        for row in rows:
            assert row["launch"] == f"void mix<{size}>(float const*, float*)"
            row["launch"] = row["launch"].replace(str(size), "N")  # as if by a change of its body
        failed, _ = kernels_check.compare(rows, recorded, same)
        if size == 16:
            assert all(line.endswith("is not in kernels.json") for line in failed)
            recorded = {"rows": rows}
        else:
            assert len(failed) == 2 and all(", recorded 0" in line for line in failed)


def row_of(**changes):
    good = {
        "source": "triton_kernels/x.py", "kernel": "k", "sm": "sm_90", "launch": "k(*fp32; B=1)",
        "registers": 64, "spilled_bytes": 0, "spill_instructions": 0, "shared_bytes": 1024,
        "threads": 128, "matrix": {"HGMMA": 4}, "dot": True,
    }  # fmt: skip
    return good | changes


@pytest.mark.parametrize(
    "change,words",
    [
        ({"shared_bytes": 227 * 1024}, None),
        ({"shared_bytes": 227 * 1024 + 1}, "a block has 232448"),
        ({"sm": "sm_80", "matrix": {"HMMA": 1}, "shared_bytes": 163 * 1024 + 1}, "has 166912"),
        ({"registers": 128, "threads": 512}, None),
        ({"registers": 129, "threads": 512}, "129 registers x 512 threads"),
        ({"matrix": {"HMMA": 8}}, "has tl.dot but none of HGMMA"),
        ({"matrix": {"QGMMA": 8}}, None),
        ({"matrix": {}, "dot": False}, None),
        ({"matrix": {"HMMA": 8}, "exempt": "few rows"}, None),
        ({"sm": "sm_80", "matrix": {}}, "has tl.dot but none of DMMA, HMMA, IMMA"),
        ({"error": "out of registers"}, "does not compile: out of registers"),
    ],
)
def test_rules_that_need_no_record(kernels_check, change, words):
    found = kernels_check.own_faults(row_of(**change))
    assert [words in line for line in found] == ([True] if words else []), found


def test_rules_against_the_record(kernels_check):
    """A loss fails; a change for the better is noted; another compiler's losses are noted."""
    row = row_of(spilled_bytes=16, spill_instructions=4, matrix={"HGMMA": 2, "HMMA": 1})
    record = {"rows": [row]}

    def outcome(*rows, same=True):
        return kernels_check.compare(rows, record, lambda row: same)

    assert outcome(row) == ([], [])
    worse = row | {"spilled_bytes": 24, "matrix": {"HGMMA": 2}}
    (spills, lost), noted = outcome(worse)
    assert "spills 24 bytes (4 loads and stores), recorded 16" in spills and not noted
    assert "lost HMMA (recorded 2 HGMMA, 1 HMMA, now 2 HGMMA)" in lost
    assert outcome(worse, same=False) == ([], [spills, lost])
    failed, (noted,) = outcome(row | {"spilled_bytes": 8, "registers": 60})
    assert not failed and noted.endswith("changed: registers 64 -> 60, spilled_bytes 16 -> 8")
    (new, gone), _ = outcome(row | {"launch": "k(*fp16; B=1)"})
    assert new == "sm_90 k(*fp16; B=1) is not in kernels.json, and spills 16 bytes"
    assert gone == "sm_90 k(*fp32; B=1) is in kernels.json but there is no such kernel"


def test_without_nvcc_its_rows_stay(kernels_check, tmp_path, monkeypatch, capsys):
    """The record keeps what this machine cannot compile, and says so."""
    cuda = row_of(source="csrc/cuda/x.cu", launch="x()", dot=False, matrix={})
    path = tmp_path / "kernels.json"
    triton = kernels_check.version("triton")
    path.write_text(kernels_check.render([cuda], {"triton": triton, "nvcc": "12.9"}))
    monkeypatch.setattr(kernels_check, "find_nvcc", lambda: (None, "nvcc is not here"))
    monkeypatch.setattr(kernels_check, "triton_rows", lambda *given: ([row_of()], []))
    assert kernels_check.main(["--record", str(path), "--update"]) == 0
    assert "csrc/cuda is not compiled: nvcc is not here; its 1 recorded rows stay" in (
        capsys.readouterr().out
    )
    record = json.loads(path.read_text())
    assert [row["launch"] for row in record["rows"]] == ["x()", "k(*fp32; B=1)"]
    assert record["nvcc"] == "12.9"
    assert kernels_check.main(["--record", str(path)]) == 0


def test_another_triton_is_compared_but_not_recorded(kernels_check, tmp_path, monkeypatch, capsys):
    path = tmp_path / "kernels.json"
    triton = kernels_check.version("triton")
    path.write_text(kernels_check.render([row_of()], {"triton": triton, "nvcc": None}))
    spilling = row_of(spilled_bytes=8, spill_instructions=2)
    monkeypatch.setattr(kernels_check, "find_nvcc", lambda: (None, "nvcc is not here"))
    monkeypatch.setattr(kernels_check, "triton_rows", lambda *given: ([spilling], []))
    monkeypatch.setattr(kernels_check, "version", lambda name: "3.6.0")
    assert kernels_check.main(["--record", str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"recorded with triton {triton}, here is 3.6.0: figures are only noted" in printed
    assert "note: sm_90 k(*fp32; B=1) spills 8 bytes" in printed
    assert kernels_check.main(["--record", str(path), "--update"]) == 2
    assert f"recorded with {triton}" in capsys.readouterr().err
