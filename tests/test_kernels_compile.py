"""Every config of every Triton kernel compiles for an A100 and an H100, without either."""

import json
import os
import subprocess
import sys

import pytest

from slmperf.testing.offline import SHARED_LIMIT

# In processes of their own, where triton compiles instead of interpreting. A JSON line per kernel.
PROGRAM = """
import json, sys
from slmperf.testing.cases import FAMILIES
from slmperf.testing.offline import compile_launch, launches

capability = int(sys.argv[1])
for op, family in FAMILIES.items():
    seen = {launch for case in family.compiled for launch in launches(case, capability)}
    for launch in sorted(seen, key=str):
        usage = compile_launch(launch, capability)
        row = dict(op=op, capability=capability, launch=str(launch), **vars(usage))
        row |= dict(name=launch.kernel.__name__, constants=dict(launch.constants))
        print(json.dumps(row | dict(options=dict(launch.options))))
"""


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(capability)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for capability in SHARED_LIMIT
    ]  # fmt: skip
    rows = []
    for process in running:
        output, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        rows += [json.loads(line) for line in output.splitlines()]
    return rows


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_kernels_fit_and_spill_nothing(compiled, capability):
    rows = [row for row in compiled if row["capability"] == capability]
    assert rows
    for row in rows:
        what = f"sm_{capability} {row['launch']}: {row}"
        assert row["shared_bytes"] <= SHARED_LIMIT[capability], what
        assert row["spilled_bytes"] == 0, what
        assert row["registers"] * 32 * row["options"]["num_warps"] <= 65536, what


def test_every_divergence_config_is_among_them(compiled):
    """The table's entries, each with every kernel and kind."""
    from slmperf.triton_kernels.divergence import CONFIGS

    for (capability, _), (block, warps) in CONFIGS.items():
        if capability == 0:
            continue  # the interpreter's
        launched = {
            (row["name"], row["constants"].get("KIND"))
            for row in compiled
            if row["capability"] == capability and row["constants"].get("BLOCK_V") == block
            and row["options"]["num_warps"] == warps
        }  # fmt: skip
        kinds = ("forward_kl", "reverse_kl", "jsd")
        wanted = {(name, kind) for name in ("_softmax_ranges", "_gradient") for kind in kinds}
        assert launched == wanted | {("_mixture_ranges", None)}
