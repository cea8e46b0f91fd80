"""Which sections the benches of a GPU check have; gpu_sections.py runs them.

A plan is a function of the device: section name -> function of a part and its facts that gives
rows. A section's name begins those of its rows, so that a target that names a row finds it.

Over 400 lines: a plan for every bench, few lines each.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))

from gpu_check import last_changed  # noqa: E402

# What is timed. On a CPU the same code at sizes that two cores finish.
PRUNED = ("3b", "2.4b", "2.1b")
# (shapes that are measured in turns, context, tensor parallel, scheme; None: the device's own).
LAYERS = {
    "cuda": (
        (("2.4b", "2.1b"), 32768, 4, "fp8"),  # the paper's own case
        *((PRUNED, context, 1, scheme) for context in (4096, 16384, 32768)
          for scheme in ("fp8", "bf16")),
    ),
    "cpu": ((("2.4b", "2.1b"), 256, 1, None),),
}  # fmt: skip
# One layer in several schemes, of which the first is what the others are compared with: shape,
# context, sequences of which one token is decoded (0: a prefill).
LAYER_SCHEMES = "bf16,fp8,w8a8,w4a16"
LAYERS_IN_SCHEMES = {
    "cuda": (("2.1b", 8192, (0, 1, 16)),),
    "cpu": (((2, 128, 4, 2, 32, 128, 96), 64, (0, 2)),),
}
# (shape, layers, context, candidates): latencies of the engine with random weights.
ENGINES = {
    "cuda": (("3b", 28, 4096, 16), ("2.1b", 28, 4096, 16), ("2.1b", 28, 16384, 16)),
    "cpu": (("2.1b", 2, 256, 4),),
}
# Hidden sizes of student and teacher, and vocabulary: those of Llama 3, and of the families that
# small models are distilled in; how many tokens; what ranking does, an answer token per prompt.
KD_HEADS = {
    "cuda": (
        (4096, 4096, 128256), (2048, 4096, 128256), (896, 3584, 152064), (1152, 3840, 262144),
    ),
    "cpu": ((16, 24, 512),),
}  # fmt: skip
KD_TOKENS = {"cuda": (1024, 2048, 4096, 8192), "cpu": (32, 64)}
KD_RANKING = {"cuda": (32 * 2048, 32), "cpu": (256, 4)}
# A training step: names of student and teacher, or their sizes; rows and context of the batch.
TRAIN_STEPS = {
    "cuda": (("1b", "8b", 4, 1024),),
    "cpu": (((2, 16, 2, 1, 8, 24, 96), (1, 24, 2, 2, 12, 32, 96), 2, 16),),
}
# Tokens of an update and inputs of a layer, down_proj of Llama-3.2-3B and of 3.1-8B.
GRAMS = {"cuda": ((16384, 8192), (16384, 14336)), "cpu": ((512, 96),)}
# Whole models: shape, neurons and query heads that stay, tokens, context, sequences of a batch; and
# one layer solved on both devices: inputs, outputs, inputs that stay.
PRUNINGS = {
    "cuda": (("3b", 5120, 12, 262144, 4096, 4), ("8b", 10240, 32, 262144, 4096, 4)),
    "cpu": (((2, 16, 4, 2, 4, 24, 96), 16, 2, 256, 64, 2),),
}
SOLVED = {"cuda": ((2048, 1024, 1280), (8192, 3072, 5120)), "cpu": ((64, 32, 40),)}
# Layers quantised to 4 bits: outputs and inputs, those of Llama-3.1-8B's down_proj among them, and
# one on both devices. Whole models: shape, scheme, tokens, context, sequences of a batch.
QUANTIZED = {"cuda": ((4096, 4096), (4096, 14336)), "cpu": ((48, 64),)}
QUANTIZED_TWICE = {"cuda": (1024, 2048), "cpu": (40, 64)}
QUANTIZINGS = {
    "cuda": (("8b", "w4a16", 512 * 2048, 2048, 8),),
    "cpu": (((2, 128, 4, 2, 32, 128, 96), "w4a16", 256, 64, 2),),
}
# Quantised linear layers: outputs and inputs, and rows; on a GPU those of slmperf.bench.linear.
LINEARS = {"cuda": None, "cpu": (((64, 128),), (1, 17))}
SANITIZED = ("tests/test_linear_cuda.py::test_on_a_gpu",)  # tests of CUDA C++ kernels
# Engines whose tests run; on a CPU `make test-engines` is that.
SERVED = {"cuda": ("sglang", "vllm"), "cpu": ()}
# One token in so many is an answer, and whether the student's layers are checkpointed.
TRAIN_KINDS = {"cuda": ((1, False), (1, True), (128, False)), "cpu": ((1, False), (4, True))}


class Failed(Exception):
    """A section that ran to its end and found something wrong; the text is what it found."""


def roof_section(part, facts):
    """The roof, in its own section, so that its time is known."""
    part.roof()


def ops_plan(device):
    """A section per case of every op, the op first whose sources changed last."""
    from slmperf.bench.ops import as_json, measure_case, variants
    from slmperf.testing.cases import FAMILIES

    def files(op):
        places = ("slmperf/ops", "triton_kernels", "csrc/cpu", "csrc/cuda", "csrc/cuda/kernels")
        found = [path for folder in places for path in (ROOT / folder).glob(f"{op}*")]
        return [str(path.relative_to(ROOT)) for path in found]

    plan = {}
    for op in sorted(FAMILIES, key=lambda op: -last_changed(files(op))):
        for case in FAMILIES[op].bench[device]:

            def work(part, facts, case=case):
                ways = variants(case, device)
                found = measure_case(case, device, part.roof(), part.seconds, ways)
                yield from as_json(found.rows)
                facts["refused"] = found.refused
                ours = [f"{case.op} {case} {name}" for name, way in ways.items()
                        if way.role == "ours"]  # fmt: skip
                if lines := [
                    f"{key}: {found.refused[key]}" for key in ours if key in found.refused
                ]:
                    raise Failed("\n".join(lines))

            plan[f"{case.op} {case}"] = work
    return plan


def layer_plan(device):
    """One Transformer block of pruned shapes, part by part, and what each saves on the one before.

    A section is named as its row of savings is.
    """
    from slmperf.bench.layer import measure_layers
    from slmperf.models.shapes import Shape, shape_of

    def title(shapes, context, ranks, scheme):
        return (
            f"{' -> '.join(map(str, shapes))}, {context} tokens, tp{ranks}, {scheme or 'default'}"
        )

    def work(part, facts, shapes, context, ranks, scheme):
        found = measure_layers(
            shapes, context, tensor_parallel=ranks, scheme=scheme, device=device,
            roof=part.roof(), seconds=part.seconds,
        )  # fmt: skip
        for layer in found:
            yield from layer.rows()
        for before, after in pairwise(found):
            yield {
                "name": title((before.shape, after.shape), context, ranks, scheme),
                "part": "saving",
                "time_us": after.layer_us,
                "low_us": after.block.low_us + after.allreduce.time_us,
                "high_us": after.block.high_us + after.allreduce.time_us,
                "samples": after.block.samples,
                "layer_change_pct": 100 * (after.layer_us / before.layer_us - 1),
                "attention_block_change_pct": 100
                * (after.attention_block_us / before.attention_block_us - 1),
            }

    def in_schemes(part, facts, shape, context, decodes):
        for decode in decodes:
            for layer in measure_layers(
                [shape], context, decode=decode, scheme=LAYER_SCHEMES, device=device,
                roof=part.roof(), seconds=part.seconds,
            ):  # fmt: skip
                yield from layer.rows()

    plan = {
        title(*one): lambda part, facts, one=one: work(part, facts, *one) for one in LAYERS[device]
    }
    for shape, context, decodes in LAYERS_IN_SCHEMES[device]:
        one = shape_of(shape) if isinstance(shape, str) else Shape(*shape), context, decodes
        plan[f"{one[0]}-{context}-tp1"] = lambda part, facts, one=one: in_schemes(part, facts, *one)
    return plan


def timed(name, samples_ms, least_us):
    """A row of wall times, beside what the roof allows."""
    low, median, high = (float(x) for x in np.quantile(samples_ms, (0.25, 0.5, 0.75)) * 1e3)
    return {"name": name, "time_us": median, "low_us": low, "high_us": high,
            "samples": len(samples_ms), "roof_share": least_us / median}  # fmt: skip


def engine_plan(device):
    """Prefill and ranking latencies of the engine, random weights."""

    def work(part, facts, name, layers, context, candidates):
        from slmperf.bench.random_model import random_model
        from slmperf.bench.serving.engine import ideal_us, prefill_work
        from slmperf.engine import Engine, prefill_latency, rank_latency
        from slmperf.models.shapes import shape_of
        from slmperf.plan.work import Work

        shape = replace(shape_of(name), layers=layers)
        scheme = "bf16" if device == "cuda" else "fp32"
        engine = Engine(random_model(shape, 32768, device), (0, 1))
        common = {"shape": str(shape), "layers": layers, "context": context}
        head = f"engine {shape} {layers} layers, {context} tokens"
        prefills = [prefill_latency(engine, context, repeats=1, warmup=warmup).median_ms
                    for warmup in (2, *[0] * 8)]  # fmt: skip
        least = ideal_us(prefill_work(shape, scheme, context), scheme, part.roof())
        yield common | timed(f"{head}, prefill", prefills, least)
        ranks = [rank_latency(engine, context, candidates=candidates, repeats=1, warmup=warmup)
                 for warmup in (1, *[0] * 4)]  # fmt: skip
        prefix, each = ranks[0].prefix, ranks[0].candidate_tokens
        works = {
            "uncached": dict(new=candidates * context, pairs=candidates * context**2 / 2, cached=0),
            "cached": dict(new=candidates * each, cached=prefix,
                           pairs=candidates * (each * prefix + each**2 / 2)),
        }  # fmt: skip
        for way, work in works.items():
            found = [getattr(one, f"{way}_ms") for one in ranks]
            least = ideal_us(Work.of(shape, 1, scheme, **work), scheme, part.roof())
            yield common | timed(f"{head}, rank {candidates} {way}", found, least)

    return {
        f"engine {name} {layers} layers, {context} tokens": lambda part, facts, one=one: work(
            part, facts, *one
        )
        for one in ENGINES[device]
        for name, layers, context, _ in [one]
    }


def kd_plan(device):
    """Distillation losses: a section per pair of heads, and the quickstart's step."""
    from slmperf.bench.kd.measure import measure, measure_step
    from slmperf.bench.kd.problems import Problem, Step
    from slmperf.bench.kd.studies import LOGITS
    from slmperf.bench.kd.ways import OURS

    modes = LOGITS[device]

    def work(part, facts, heads):
        student, teacher, vocabulary = heads
        facts["refused"], rows = {}, []
        sizes = [(tokens, None) for tokens in KD_TOKENS[device]] + [KD_RANKING[device]]
        for tokens, answers in sizes:
            problem = Problem(tokens, vocabulary, student, teacher, "bf16", device, answers=answers)
            found = measure({problem: modes}, part.seconds / 2)
            facts["refused"] |= found.refused
            rows += found.rows
            yield from found.rows
        if lines := [f"{row}: {why}" for row, why in facts["refused"].items()
                     if row.endswith(tuple(map(OURS.format, modes)))]:  # fmt: skip
            raise Failed("\n".join(lines))
        yield worst_of(
            [row for row in rows if row["answers"] is None], f"{problem.heads}, worst of all tokens"
        )

    def step(part, facts):
        yield from measure_step(Step(device=device), part.seconds)

    plan = {}
    for heads in KD_HEADS[device]:
        name = Problem(1, heads[2], heads[0], heads[1], "bf16", device).heads
        plan[name] = lambda part, facts, heads=heads: work(part, facts, heads)
    return plan | {str(Step(device=device)): step}


def train_plan(device):
    """One optimizer step of distillation: a section per problem; the trainer at a toy's size."""
    from slmperf.bench.train.problems import OURS, TOY, TRAINER, Problem
    from slmperf.models.shapes import Shape, shape_of

    def work(part, facts, problem, chosen):
        from slmperf.bench.train.measure import OF_OURS, measure

        found = measure(problem, part.seconds, chosen)
        facts["refused"] = found.refused
        yield from found.rows
        if lines := [f"{row}: {why}" for row, why in found.refused.items()
                     if row.rpartition(": ")[2] in OF_OURS]:  # fmt: skip
            raise Failed("\n".join(lines))

    problems = {}
    for *models, rows, context in TRAIN_STEPS[device]:
        shapes = [shape_of(one) if isinstance(one, str) else Shape(*one) for one in models]
        for every, checkpointing in TRAIN_KINDS[device]:
            sizes = (*shapes, rows, context, "bf16", device, every, checkpointing)
            problems[Problem(*sizes)] = None
    problems[replace(TOY, device=device)] = (OURS, TRAINER)
    return {
        str(problem): lambda part, facts, one=(problem, chosen): work(part, facts, *one)
        for problem, chosen in problems.items()
    }


def gram_plan(device):
    """The update of a Gram matrix: a section per size and dtype."""
    from slmperf.bench.gram.measure import DTYPES, measure, title

    return {
        title(*one): lambda part, facts, one=one: iter(measure(*one, device, part.seconds))
        for size in GRAMS[device]
        for dtype in DTYPES
        for one in [(*size, dtype)]
    }


def prune_plan(device):
    """Whole models pruned, a section per model and mode; a layer, on the CPU and on the device."""
    from slmperf.bench.prune_model import Pruning, measure, same_on_both
    from slmperf.models.shapes import Shape, shape_of

    def solved(part, facts, sizes):
        row = same_on_both(*sizes, device)
        yield row
        if row["error_apart"] > 1e-6:
            raise Failed(f"{row['name']}: errors are {row['error_apart']:.2g} apart")

    plan = {}
    for shape, *rest in PRUNINGS[device]:
        what = Pruning(shape_of(shape) if isinstance(shape, str) else Shape(*shape), *rest)
        for mode in ("sequential", "one_pass"):
            plan[f"{what}, {mode}"] = lambda part, facts, one=(what, mode): iter(
                measure(*one, device)
            )
    for sizes in SOLVED[device]:
        plan["prune osscar {}x{} to {}".format(*sizes)] = lambda part, facts, sizes=sizes: solved(
            part, facts, sizes
        )
    return plan


def quantize_plan(device):
    """Layers quantised to 4 bits: costs, the methods' errors, and one on the CPU and the device."""
    from slmperf.bench.quantize import layer
    from slmperf.testing.spectra import SPECTRA

    def twice(part, facts, size):
        row = layer.same_on_both(size, device)
        yield row
        if row["error_apart"] > 1e-3:
            raise Failed(f"{row['name']}: errors are {row['error_apart']:.2g} apart")

    plan = {}
    for size in (layer.Size(*one) for one in QUANTIZED[device]):
        plan[str(size)] = lambda part, facts, size=size: layer.measure(size, device, part.seconds)
    size = layer.Size(*QUANTIZED_TWICE[device])
    plan[f"{size} on both devices"] = lambda part, facts: twice(part, facts, size)
    for kind in SPECTRA:
        plan[f"{size} {kind}"] = lambda part, facts, kind=kind: layer.errors(kind, size, device)
    return plan


def quantize_model_plan(device):
    """Whole models quantised, a section each."""
    from slmperf.bench.quantize.model import Quantizing, measure
    from slmperf.models.shapes import Shape, shape_of

    plan = {}
    for shape, *rest in QUANTIZINGS[device]:
        what = Quantizing(shape_of(shape) if isinstance(shape, str) else Shape(*shape), *rest)
        plan[str(what)] = lambda part, facts, what=what: measure(what, device)
    return plan


def linear_plan(device):
    """Quantised linear layers beside torch's and others' ways, a section per scheme and size."""
    from slmperf.bench.linear.measure import BENCHED, OURS, ROWS, SHAPES, measure, title

    shapes, rows = LINEARS[device] or (SHAPES[device], ROWS[device])

    def work(part, facts, scheme, shape):
        refused = facts["refused"] = {}
        yield from measure(scheme, shape, rows, device, part.roof(), part.seconds / 2, refused)
        if lines := [f"{row}: {why}" for row, why in refused.items() if row.endswith(OURS)]:
            raise Failed("\n".join(lines))

    return {
        title(*one): lambda part, facts, one=one: work(part, facts, *one)
        for scheme in BENCHED
        for shape in shapes
        for one in [(scheme, shape)]
    }


def served_plan(device):
    """tests/engines on real engines, a section each."""

    def work(part, facts, engine):
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.xml")
            command = [sys.executable, "-m", "pytest", "-q", f"tests/engines/test_{engine}.py",
                       f"--junitxml={report}"]  # fmt: skip
            environment = {**os.environ, "ENGINE_DEVICE": device}
            left = max(1, part.deadline - time.time())
            try:
                done = subprocess.run(command, cwd=ROOT, env=environment, timeout=left, text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
            except subprocess.TimeoutExpired as late:
                raise Failed(f"{engine}: not finished within {left:.0f} s") from late
            if not report.exists():
                raise Failed(done.stdout)
            yield from counted(engine, report.read_text())
        if done.returncode:
            raise Failed(done.stdout)

    return {
        f"served {engine}": lambda part, facts, engine=engine: work(part, facts, engine)
        for engine in SERVED[device]
    }


def counted(engine, report):
    """A row for each test function of a JUnit report: its cases that passed, and that did not
    (failed or skipped), and how long they took."""
    cases = {}
    for case in xml.fromstring(report).iter("testcase"):
        cases.setdefault(case.get("name").partition("[")[0], []).append(case)
    for function, of_function in cases.items():
        passed = sum(len(case) == 0 or case[0].tag.startswith("system") for case in of_function)
        took_us = 1e6 * sum(float(case.get("time", 0)) for case in of_function)
        yield {
            "name": f"served {engine} {function}",
            "passed": passed,
            "not_passed": len(of_function) - passed,
            **dict.fromkeys(("time_us", "low_us", "high_us"), took_us),
            "samples": len(of_function),
        }


def sanitize_plan(device):
    """CUDA C++ kernels under compute-sanitizer's tools, a section each."""

    def work(part, facts, tool):
        homes = filter(None, (os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")))
        places = [os.environ.get("PATH", ""), *(os.path.join(home, "bin") for home in homes)]
        sanitizer = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
        if sanitizer is None:
            raise Failed("compute-sanitizer is neither on PATH nor in CUDA_HOME")
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", sys.executable, "-m",
                   "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *SANITIZED]  # fmt: skip
        start, left = time.time(), max(1, part.deadline - time.time())
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=left, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        except subprocess.TimeoutExpired as late:
            raise Failed(f"{tool}: not finished within {left:.0f} s") from late
        took_us = 1e6 * (time.time() - start)
        summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", done.stdout)
        facts["summary"] = summary
        if done.returncode or not summary or " passed" not in done.stdout:
            raise Failed(done.stdout)
        times = dict.fromkeys(("time_us", "low_us", "high_us"), took_us)
        yield {"name": f"sanitize {tool}", "errors": 0, "samples": 1, **times}

    tools = ("memcheck", "racecheck", "synccheck") if device == "cuda" else ()
    return {
        f"sanitize {tool}": lambda part, facts, tool=tool: work(part, facts, tool) for tool in tools
    }


def worst_of(rows, name):
    """The figures that hold at every number of tokens, as one row; its time is that of the last of
    ours at the most tokens. A figure that one of the rows lacks is left out.
    """
    ours = [row for row in rows if row["role"] == "ours"]
    default = ours[-1]  # the mode that a caller gets who asks for none
    found = {key: default[key] for key in ("time_us", "low_us", "high_us", "samples")}

    def settle(key, kind, of, as_key=None):
        values = [row.get(key) for row in of]
        if None not in values:
            found[as_key or key] = kind(values)

    for way in dict.fromkeys(row["way"] for row in ours):
        mode = way.split()[1]
        settle("times_products", max, [row for row in ours if row["way"] == way],
               f"times_products_{mode}")  # fmt: skip
    of_default = [row for row in ours if row["way"] == default["way"]]
    for key in ("speedup_over_eager", "speedup_over_liger", "speedup_over_liger_chunked"):
        settle(key, min, of_default)
    settle("above_gradients_gib", max, ours)
    return {"name": name, **found}


BENCHES = {
    "ops": ops_plan,
    "kd": kd_plan,
    "train": train_plan,
    "linear": linear_plan,
    "layer": layer_plan,
    "engine": engine_plan,
    "gram": gram_plan,
    "prune": prune_plan,
    "quantize": quantize_plan,
    "quantize-model": quantize_model_plan,
    "served": served_plan,
    "sanitize": sanitize_plan,
}
