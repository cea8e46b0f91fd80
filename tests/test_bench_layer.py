"""slmperf bench layer: work and times of the parts, tables, plot and mistakes."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from slmperf.bench.layer import options as layer_options
from slmperf.bench.layer import report as layer_report
from slmperf.bench.layer.block import SCHEMES
from slmperf.bench.layer.measure import (
    LayerTime,
    PartTime,
    allreduce,
    measure_layer,
    measure_layers,
)
from slmperf.bench.layer.options import (
    check_layers,
    choose_scheme,
    parse_contexts,
    parse_shapes,
)
from slmperf.bench.results import read_results
from slmperf.bench.roof import Roof
from slmperf.check import InputError
from slmperf.models.shapes import SHAPES, Shape
from slmperf.testing.timing import timings

# Half the channels in heads, as where heads were pruned; widths that every scheme takes.
SMALL = Shape(1, 384, 6, 2, 32, 320, 100, name="small")
TOKENS = 48


@pytest.mark.parametrize("scheme", ["bf16", "fp8", "w8a8"])
def test_work_has_closed_forms(scheme):
    """Bytes and flops of every part, from the sizes alone."""
    found = measure_layer(SMALL, TOKENS, scheme=scheme, device="cpu", seconds=0)
    t, d, f = TOKENS, SMALL.hidden, SMALL.intermediate
    hc, gc = SMALL.heads * SMALL.head_size, SMALL.kv_heads * SMALL.head_size
    wide, narrow = 2, 2 if scheme == "bf16" else 1  # bytes of activations, of what products take
    scales = 0 if scheme == "bf16" else 4
    flops = {
        "qkv": 2 * t * d * (hc + 2 * gc),
        "attention": 2 * t * (t + 1) * hc,
        "o": 2 * t * hc * d,
        "gate/up": 4 * t * d * f,
        "down": 2 * t * f * d,
    }

    def product(n, k):
        return (t * k + n * k) * narrow + t * n * wide + (t + n) * scales

    moved = {
        "norms": 2 * ((3 * t * d + d) * wide + t * d * narrow + t * scales),
        "qkv": product(hc + 2 * gc, d),
        "rope": (2 * t * (hc + gc) + t * SMALL.head_size) * wide,
        "attention": (2 * t * hc + 2 * t * gc) * wide,
        "o": product(d, hc),
        "gate/up": product(2 * f, d),
        "act": 2 * t * f * wide + t * f * narrow + t * scales,
        "down": product(d, f),
    }
    if scales:
        moved["quantise"] = hc * t * (wide + narrow) + t * scales
    assert {part.part: part.bytes for part in found.parts} == moved
    assert {part.part: part.flops for part in found.parts if part.flops} == flops
    assert found.block.bytes == sum(moved.values())
    assert found.block.flops == 2 * t * SMALL.layer_matrix_parameters + flops["attention"]


ROOF = Roof(
    device="x",
    kind="cpu",
    driver="",
    torch="",
    threads=1,
    copy_gbs=1e3,
    matrix_tflops={"fp32": 1.0, "bf16": 2.0, "fp8": None, "int8": 4.0},
    launch_us=1.0,
    date="",
)


def test_times_rows_and_shares():
    small = replace(SMALL, intermediate=160, name="smaller")
    layers = measure_layers(
        [SMALL, small],
        TOKENS,
        tensor_parallel=2,
        scheme="w8a8",
        dtype="bf16",
        device="cpu",
        roof=ROOF,
        allreduce_gbs=100,
        seconds=0,
    )
    names = [row["name"] for layer in layers for row in layer.rows()]
    assert len(set(names)) == len(names) == 2 * 11
    assert f"smaller-{TOKENS}-tp2-w8a8-gate/up" in names
    for layer in layers:
        for part in (*layer.parts, layer.block):
            assert 0 < part.low_us <= part.time_us <= part.high_us and part.samples >= 5
        by_name = {part.part: part for part in layer.parts}
        attention, act, down = by_name["attention"], by_name["act"], by_name["down"]
        # Attention against the bf16 rate, products against that of int8, the rest against copies.
        for part, ideal_us in (
            (attention, max(attention.bytes / 1e6, attention.flops / 2e6)),
            (down, max(down.bytes / 1e6, down.flops / 4e6)),
            (act, act.bytes / 1e6),
        ):
            assert part.roof_share == pytest.approx(ideal_us / part.time_us)
        assert layer.sum_us == pytest.approx(layer.block.time_us - layer.residue_us)
        row = layer.rows()[-1]
        assert row["part"] == "all-reduce" and row["samples"] == 0
        # Two of them, each 2 (n - 1) / n times T D bf16 numbers.
        assert row["bytes"] == 2 * TOKENS * SMALL.hidden * 2
        assert row["time_us"] == pytest.approx(row["bytes"] / 100e3)
    wide, narrow = ({part.part: part.bytes for part in layer.parts} for layer in layers)
    scales = 4 * TOKENS
    assert (narrow["act"] - scales) * 2 == wide["act"] - scales
    assert narrow["qkv"] == wide["qkv"]


def test_allreduce_of_the_shipped_model():
    from slmperf.plan import LatencyModel

    model = LatencyModel.preset("h100-paper")
    ours = allreduce(SHAPES["3b"], 16384, 4).time_us / 1e3
    theirs = model.breakdown("3b", context=16384, tensor_parallel=4, scheme="fp8").allreduce
    assert ours * SHAPES["3b"].layers == pytest.approx(theirs)
    assert allreduce(SHAPES["3b"], 16384, 1).time_us == 0


def made_up(name, context, ms):
    """A layer whose parts take the given milliseconds."""
    parts = [PartTime(part, 1e3 * t, 1e3 * t, 1e3 * t, 9, 10**6, 10**9) for part, t in ms.items()]
    total = 1e3 * sum(ms.values()) + 500
    block = PartTime("block", total, 0.9 * total, 1.05 * total, 9, 10**7, 10**10, 0.5)
    exchange = PartTime("all-reduce", 2000, 2000, 2000, 0, 10**6, 0)
    shape = replace(SMALL, name=name)
    return LayerTime(shape, context, 4, "fp8", "bf16", "cuda", tuple(parts), block, exchange)


BEFORE = {"norms": 1, "qkv": 2, "rope": 1, "attention": 6, "o": 1, "gate/up": 4, "down": 2}
AFTER = BEFORE | {"qkv": 1, "attention": 3, "rope": 0.5, "quantise": 0.25}


def test_tables_compare_with_the_first_shape():
    layers = [made_up("2.4b", 32768, BEFORE), made_up("2.1b", 32768, AFTER)]
    rows = {row[0]: row[1:] for row in layer_report.time_rows(layers)}
    assert rows["attention"] == ("6", "3", "-50.0%")
    assert rows["quantise"] == ("0", "0.25", "-")
    assert rows["all-reduce (simulated)"] == ("2", "2", "+0.0%")
    # qkv, rope, attention, o and one of two all-reduces: 11 against 6.5.
    assert rows["attention block"] == ("11", "6.5", "-40.9%")
    assert rows["sum of parts"][:2] == ("17", "12.8")
    assert rows["block, one call"][:2] == ("17.5", "13.2")
    assert rows["residue"] == ("0.5", "0.5", "")
    assert rows["layer"] == ("19.5", "15.2", "-21.8%")
    assert "act" not in rows
    work = {row[0]: row[1:] for row in layer_report.work_rows(layers)}
    assert work["quantise"][:3] == ("-", "-", "-") and work["block"][-1] == "50%"
    line, simulated = layer_report.lines(layers)
    assert simulated == "all-reduce: simulated, two a layer, a ring of 4 ranks at 0.5 GB/s"
    assert line == "2.4b -> 2.1b, 32768 tokens: attention block -40.9%, layer -21.8%"
    loud = layers[0]._replace(block=layers[0].block._replace(high_us=30e3))
    assert "noisy" in layer_report.lines([loud])[-1]


def test_plot(tmp_path):
    from slmperf.bench.layer.plot import COLOURS, plot_layers

    assert set(COLOURS) == set(layer_report.ORDER)
    layers = [
        made_up(name, context, times)
        for context in (4096, 32768)
        for name, times in (("2.4b", BEFORE), ("2.1b", AFTER))
    ]
    plot_layers(layers, tmp_path / "plots" / "layer.svg")
    plot_layers(layers, tmp_path / "layer.png")
    text = (tmp_path / "plots" / "layer.svg").read_text()
    for part in ("32768 tokens", "2.1b", "-21.8%", "attention", "all-reduce (simulated)"):
        assert f"<!-- {part} -->" in text, part
    assert (tmp_path / "layer.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InputError, match="expected a name that ends in .png"):
        plot_layers(layers, tmp_path / "layer.txt")


def test_contexts_and_shapes_are_parsed(tmp_path):
    assert parse_contexts("256, 4k,16K,4096") == (256, 4096, 16384)
    for text in ("0", "-5", "abc", "4kk", "", "1.5k", "4k,,8k", "0k"):
        with pytest.raises(InputError, match="^context is .*, expected a number of tokens such as"):
            parse_contexts(text)
    assert [str(shape) for shape in parse_shapes("3b, 2.1B")] == ["3b", "2.1b"]
    for folder in ("a/student", "b/student"):
        write_config(tmp_path / folder)
    first, second = parse_shapes(f"{tmp_path}/a/student,{tmp_path}/b/student")
    assert (first.name, second.name) == ("student", f"{tmp_path}/b/student")
    with pytest.raises(InputError, match="named twice"):
        parse_shapes("3b,3b")
    with pytest.raises(InputError, match="no known shape"):
        parse_shapes("3b,9b")


def write_config(folder, **changes):
    folder.mkdir(parents=True)
    config = {
        "num_hidden_layers": 2,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 192,
        "vocab_size": 64,
    }
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_schemes_and_dtypes(monkeypatch):
    monkeypatch.setattr("slmperf.arch.cpu_isas", lambda: ("avx512_bf16", "avx512", "scalar"))
    assert choose_scheme(None, None, "cpu") == ("bf16", "bf16")
    assert choose_scheme(None, "fp32", "cpu") == ("fp32", "fp32")
    monkeypatch.setattr("slmperf.arch.cpu_isas", lambda: ("avx2", "scalar"))
    assert choose_scheme(None, None, "cpu") == ("fp32", "fp32")
    assert choose_scheme("w8a8", None, "cpu") == ("w8a8", "fp32")
    assert choose_scheme("fp8", None, "cpu") == ("fp8", "bf16")
    assert choose_scheme(None, None, "cuda") == ("bf16", "bf16")
    for arguments, message in (
        (("int3", None), "scheme is 'int3', expected one of bf16, fp32, fp8, w8a8, w4a16"),
        ((None, "fp16"), "dtype is 'fp16', expected one of bf16, fp32"),
        (("fp8", "fp32"), "scheme fp8: dtype is fp32, expected bf16"),
        (("bf16", "fp32"), "scheme bf16: dtype is fp32, expected bf16"),
    ):
        with pytest.raises(InputError, match=message):
            choose_scheme(*arguments, "cpu")
    assert set(layer_options.CPU_CONTEXTS) == set(SCHEMES)


def test_what_cannot_be_measured_is_refused(monkeypatch):
    def check(shape=SMALL, context=64, ranks=1, scheme="bf16", dtype="bf16", device="cpu"):
        return check_layers([shape], context, ranks, [(scheme, dtype)], device)

    assert check(ranks=2)[0].intermediate == 160
    with pytest.raises(InputError, match="heads is 6, expected a multiple of tensor_parallel 4"):
        check(ranks=4)
    with pytest.raises(InputError, match="tensor_parallel is 0"):
        check(ranks=0)
    with pytest.raises(InputError, match="context is 0"):
        measure_layer(SMALL, 0)
    with pytest.raises(InputError, match=r"need about \d+\.\d GiB, expected at most 85% of the"):
        check(SHAPES["8b"], context=2**24)
    with pytest.raises(InputError, match="bandwidth is 0 GB/s"):
        allreduce(SMALL, 16, 2, 0)
    refusals = {"w4a16": "no such operator"}
    monkeypatch.setattr(layer_options, "_refusal", lambda scheme, _: refusals.get(scheme, ""))
    with pytest.raises(InputError, match="no such operator; there is: bf16, fp32, fp8, w8a8$"):
        check(scheme="w4a16")


def test_what_torch_holds_for_itself_is_free(monkeypatch):
    """Memory that its allocator keeps for later calls."""
    for name, value in (
        ("mem_get_info", (10, 80)),
        ("memory_reserved", 7),
        ("memory_allocated", 4),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert layer_options.free_bytes("cuda") == 10 + 7 - 4


@pytest.fixture
def hasty(monkeypatch):
    """No roof measured, five rounds: what a command prints does not hang on them."""
    monkeypatch.setattr("slmperf.bench.roof.roof", lambda device: ROOF)
    monkeypatch.setattr(
        "slmperf.bench.layer.measure.timings",
        lambda variants, device, _: timings(variants, device, 0),
    )


def test_the_command(slmperf, tmp_path, hasty):
    write_config(tmp_path / "wide")
    write_config(tmp_path / "narrow", num_attention_heads=2, num_key_value_heads=1)
    folders = f"{tmp_path / 'wide'},{tmp_path / 'narrow'}"
    out, plot = tmp_path / "layer.json", tmp_path / "layer.png"
    code, text, _ = slmperf(
        *("bench", "layer", "--shape", folders, "--context", "32,64", "--scheme", "w8a8"),
        *("--decode", "2", "--device", "cpu", "--out", out, "--plot", plot),
    )
    assert code == 0
    for wanted in (
        "64 tokens, tp 1, w8a8",
        "decode of 2 at 64 tokens, tp 1, w8a8",
        "to wide",
        "attention block",
        "quantise",
        "residue",
    ):
        assert wanted in text, wanted
    assert "wide -> narrow, 64 tokens: attention block" in text and "…" not in text
    assert plot.read_bytes()[:4] == b"\x89PNG"
    result = read_results(out)
    assert result["kind"] == "layer" and result["roof"]["copy_gbs"] > 0
    assert len(result["rows"]) == 2 * 2 * 2 * 11
    row = next(row for row in result["rows"] if row["name"] == "narrow-64-tp1-w8a8-attention")
    assert row["shape"] == "narrow" and row["context"] == 64 and row["tensor_parallel"] == 1
    assert row["scheme"] == "w8a8" and row["part"] == "attention" and row["roof_share"] > 0


def test_the_commands_defaults(slmperf, tmp_path, hasty, monkeypatch):
    """Nothing asked for: the device's contexts, and a line that says so."""
    tiny = {scheme: (16, 32) for scheme in SCHEMES}
    monkeypatch.setattr("slmperf.bench.layer.options.CPU_CONTEXTS", tiny)
    write_config(tmp_path / "model")
    code, text, _ = slmperf("bench", "layer", "--shape", tmp_path / "model", "--device", "cpu")
    assert code == 0
    assert text.startswith("contexts are 16 and 32 tokens: smaller on a CPU than on a GPU")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--context", "0"], "context is '0', expected a number of tokens"),
        (["--context", "-1"], "context is '-1', expected a number of tokens"),
        (["--context", "abc"], "context is 'abc', expected a number of tokens"),
        (["--context", ""], "context is '', expected a number of tokens"),
        (["--shape", "9b"], "9b is no known shape (8b, 6.8b"),
        (["--shape", "3b", "--tp", "3"], "kv_heads is 8, expected a multiple of tensor_parallel 3"),
        (["--scheme", "int2"], "scheme is 'int2', expected one of bf16"),
        (["--scheme", "bf16,bf16"], "scheme is 'bf16,bf16', expected each once"),
        (["--decode", "0"], "decode is '0', expected numbers of sequences such as 1,16"),
        (["--device", "tpu"], "device is 'tpu', expected auto, cpu or cuda"),
        (["--plot", "layer.doc"], "expected a name that ends in .png"),
        (["--context", "100000k"], "GiB free on"),
        (["--tp", "2", "--allreduce-gbs", "0"], "bandwidth is 0.0 GB/s"),
    ],
)
def test_mistakes_are_one_line(slmperf, arguments, message):
    code, _, error = slmperf("bench", "layer", *arguments)
    assert code == 2
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there(slmperf):
    code, _, error = slmperf("bench", "layer", "--device", "cuda")
    assert code == 2 and "torch sees no CUDA device" in error and error.count("\n") == 1


def test_measuring_needs_no_packages_of_the_command_line():
    """A GPU image has torch and little else."""
    script = (
        "import sys\n"
        "for name in ('typer', 'rich', 'pydantic', 'matplotlib', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "from slmperf.bench.layer import measure_layer\n"
        "from slmperf.bench.layer.report import lines, time_rows\n"
        "from slmperf.models.shapes import Shape\n"
        "shape = Shape(1, 128, 4, 2, 32, 192, 64)\n"
        "found = measure_layer(shape, 32, tensor_parallel=2, device='cpu', seconds=0)\n"
        "print(len(time_rows([found])), found.allreduce.time_us > 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["15", "True"], done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["bf16", "fp8", "w8a8", "w4a16"])
def test_on_a_gpu(scheme):
    """Parts and block can be timed in graphs, on one rank's share of a pruned shape."""
    refusal = layer_options._refusal(scheme, "cuda")
    if refusal:
        pytest.skip(f"{scheme}: {refusal}")
    layer = measure_layer("2.1b", 2048, tensor_parallel=4, scheme=scheme, device="cuda")
    assert all(part.time_us > 0 for part in (*layer.parts, layer.block))
    assert layer.sum_us < 3 * layer.block.time_us
