"""The check that a GPU at hand runs unattended: `make gpu-check`.

    1  what device, build and versions this is
    2  pytest -m gpu: every op against its reference, on the device
    3  every op timed against plain torch and torch.compile, with the copy roof of the same run
    4  bench/results/<gpu>/<date>.json (or --out FOLDER), and one line per shape

Without a GPU it says so, times the CPU implementations instead, and names the targets that stay
owed. Exit code: that of pytest.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path

import torch

from slmperf import _C, arch, ops
from slmperf.bench.rows import measure
from slmperf.testing.cases import FAMILIES
from slmperf.testing.timing import copy_roof_gbs

ROOT = Path(__file__).resolve().parents[1]
TESTS = sorted((ROOT / "tests").glob("test_*.py"))


def machine(device):
    """What the figures were taken on."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    return {
        "device": arch.cuda_name() if device == "cuda" else arch.cpu_name(),
        "capability": arch.cuda_capability() if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "build": _C.build_facts(),
        "implementations": ops.implementations(),
    }


def owed_targets():
    """Names of the targets in bench/targets.toml that wait for a GPU."""
    targets = tomllib.loads((ROOT / "bench" / "targets.toml").read_text())["target"]
    return [t["name"] for t in targets if t["machine"] == "gpu" and t["status"] == "owed"]


def run_tests():
    """pytest -m gpu over the test files that have such tests; its exit code.

    The other files are not collected: they may import what a GPU image lacks.
    """
    files = [str(path) for path in TESTS if "pytest.mark.gpu" in path.read_text()]
    # Safe path: the checkout's own slmperf folder is not the built package.
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *files]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def main(arguments=None, cases=None, seconds=1.0):
    """Run the check; `cases` and `seconds` per implementation stand in for every op's own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    out = parser.parse_args(arguments).out
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = machine(device)
    for name, value in facts.items():
        print(f"{name}: {value}")

    code = None
    if device == "cuda":
        code = run_tests()
    else:
        print("no CUDA device: timing the CPU implementations; these targets stay owed:")
        print("\n".join(f"  {name}" for name in owed_targets()))

    roof_gbs = copy_roof_gbs(device)
    print(f"copy roof: {roof_gbs:.1f} GB/s")
    cases = cases or [case for family in FAMILIES.values() for case in family.bench[device]]
    rows = measure(cases, device, roof_gbs, seconds)

    now = datetime.datetime.now(datetime.UTC)
    folder = out / re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{now:%Y-%m-%d}.json"
    result = {
        "date": f"{now:%Y-%m-%dT%H:%MZ}",
        "machine": facts,
        "pytest_gpu": code,
        "copy_roof_gbs": roof_gbs,
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
