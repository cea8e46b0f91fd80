"""The documents keep their word: their Python runs, and every path they name is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "bench/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
)
SUFFIXES = (".py", ".md", ".toml", ".txt", ".yaml", ".json", ".cpp", ".h", ".cu", ".cuh", ".html")
# Written by a run or lying beside the repository, so not there in a fresh clone.
MADE = ("runs/", "build/", "dist/", ".venv", "../", "~", "/")
MADE_FILES = {"report.md", "report.html", "config.json", "manifest.json", "model.safetensors"}


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def paths_named(text: str) -> set[str]:
    """Paths in code spans, shell blocks and link targets of a Markdown text."""
    blocks = re.findall(
        r"^```(?:sh|bash|console)?\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL
    )
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)", outside)
    spans = re.findall(r"`([^`\n]+)`", outside)
    words = re.split(r"[\s=]+", " ".join([*blocks, *spans]))
    tops = {path.name for path in ROOT.iterdir() if path.is_dir()}
    named = set()
    for word in (word.strip(",:;()\"'").rstrip(".") for word in [*links, *words]):
        if "://" in word or not re.fullmatch(r"[\w.][\w.*/-]*", word):
            continue
        if word.startswith(MADE) or word in MADE_FILES:
            continue
        if word.endswith(SUFFIXES) or ("/" in word and word.split("/")[0] in tops):
            named.add(word)
    return named


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_exist(document):
    missing = [
        path
        for path in sorted(paths_named(document.read_text()))
        if not list(ROOT.glob(path)) and not list(document.parent.glob(path))
    ]
    assert not missing, f"{document.name} names paths that are not there"


def test_a_path_that_is_not_there_is_found():
    named = paths_named(
        "see `slmperf/nothing.py`, 3 GB/s, [the law](LICENCE.md)\n```sh\nls tests/gone\n```\n"
    )
    assert named == {"slmperf/nothing.py", "LICENCE.md", "tests/gone"}


@pytest.mark.parametrize("document", ["README.md", "docs/linear.md"])
def test_python_runs(document, tmp_path):
    """All blocks in order, in one fresh interpreter, as a reader would paste them."""
    code = "\n".join(python_blocks((ROOT / document).read_text()))
    assert code.strip(), f"{document} shows no Python"
    script = tmp_path / "shown.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
