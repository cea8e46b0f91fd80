"""The build: quick when nothing changed, clear when something is missing, linked to little."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

from slmperf import _C, arch

ROOT = Path(__file__).resolve().parents[1]


def setup(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py in the checkout."""
    return subprocess.run(
        [sys.executable, "setup.py", *arguments], cwd=ROOT, env=os.environ | env, text=True,
        capture_output=True, check=False,
    )  # fmt: skip


def test_rebuild_without_changes_compiles_nothing():
    first = setup("build_ext", "--inplace")
    assert first.returncode == 0, first.stdout + first.stderr
    native = Path(_C.__file__)
    before = native.stat().st_mtime_ns, arch.OPS_LIBRARY.stat().st_mtime_ns
    again = setup("build_ext", "--inplace")
    assert "no work to do" in again.stdout
    assert before == (native.stat().st_mtime_ns, arch.OPS_LIBRARY.stat().st_mtime_ns)


def dynamic(library: Path) -> str:
    return subprocess.run(
        ["readelf", "--dynamic", "--wide", library], capture_output=True, text=True, check=True
    ).stdout


def undefined(library: Path) -> list[str]:
    """Names that the library takes from elsewhere."""
    said = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", "--demangle", library],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return [line.split(maxsplit=1)[1] for line in said.splitlines()]


def test_ops_library_is_bound_to_nothing_it_need_not_be():
    said = dynamic(arch.OPS_LIBRARY)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\]", said))
    system = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"}
    assert needed <= system | {"libtorch.so", "libtorch_cpu.so", "libgomp.so.1"}
    assert "RPATH" not in said and "RUNPATH" not in said
    names = undefined(arch.OPS_LIBRARY)
    assert not [name for name in names if re.match(r"_?Py[A-Z_]", name)], "it takes names of Python"
    unstable = [name for name in names if re.match(r"(at|c10|torch)::", name)]
    assert not unstable, "it takes C++ names of torch, which change between versions"


def test_native_module_needs_no_torch():
    assert "torch" not in dynamic(Path(_C.__file__))


def test_build_facts():
    facts = _C.build_facts()
    assert facts["torch"].startswith("2.") and facts["revision"]
    assert facts["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert "scalar" in facts["cpu_isas"].split()
    assert (facts["cuda"] == "") == (facts["cuda_archs"] == "")


@pytest.fixture
def tools(tmp_path) -> Path:
    """A folder for PATH with everything that a build needs, and no nvcc."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("c++", "as", "ld", "make", "git"):
        if path := shutil.which(name):
            (folder / name).symlink_to(path)
    return folder


@pytest.mark.parametrize("arguments", [["check-machine"], ["build_ext"]], ids=" ".join)
def test_cuda_without_nvcc_is_one_line(tools, arguments, tmp_path):
    env = {"PATH": str(tools), "CUDA_HOME": "", "CUDA_PATH": "", "SLMPERF_CUDA": "1"}
    build = ["--build-lib", str(tmp_path / "lib")] if arguments == ["build_ext"] else []
    done = setup(*arguments, *build, **env)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert errors == [
        "error: SLMPERF_CUDA=1 but nvcc is neither on PATH nor in CUDA_HOME nor CUDACXX"
    ]
    assert "Traceback" not in done.stderr
    assert setup("check-machine", **(env | {"SLMPERF_CUDA": "auto"})).returncode == 0


def test_wrong_value_of_slmperf_cuda():
    done = setup("check-machine", SLMPERF_CUDA="yes")
    assert done.returncode == 2
    assert done.stderr == "error: SLMPERF_CUDA is 'yes', expected 0, 1 or auto\n"


def test_missing_compiler_is_one_line(tmp_path):
    done = setup("check-machine", CXX="no-such-compiler")
    assert done.returncode == 2
    assert done.stderr == "error: no C++ compiler: looked for no-such-compiler (want g++ 12)\n"
    old = tmp_path / "old-c++"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = setup("check-machine", CXX=str(old))
    assert (
        done.stderr == f"error: {old} does not compile C++20 (want g++ 12 or later, or set CXX)\n"
    )


def test_several_things_missing_are_a_line_each(tmp_path):
    done = setup("check-machine", PATH=str(tmp_path), CXX="", SLMPERF_CUDA="0")
    assert done.returncode == 2
    assert [line.split(":")[1].strip() for line in done.stderr.splitlines()] == [
        "no C++ compiler",
        "no make (Debian",
    ]


def test_source_archive_is_complete(tmp_path):
    done = setup(
        "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        inside = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    wanted = {
        "REVISION",
        "setup.py",
        "CMakeLists.txt",
        "pyproject.toml",
        "LICENSE",
        "constraints.txt",
    }
    for folder, suffixes in (
        ("csrc", ".cpp .h .cu .cuh"),
        ("slmperf", ".py"),
        ("triton_kernels", ".py"),
    ):
        wanted |= {
            str(path.relative_to(ROOT))
            for path in (ROOT / folder).rglob("*")
            if path.suffix in suffixes.split()
        }
    assert wanted <= inside


def test_installed_version():
    import slmperf

    assert metadata.version("slmperf") == slmperf.__version__


@pytest.fixture
def cuda_probe():
    """The one CUDA op of the build, where the build has CUDA."""
    if not _C.build_facts()["cuda"]:
        pytest.skip("this build has no CUDA: nvcc was not found or SLMPERF_CUDA=0")
    import slmperf.ops  # noqa: F401 - loads the library

    return torch.ops.slmperf.cuda_probe


def test_cuda_code_loads_without_cuda(cuda_probe):
    assert cuda_probe.default._schema.name == "slmperf::cuda_probe"
    with pytest.raises(NotImplementedError):
        cuda_probe(torch.zeros(3))


@pytest.mark.gpu
def test_cuda_probe_runs_on_torchs_stream(cuda_probe):
    x = torch.arange(100_003, dtype=torch.float32, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = cuda_probe(x)
    stream.synchronize()
    assert torch.equal(out, x + 1)
