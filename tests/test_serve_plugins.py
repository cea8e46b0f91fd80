"""The engines' plug-ins without an engine: how they are found, and what they say where it lacks.

What they compute is shown in the engines themselves (tests/engines).
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGINES = {"sglang": "SGLang 0.5.23", "vllm": "vLLM 0.33.0"}
GROUPS = {"sglang": "sglang.srt.plugins", "vllm": "vllm.general_plugins"}


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    ).stdout


@pytest.mark.parametrize("engine", ENGINES)
def test_the_entry_points_name_what_is_there(engine: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][GROUPS[engine]] == {
        "slmperf": f"slmperf.serve.{engine}:register"
    }
    tree = ast.parse((ROOT / f"slmperf/serve/{engine}.py").read_text())
    defined = {node.name: node for node in tree.body if hasattr(node, "name")}
    # The engines pass nothing, and look for the class by the name that config.json has.
    assert not ast.unparse(defined["register"].args)
    assert {"register", "PrunedForCausalLM"} <= set(defined)


def test_the_package_itself_wants_no_engine_and_no_torch() -> None:
    """SGLang imports the package that SGLANG_EXTERNAL_MODEL_PACKAGE names, then its modules."""
    assert run("import sys, slmperf.serve; print('torch' in sys.modules)") == "False\n"


def test_without_an_engine_a_plugin_says_so_and_the_shared_part_works() -> None:
    """Where an engine runs, the model type's class is FlatConfig, and Transformers' own model of it
    is not there."""
    if any(importlib.util.find_spec(engine) for engine in ENGINES):
        pytest.skip("an engine is installed")
    said = run("""
import importlib, sys
for engine in ("sglang", "vllm"):
    try:
        importlib.import_module(f"slmperf.serve.{engine}")
    except ImportError as error:
        print(error)
import slmperf.models.engines.linear, slmperf.models.engines.support
from slmperf.models.engines import flat
flat.register()
from transformers import AutoConfig
made = AutoConfig.for_model("slmperf_pruned")
print(type(made).__name__, "slmperf.models.pruned" in sys.modules)
""").splitlines()
    assert said == [
        *(
            f"slmperf.serve.{engine}: wanted {version} beside slmperf, found no module {engine}"
            for engine, version in ENGINES.items()
        ),
        "FlatConfig False",
    ]
