"""The rules of the engines: what they refuse, with what they name instead, and their page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import engine_tables
import pytest
from engine_tables import BASE, SCHEMES, SHAPES, fields_of_scheme, layers
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from slmperf import cli
from slmperf.check import InputError
from slmperf.models.engines.facts import ENGINES, facts_of
from slmperf.models.engines.support import (
    as_decilm,
    check_served,
    nearest,
    neuron_multiple,
    reasons,
    served_ranks,
)
from slmperf.models.quantized import LinearScheme
from slmperf.ops.weight_spec import WeightSpec


def of(name: str, **changed: Any) -> dict[str, Any]:
    """The fields of a shape of the page."""
    return BASE | SHAPES[name] | changed


def refused(model: dict[str, Any], **how: Any) -> str:
    """The one line that refuses it."""
    with pytest.raises(InputError) as caught:
        check_served("here", model, **({"engine": "vllm"} | how))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("here: ")
    return str(caught.value)


def test_the_page_is_made_of_the_rules() -> None:
    found = engine_tables.PAGE.read_text()
    assert engine_tables.page(found) == found, "run python tests/engine_tables.py"


def test_stock_shapes_are_served_by_both() -> None:
    uniform = of("whole KV groups fewer in all layers (16 over 4)")
    for engine in ENGINES:
        assert reasons(uniform, engine=engine, ranks=4) == []
        assert served_ranks(uniform, engine=engine) == [1, 2, 4, 8, 16]
        line = refused(uniform, engine=engine, ranks=3)
        assert "16 query heads over 4 key/value heads do not divide by 3 ranks" in line
        assert "wanted 1, 2, 4, 8 or 16 tensor-parallel ranks" in line
    assert "8 query over 2 key/value heads" in refused(
        BASE | {"num_attention_heads": 12, "num_key_value_heads": 3}, ranks=2
    )


def test_layers_that_differ_want_the_plugin_or_deci_lm() -> None:
    for name in ("neurons by layer", "KV heads by layer"):
        for engine in ENGINES:
            line = refused(of(name), engine=engine, ranks=4)
            assert line.endswith(
                "wanted slmperf installed beside the engine (its plug-in) or the DeciLM that "
                "`slmperf export --stock` writes"
            )
            assert reasons(of(name), engine=engine, ranks=4, plugin=True) == []
    written, _ = as_decilm(
        facts_of(of("KV heads by layer")), engine="sglang", ranks=1, device="cuda"
    )
    assert {layer.heads.kv_heads for layer in written.layers} == {8}
    uneven = of("query heads unevenly over KV heads (12 over 8)")
    assert served_ranks(uneven, engine="vllm", plugin=True) == [1, 2, 4, 8]


@pytest.mark.parametrize(
    "name,engine,plugin,found",
    [
        ("Qwen2, fewer heads", "vllm", False, "what `slmperf export` writes for the plug-in"),
        (
            "Mixtral, fewer heads",
            "sglang",
            True,
            "takes heads of 4096 / 16 channels, they have 128",
        ),
        ("Mistral with sliding windows", "sglang", True, "sliding windows, which its classes"),
        (
            "Qwen2 or Qwen3 with windows in some layers",
            "vllm",
            False,
            "in all or none; wanted what",
        ),
        ("biases in the MLP", "sglang", False, "biases in the MLP, which its Llama leaves out"),
        ("a label-only head", "vllm", False, "read by slmperf's plug-in alone"),
    ],
)
def test_what_a_class_lacks(name: str, engine: str, plugin: bool, found: str) -> None:
    assert found in refused(of(name), engine=engine, plugin=plugin)


def test_quantised_layers_over_ranks_and_kernels() -> None:
    def why(scheme: str, neurons: int, **how: Any) -> str:
        return refused(fields_of_scheme(SCHEMES[scheme], neurons), **how)

    four = "W4A16, groups of 128"
    assert "down_proj: 320 inputs per rank, wanted whole groups of 128" in why(four, 1280, ranks=4)
    assert "multiples of 512, to which `slmperf export --pad`" in why(four, 1280, ranks=4)
    channel = "W4A16, a scale per channel"
    line = why(channel, 1288, engine="sglang")
    assert "Marlin wants multiples of 128 and 64 or of 64 and 128" in line
    assert "multiples of 64" in line and "--quantization slmperf with the plug-in" in line
    odd = fields_of_scheme(SCHEMES[channel], 1288)
    assert reasons(odd, engine="vllm") == []  # which fills up
    assert reasons(odd, engine="sglang", device="cpu") == []
    assert "int8 kernel wants multiples of 16 and 8" in why("W8A8", 1032, engine="sglang")
    blocks = why("FP8 blocks", 1408, ranks=2)
    assert "gate_up_proj: 704 outputs per rank, wanted whole blocks of 128" in blocks
    assert "4 neurons per rank, wanted a multiple of 8" in why("bf16", 16, engine="sglang", ranks=4)

    eight = fields_of_scheme(SCHEMES["W8A8"], 1024)
    line = refused(eight, engine="sglang", dtype="float32", device="cpu")
    assert "not in float32; wanted --dtype bfloat16 or --quantization slmperf" in line
    assert reasons(eight, engine="vllm", dtype="float32", device="cpu") == []
    assert "not float32" in refused(eight, engine="vllm", dtype="float32")
    own = {"engine": "sglang", "plugin": True, "quantization": "slmperf"}
    assert reasons(odd, **own) == [] and reasons(eight, dtype="float32", **own) == []


def test_the_plugins_own_product_is_not_for_everything() -> None:
    """`linear.QuantizedMethod` refuses the same (tests/test_engine_layout.py)."""
    own: dict[str, Any] = {"engine": "vllm", "plugin": True, "quantization": "slmperf"}
    three = fields_of_scheme(LinearScheme(WeightSpec("int", 3, True, 32)), 1024)
    line = refused(three, **own)
    assert "qkv_proj: codes of 3 bits, wanted 2, 4 or 8" in line
    assert "--quantization slmperf" not in line and "multiples of" not in line
    blocks = fields_of_scheme(SCHEMES["FP8 blocks"], 1024)
    assert reasons(blocks, **own) == []
    wide = blocks | {"hidden_size": 4160}
    assert reasons(wide, engine="vllm") == []
    assert "qkv_proj: 4160 inputs per rank, wanted whole groups of 128" in refused(wide, **own)
    odd = fields_of_scheme(SCHEMES["FP8 blocks"], 1088)
    assert "down_proj: 1088 inputs per rank, wanted whole" in reasons(odd, **own)[-2]
    assert "multiples of 128, to which" in refused(odd, **own)


def test_the_plugins_own_product_wants_smaller_multiples() -> None:
    facts = facts_of(fields_of_scheme(SCHEMES["W4A16, groups of 32"], 288))
    how: dict[str, Any] = {"engine": "sglang", "plugin": True, "ranks": 4, "device": "cuda"}
    assert neuron_multiple(facts, **how) == 256
    assert neuron_multiple(facts, **how, quantization="slmperf") == 128
    found = nearest(facts, **how, quantization="slmperf")
    assert "neurons in multiples of 128, to which `slmperf export --pad` fills them up" in found
    assert not any("--quantization" in one for one in found)
    # At 3 ranks the heads do not divide, whichever product it is.
    assert served_ranks(facts, engine="sglang", plugin=True, quantization="slmperf") == [1]
    assert served_ranks(facts, engine="sglang", plugin=True) == []


def test_heads_that_vllm_does_not_find_even() -> None:
    """Each layer divides by 6 ranks, but no number of heads that vLLM reads as the model's does."""
    own = {"num_attention_heads": 6, "num_key_value_heads": 2}
    fields = BASE | layers({"num_key_value_heads": 3}, own, own, own)
    fields |= {"num_attention_heads": 6, "intermediate_size": 96}
    line = refused(fields, ranks=6, plugin=True)
    assert "9 query heads, into which all layers fit, do not divide by 6 ranks" in line
    assert "wanted 1 rank" in line
    assert reasons(fields, engine="sglang", ranks=6, plugin=True, device="cpu") == []


def test_heads_that_share_scales_are_not_parted() -> None:
    uneven = [{"head_map": [2, 2, 1, 1], "num_attention_heads": 6}] * 4
    small = {"head_dim": 64, "num_key_value_heads": 4}
    fields = fields_of_scheme(SCHEMES["W4A16, groups of 128"], 1024) | layers(*uneven) | small
    line = refused(fields, ranks=2, plugin=True)
    assert "self_attn.o_proj: 128 channels share a scale, heads of 64 have to be moved" in line
    assert reasons(fields, engine="vllm", ranks=1, plugin=True) == []
    fields |= {"head_dim": 128}
    assert reasons(fields, engine="vllm", ranks=2, plugin=True) == []


@pytest.mark.parametrize(
    "changed,message",
    [
        ({"format_version": 9}, "format_version is 9, this slmperf reads 1"),
        ({"per_layer_config": {"7": {}}}, "per_layer_config has layers .7., wanted some of 0 to 3"),
        ({"num_attention_heads": 12}, "12 query heads over 8 key/value heads, wanted a head_map"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "quant_method 'awq', wanted 'compressed",
        ),
        ({"block_configs": [{"ffn": {}}]}, "block_configs.0. wants attention and ffn"),
        ({"model_type": "gpt2"}, "models of type 'gpt2' are not known, only llama"),
    ],
)
def test_a_wrong_configuration_is_one_line(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        reasons(BASE | changed, engine="vllm")
    assert "\n" not in str(caught.value)
    for wrong in ({"engine": "tgi"}, {"engine": "vllm", "ranks": 0}):
        with pytest.raises(InputError, match="wanted"):
            reasons(BASE, **wrong)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([one for one in SCHEMES if one != "bf16"]),
    st.sampled_from(ENGINES),
    st.integers(1, 8),
    st.integers(1, 40),
)
def test_the_multiple_that_is_named_is_served(
    scheme: str, engine: str, ranks: int, times: int
) -> None:
    """Any number of neurons that is a multiple of it, where the heads divide by the ranks."""
    facts = facts_of(fields_of_scheme(SCHEMES[scheme], 1))
    multiple = neuron_multiple(facts, engine=engine, ranks=ranks, plugin=False, device="cuda")
    assert (multiple is None) == (8 % ranks != 0)
    if multiple is not None:
        grown = facts_of(fields_of_scheme(SCHEMES[scheme], times * multiple))
        assert reasons(grown, engine=engine, ranks=ranks) == []


def test_the_command_says_what_it_wrote(tmp_path: Path) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        done = CliRunner().invoke(cli.app, ["export", *map(str, arguments)])
        error = "" if done.exception is None else str(done.exception)
        return done.exit_code, f"{done.output}{error}"

    from test_shrink import made

    from slmperf.models import save, shrink

    source = tmp_path / "pruned"
    save(shrink(made("llama"), kv_groups=[[0, 2], [0, 1, 2, 3], [1]]), None, source)
    code, said = run(source, tmp_path / "a", "--engine", "sglang")
    assert code == 0 and "slmperf installed beside the engine" in said
    assert "KV cache: 576 bytes per token, 42% of them unused" in said
    code, said = run(source, tmp_path / "b", "--engine", "vllm", "--stock", "--tp", 2)
    assert code == 0 and "--trust-remote-code" in said and "query heads" in said
    code, said = run(source, tmp_path / "c", "--engine", "vllm", "--labels", "#5,#9")
    assert json.loads((tmp_path / "c" / "config.json").read_text())["label_token_ids"] == [5, 9]
    for arguments, message in (
        ([source, tmp_path / "a", "--engine", "vllm"], "wanted a new or empty folder"),
        ([source, tmp_path / "d", "--engine", "vllm", "--tp", 3], "do not divide by 3 ranks"),
        ([source, tmp_path / "d", "--engine", "vllm", "--labels", "yes"], "wanted #ID"),
        ([source, tmp_path / "d", "--engine", "vllm", "--device", "tpu"], "wanted cuda or cpu"),
        ([source, tmp_path / "d", "--engine", "vllm", "--quantization", "x"], "wanted slmperf"),
        ([tmp_path / "no", tmp_path / "d", "--engine", "vllm"], "wanted a checkpoint folder"),
        ([tmp_path / "b", tmp_path / "d", "--engine", "vllm"], "found a DeciLM"),
    ):
        code, said = run(*arguments)
        assert code != 0 and message in said, said
    assert not (tmp_path / "d").exists()
