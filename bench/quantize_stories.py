"""Quantisation on real weights: schemes and methods side by side on the two small Llamas of the
data folder.

    python bench/quantize_stories.py --data DATA --out runs/quantize [--results FILE]

Perplexity of 150 stories in fp32, FP8 and W8A8 with and without smoothing, and in W4A16 by each
method; calibrated on all other stories, packed into pieces of the context. 3M has groups of 64
inputs in W4A16, since 128 does not divide its layers, 260K one scale per output channel. What is
run is `quantize_model` on the texts that `slmperf quantize` would read; checkpoints and JSONL of
token ids (the tokenizers are llama2.c's) are written into OUT first. Printed are lines for
bench/RESULTS.md; errors are means over the layers, beside those of rounding to the nearest.
"""

import argparse
import copy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))

PIECES = 10**6  # of the context: all of the text
# name -> arguments of quantize_model; "group_size" is the model's own.
WAYS = {
    "fp8": {"scheme": "fp8"},
    "fp8, rtn": {"scheme": "fp8", "method": "rtn"},
    "fp8-static": {"scheme": "fp8-static"},
    "w8a8": {"scheme": "w8a8"},
    "w8a8, not smoothed": {"scheme": "w8a8", "smooth": False},
    "w4a16, rtn": {"scheme": "w4a16", "method": "rtn"},
    "w4a16, gptq": {"scheme": "w4a16", "method": "gptq"},
    "w4a16, quantease": {"scheme": "w4a16", "method": "quantease"},
    "w4a16": {"scheme": "w4a16"},
}
GROUPS = {"stories260k": -1, "stories3m": 64}


def measured(name, folder, ways):
    """Rows of one model, whose checkpoint and stories are in `folder`: fp32 first."""
    from slmperf import models
    from slmperf.bench.random_model import single
    from slmperf.calibrate.texts import Vocabulary, read_calibration
    from slmperf.engine.quality import read_measure
    from slmperf.quant import quantize_model

    base = models.load(folder / "model")
    vocabulary = Vocabulary(None, base.config.vocab_size, base.config.max_position_embeddings)
    stories = folder / "stories.jsonl"
    text = read_calibration(stories, "in-domain", vocabulary, samples=PIECES, packed=True)
    measure = read_measure(stories, vocabulary)
    before = measure.of(base)
    yield single(f"{name} fp32", 0.0) | {"perplexity": before, "of_fp32": 1.0}
    for way in ways:
        arguments = dict(WAYS[way])
        if arguments["scheme"] == "w4a16":
            arguments["group_size"] = GROUPS[name]
        model = copy.deepcopy(base)
        report = quantize_model(model, calibration=text.batches, source=text.source, **arguments)
        found = measure.of(model)
        errors = [layer.relative_error for layer in report.layers]
        nearest = [layer.relative_error_rtn for layer in report.layers]
        yield single(f"{name} {way}", report.seconds) | {
            "perplexity": found,
            "of_fp32": found / before,
            "error": sum(errors) / len(errors),
            "error_rtn": sum(nearest) / len(nearest),
            "bytes_before": report.bytes_before,
            "bytes_after": report.bytes_after,
            "tokens": report.tokens,
        }


def table_rows(rows):
    """The rows as lines of bench/RESULTS.md, without their dates."""
    for row in rows:
        name = row["name"].removeprefix("stories").replace(", ", "-").replace(" ", "-")
        error = f"{row['error']:.3%} / {row['error_rtn']:.3%}" if "error" in row else ""
        change = f"{row['perplexity']:.4f} ({row['of_fp32'] - 1:+.2%})"
        yield f"| quantize-{name} | {row['name']} | {change} | {error} |"


def main(arguments=None):
    """Write the input, measure, print the table."""
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--data", type=Path, required=True, help="the folder of shared data")
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--results", type=Path, help="file of the rows; in OUT if not given")
    options.add_argument("--model", choices=tuple(GROUPS), help="one of them instead of both")
    options.add_argument("--ways", default=";".join(WAYS), help=f"some of: {'; '.join(WAYS)}")
    asked = options.parse_args(arguments)
    ways = asked.ways.split(";")
    if strange := set(ways) - set(WAYS):
        raise SystemExit(f"error: ways holds {strange.pop()!r}, expected some of {'; '.join(WAYS)}")

    from prune_stories import write_input

    from slmperf.bench import results

    rows = []
    for name in write_input(asked.data, asked.out / "input"):
        if asked.model in (None, name):
            for row in measured(name, asked.out / "input" / name, ways):
                print(*table_rows([row]), flush=True)
                rows.append(row)
    path = asked.results or asked.out / "quantize-stories.json"
    results.write_results(path, "quantize-stories", rows, machine=results.machine("cpu"))


if __name__ == "__main__":
    main()
