"""The engines' and the router's own parsers read what `slmperf deploy` has them started with."""

from __future__ import annotations

import json

import pytest
from deployments import DECILM, PER_LAYER, deployment, quantised

from slmperf.serve.deploy.lines import router_line, serve_line

MODELS = {
    "fp8": quantised("fp8", kv_cache=True),
    "per-layer": PER_LAYER | {"dtype": "float32"},
    "decilm": DECILM,
}
# Reads lines, prints what the parser makes of the options that are named.
READ = {
    "sglang": """
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args as read
load_plugins()  # as `sglang serve` does before
""",
    "vllm": """
from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
def read(line):
    found = make_arg_parser(FlexibleArgumentParser()).parse_args(line)
    validate_parsed_serve_args(found)
    return found
""",
    "router": "from sglang_router.launch_router import parse_router_args as read",
}


def parsed(in_environment, site, parser, lines, names):
    engine = "vllm" if parser == "vllm" else "sglang"
    source = f"""{READ[parser]}
import json
lines, names = {lines!r}, {names!r}
found = [{{name: getattr(one, name) for name in names}} for one in map(read, lines)]
print("PARSED " + json.dumps(found))
"""
    said = in_environment(engine, source, site)
    (told,) = [line for line in said.splitlines() if line.startswith("PARSED ")]
    return json.loads(told.removeprefix("PARSED "))


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_engines_read_their_lines(in_environment, site, tmp_path, engine):
    made = {
        name: deployment(tmp_path / name, fields, engine=engine, tp=2)
        for name, fields in MODELS.items()
    }
    odd = quantised("w8a8") | {"intermediate_size": 5136}  # halves: not for SGLang's kernel
    made["own"] = deployment(tmp_path / "own", odd, engine=engine, tp=2, quantization="slmperf")
    lines = [
        serve_line(one, str(one.checkpoint.folder), "127.0.0.1", 4321, 2)[2:]
        for one in made.values()
    ]
    ranks, length = {
        "sglang": ("tp_size", "context_length"),
        "vllm": ("tensor_parallel_size", "max_model_len"),
    }[engine]
    same = [ranks, length, "host", "port"]
    own = ["dtype", "kv_cache_dtype", "trust_remote_code", "quantization"]
    found = dict(zip(made, parsed(in_environment, site, engine, lines, same + own), strict=True))
    for one in found.values():
        assert [one[name] for name in same] == [2, 16392, "127.0.0.1", 4321]
    assert found["fp8"]["kv_cache_dtype"] == "fp8_e4m3"
    assert found["per-layer"]["dtype"] == "bfloat16"
    assert [one["trust_remote_code"] for one in found.values()] == [False, False, True, False]
    assert [one["quantization"] for one in found.values()] == [None, None, None, "slmperf"]


def test_the_router_reads_its_lines(in_environment, site, tmp_path):
    made = deployment(tmp_path, MODELS["fp8"], replicas=3)
    discovery = ["--service-discovery", "--selector", "a=b", "c/d=e"]
    discovery += ["--service-discovery-port", "30000", "--service-discovery-namespace", "here"]
    lines = [
        router_line(made, "127.0.0.1", 4321, workers)[3:]
        for workers in (["--worker-urls", "http://x:1", "http://y:2", "--dp-aware"], discovery)
    ]
    names = ["worker_urls", "dp_aware", "policy", "service_discovery", "selector", "port"]
    named, found = parsed(in_environment, site, "router", lines, names)
    assert named["worker_urls"] == ["http://x:1", "http://y:2"] and named["dp_aware"]
    assert found["service_discovery"] and found["selector"] == {"a": "b", "c/d": "e"}
    assert {one["policy"] for one in (named, found)} == {"cache_aware"}
