"""A Python environment for each serving engine, kept in a cache folder and built once, in minutes.

    python tests/engines/environments.py             builds what is not there yet
    python tests/engines/environments.py --cached    builds nothing; exit code 1 if one is missing

They lie in ${XDG_CACHE_HOME:-~/.cache}/slmperf/engines/<engine>-<hash of what is installed>, made
aside and renamed. Renaming leaves the scripts in bin/ with a wrong first line: everything in there
is run as `bin/python -m ...`.

Without a GPU (ENGINE_DEVICE unset or cpu) the pins are those of sglang.txt and vllm.txt: vLLM has
no such wheel, and is built from its source archive with all compiled kernels left out. With
ENGINE_DEVICE=cuda it is the engines' own wheels with their own requirements.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ENGINES = ("sglang", "vllm")
DEVICE = os.environ.get("ENGINE_DEVICE", "cpu")


def folder(engine: str) -> Path:
    """Where this engine's environment lies, or will."""
    wanted = f"{sys.version_info[:2]} {DEVICE}\n{_requirements(engine)}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (
        cache / "slmperf/engines" / f"{engine}-{hashlib.sha256(wanted.encode()).hexdigest()[:12]}"
    )


def missing() -> list[str]:
    """The engines without an environment."""
    return [engine for engine in ENGINES if not folder(engine).is_dir()]


def build(engine: str) -> None:
    """Makes the environment; a second process that does the same at once is not in the way."""
    wanted = folder(engine)
    aside = wanted.with_name(f".{wanted.name}-{os.getpid()}")
    try:
        _run(sys.executable, "-m", "venv", "--clear", aside)
        pip = (aside / "bin/python", "-m", "pip", "--disable-pip-version-check")
        if DEVICE == "cuda":
            _run(*pip, "install", "-q", _pin(engine))
        else:
            listed = aside / "requirements.txt"
            others = _requirements(engine).splitlines()
            listed.write_text("\n".join(line for line in others if line != _pin(engine)))
            _run(*pip, "install", "-q", "-r", listed)
            _install_without_kernels(engine, pip, aside)
        try:
            aside.rename(wanted)
        except OSError:
            if not wanted.is_dir():  # not even by another process
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _requirements(engine: str) -> str:
    if DEVICE == "cuda":
        return _pin(engine)
    return (Path(__file__).parent / f"{engine}.txt").read_text()


def _pin(engine: str) -> str:
    """engine==version, from the list of pins."""
    lines = (Path(__file__).parent / f"{engine}.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{engine}=="))


def _install_without_kernels(engine: str, pip: tuple, aside: Path) -> None:
    if engine == "sglang":
        _run(*pip, "install", "-q", "--no-deps", _pin(engine))
        return
    # "empty" leaves the kernels out; "+cpu" in the version is by what vLLM knows its platform. pip
    # takes no archive whose version differs from the pin, hence two steps with two versions.
    version = _pin(engine).removeprefix("vllm==")
    settings = {"VLLM_TARGET_DEVICE": "empty", "VLLM_VERSION_OVERRIDE": version}
    plain = ("--no-deps", "--no-build-isolation")
    only_source = ("--no-binary", ":all:", "-d", aside / "source")
    _run(*pip, "download", "-q", *plain, *only_source, _pin(engine), settings=settings)
    (archive,) = (aside / "source").glob("vllm-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(aside / "source", filter="data")
    settings["VLLM_VERSION_OVERRIDE"] = f"{version}+cpu"
    _run(*pip, "install", "-q", *plain, aside / f"source/vllm-{version}", settings=settings)
    shutil.rmtree(aside / "source")


def _run(*command: object, settings: dict[str, str] | None = None) -> None:
    subprocess.run(list(map(str, command)), env=os.environ | (settings or {}), check=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--cached"]:
        sys.exit(1 if missing() else 0)
    for name in missing():
        print(f"building {folder(name)}", flush=True)
        build(name)
