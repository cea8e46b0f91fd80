"""Shapes: exact parameter counts, every way to name one, ranks."""

import json
import re

import pytest

from slmperf.check import InputError, parse_tokens
from slmperf.models.shapes import SHAPES, Shape, shape_of

PARAMETERS = {
    "8b": 8_030_261_248, "6.8b": 6_822_301_696, "6.4b": 6_419_648_512, "6.0b": 6_016_995_328,
    "3b": 3_212_749_824, "2.8b": 2_816_388_096, "2.4b": 2_420_026_368, "2.1b": 2_067_704_832,
    "1b": 1_235_814_400,
}  # fmt: skip


def test_parameter_counts_are_exact():
    assert {name: shape.parameters for name, shape in SHAPES.items()} == PARAMETERS


def test_a_shape_counts_what_transformers_builds():
    from transformers import LlamaConfig, LlamaForCausalLM

    for tied in (False, True):
        config = LlamaConfig(
            num_hidden_layers=2, hidden_size=48, intermediate_size=80, num_attention_heads=6,
            num_key_value_heads=2, head_dim=16, vocab_size=96, tie_word_embeddings=tied,
        )  # fmt: skip
        built = sum(one.numel() for one in LlamaForCausalLM(config).parameters())
        assert shape_of(config).parameters == built


def test_shapes_from_a_table_a_folder_and_a_name(paper, tmp_path):
    for name, sizes in paper["shapes"].items():
        assert shape_of(sizes, name) == SHAPES[name] == shape_of(name.upper())
        assert SHAPES[name].parameters == sizes["params"]
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"intermediate_size": 96, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    wanted = Shape(2, 64, 4, 4, 16, 96, 100, name=tmp_path.name)
    assert shape_of(tmp_path) == shape_of(str(tmp_path / "config.json")) == wanted


@pytest.mark.parametrize(
    "what,complaint",
    [
        ("9b", "9b is no known shape"),
        ({"hidden_size": 64}, "missing num_hidden_layers"),
        ({"base": "8b", "layers": 0}, "layers is 0, expected a whole number >= 1"),
        ({"base": "8b", "q_heads": 12}, "heads is 12, expected a multiple of kv_heads 8"),
        ({"base": "8b", "num_experts": 8}, "num_experts is 8, expected a dense model"),
        ({"base": "8b", "intermediate": [[1], [2]]}, "intermediate differs between layers"),
        ({"base": "8b", "hidden": "4096"}, "hidden is '4096', expected a whole number"),
        (3.5, "expected a name, folder or config, found 3.5"),
    ],
)
def test_what_is_no_shape_is_refused(what, complaint):
    with pytest.raises(InputError, match=re.escape(complaint)):
        shape_of(what)


def test_ranks_hold_whole_heads():
    rank = SHAPES["2.1b"].rank(4)
    assert (rank.heads, rank.kv_heads, rank.intermediate) == (3, 1, 1280)
    assert SHAPES["8b"].rank(16).kv_heads == 1  # repeated on two ranks each
    with pytest.raises(InputError, match="heads is 12, expected a multiple of tensor_parallel 8"):
        SHAPES["2.1b"].rank(8)


def test_numbers_of_tokens():
    assert [parse_tokens(text) for text in ("1", "4096", "4k", "16K")] == [1, 4096, 4096, 16384]
    for text in ("0", "-1", "4.5k", "k", "", "many", "\u0664"):
        with pytest.raises(InputError, match="expected a number of tokens such as 4096 or 4k"):
            parse_tokens(text)
