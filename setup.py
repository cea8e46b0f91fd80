"""Builds slmperf/_ops.so and slmperf/_C through CMake and ninja; all metadata is in pyproject.toml.

    python setup.py check-machine    names what a build on this machine lacks (needs no setuptools)

SLMPERF_CUDA=0|1|auto (default auto): whether csrc/cuda is compiled. auto compiles it where nvcc is
found; 1 without nvcc is an error. CXX and CUDACXX name other compilers.

CMake's folder is build/<python>-<cpu|cuda> and is kept, so that a rebuild compiles what changed.
"""

from __future__ import annotations  # so that an old Python gets as far as being told

import fcntl
import filecmp
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
CXX20 = "#include <concepts>\n#include <span>\ntemplate <std::integral T> T f(T x) { return x; }\n"


class Missing(Exception):
    """Something that the build needs and this machine lacks; the text is one line for the user."""


def find_compiler() -> str:
    """A compiler of C++20: $CXX, else the first of c++, g++, clang++ that is there."""
    wanted = os.environ.get("CXX")
    found = [path for name in ([wanted] if wanted else ["c++", "g++", "clang++"])
             if (path := shutil.which(name))]  # fmt: skip
    if not found:
        raise Missing(f"no C++ compiler: looked for {wanted or 'c++, g++, clang++'} (want g++ 12)")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(CXX20)
        command = [found[0], "-std=c++20", "-c", str(source), "-o", str(source.with_suffix(".o"))]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            raise Missing(f"{found[0]} does not compile C++20 (want g++ 12 or later, or set CXX)")
    return found[0]


def check_headers() -> None:
    """Python.h of the running Python."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        raise Missing(f"no Python headers: {header} is not there (Debian: apt install python3-dev)")


def check_venv() -> None:
    """The modules with which make creates .venv."""
    for name in ("venv", "ensurepip"):
        if importlib.util.find_spec(name) is None:
            raise Missing(f"no Python module {name} (Debian: apt install python3-venv)")


def check_make() -> None:
    """make, which runs everything that is not a build by pip."""
    if shutil.which("make") is None:
        raise Missing("no make (Debian: apt install make)")


def find_nvcc() -> str | None:
    """nvcc where CUDA is to be compiled, None where not."""
    mode = os.environ.get("SLMPERF_CUDA", "auto")
    if mode not in ("0", "1", "auto"):
        raise Missing(f"SLMPERF_CUDA is {mode!r}, expected 0, 1 or auto")
    if mode == "0":
        return None
    homes = [os.path.join(os.environ[k], "bin") for k in ("CUDA_HOME", "CUDA_PATH")
             if os.environ.get(k)]  # fmt: skip
    path = os.pathsep.join([os.environ.get("PATH", ""), *homes])
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"), path=path)
    if nvcc is None:
        if mode == "1":
            raise Missing("SLMPERF_CUDA=1 but nvcc is neither on PATH nor in CUDA_HOME nor CUDACXX")
        return None
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.", said)
    if release is None or int(release[1]) < 12:  # C++20 and sm_90a both begin with CUDA 12
        if mode == "1":
            raise Missing(f"SLMPERF_CUDA=1 but {nvcc} is not CUDA 12 or later")
        return None
    return nvcc


def check_machine() -> list[str]:
    """One line for each thing that make install needs and this machine lacks."""
    lines = []
    if sys.version_info < (3, 11):  # noqa: UP036 - whoever runs make has any Python
        found = ".".join(map(str, sys.version_info[:3]))
        lines.append(f"Python is {found}, expected 3.11 or later (make PYTHON=python3.11)")
    for check in (check_headers, check_venv, find_compiler, check_make, find_nvcc):
        try:
            check()
        except Missing as missing:
            lines.append(str(missing))
    return lines


if __name__ == "__main__" and sys.argv[1:] == ["check-machine"]:
    lacks = check_machine()
    for text in lacks:
        print(f"error: {text}", file=sys.stderr)
    sys.exit(2 if lacks else 0)

# Below the check, which must run where setuptools is not installed.
from setuptools import Extension, find_packages, setup  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402
from setuptools.command.build_py import build_py  # noqa: E402
from setuptools.command.sdist import sdist  # noqa: E402


def find_tool(package: str) -> str:
    """cmake or ninja: the wheel beside this Python, else the one on PATH."""
    if (spec := importlib.util.find_spec(package)) and spec.origin:
        for folder in (Path(spec.origin).parent / "data" / "bin", Path(sys.executable).parent):
            if (tool := folder / package).is_file():
                return str(tool)
    if found := shutil.which(package):
        return found
    raise Missing(f"no {package} (pip install {package})")


def torch_paths() -> tuple[str, str, str]:
    """(include folder, library folder, version) of torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise Missing("no torch to build against (pip install -c constraints.txt torch)")
    folder = Path(spec.origin).parent
    version = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())
    return str(folder / "include"), str(folder / "lib"), version[1] if version else "unknown"


def pybind11_include(torch_include: str) -> str:
    """pybind11's headers: its own package, else the copy that torch carries."""
    if (spec := importlib.util.find_spec("pybind11")) and spec.origin:
        return str(Path(spec.origin).parent / "include")
    if Path(torch_include, "pybind11", "pybind11.h").is_file():
        return torch_include
    raise Missing("no pybind11 (pip install pybind11)")


def git_revision() -> str:
    """The commit that is built, with a + when files differ from it; "none" where nobody knows."""
    if (stated := ROOT / "REVISION").is_file():  # a source archive, see SourceArchive
        return stated.read_text().strip()
    git = ["git", "-C", str(ROOT)]
    try:
        ours = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True,
                              text=True, check=True).stdout.strip()  # fmt: skip
        if Path(ours).resolve() != ROOT:
            return "none"
        said = subprocess.run([*git, "describe", "--always", "--dirty=+", "--exclude=*"],
                              capture_output=True, text=True, check=True)  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return said.stdout.strip()


class CMakeBuild(build_ext):
    """Runs CMake and ninja in a folder that stays, then puts both libraries in their places."""

    def run(self) -> None:
        try:
            built = self.compile()
        except Missing as missing:
            sys.exit(f"error: {missing}")
        package = Path(self.get_ext_fullpath("slmperf._C")).parent
        package.mkdir(parents=True, exist_ok=True)
        for library in built:
            if (package / library.name).exists() and filecmp.cmp(library, package / library.name):
                continue
            # Renamed into place: a running process keeps the library it has mapped.
            aside = package / f".{library.name}.new"
            shutil.copy2(library, aside)
            os.replace(aside, package / library.name)

    def compile(self) -> list[Path]:
        """Both libraries, up to date."""
        check_headers()
        compiler, nvcc = find_compiler(), find_nvcc()
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        include, lib, version = torch_paths()
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        tag = f"{sys.implementation.cache_tag}-{'cuda' if nvcc else 'cpu'}"
        folder = ROOT / "build" / tag
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_CXX_COMPILER": compiler,
            "SLMPERF_CUDA": "ON" if nvcc else "OFF",
            "SLMPERF_TORCH_INCLUDE": f"{include};{include}/torch/csrc/api/include",
            "SLMPERF_TORCH_LIB": lib,
            "SLMPERF_TORCH_VERSION": version,
            "SLMPERF_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "SLMPERF_PYBIND11_INCLUDE": pybind11_include(include),
            "SLMPERF_EXT_SUFFIX": suffix,
            "SLMPERF_REVISION": git_revision(),
        }
        if nvcc:
            settings["CMAKE_CUDA_COMPILER"] = nvcc
        flags = [f"-D{name}={value}" for name, value in settings.items()]
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would share ninja's log
            self.spawn([cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *flags])
            self.spawn([cmake, "--build", str(folder)])
        return [folder / "out" / "_ops.so", folder / "out" / f"_C{suffix}"]

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(Path(self.build_lib, "slmperf", "_ops.so"))]


class CleanBuildPy(build_py):
    """Starts from an empty folder: setuptools would carry deleted modules into the next wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class SourceArchive(sdist):
    """Carries the commit along, which git cannot tell once the files are outside of it."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        Path(base_dir, "REVISION").write_text(git_revision() + "\n")


setup(
    packages=[
        *find_packages(include=["slmperf", "slmperf.*"]),
        "slmperf.triton_kernels",
        "slmperf.cuda_kernels",  # sources, for NVRTC
    ],
    package_dir={
        "slmperf.triton_kernels": "triton_kernels",
        "slmperf.cuda_kernels": "csrc/cuda/kernels",
    },
    ext_modules=[Extension("slmperf._C", sources=["csrc/module.cpp"])],
    cmdclass={"build_ext": CMakeBuild, "build_py": CleanBuildPy, "sdist": SourceArchive},
    options={"build": {"build_base": "build/setuptools"}},
)
