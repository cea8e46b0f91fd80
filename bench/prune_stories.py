"""Pruning on real weights: methods side by side on the two small Llamas of the data folder.

    python bench/prune_stories.py --data DATA --out runs/prune [--mode sequential] [--calibration]

One-shot MLP pruning at 15, 20, 25 and 37.5% of the neurons by OSSCAR, activation norm with and
without a refit, and magnitude: layer error and perplexity of 150 stories, before and after. What is
run is `slmperf prune --compare`, on a checkpoint of each model and on JSONL of token ids, which are
written into OUT first (their tokenizers are llama2.c's). With --calibration the in-domain stories
stand beside a sample of C4.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHODS = "osscar,osscar+swaps,norm+refit,norm,magnitude+refit,magnitude"
SHARES = (0.15, 0.20, 0.25, 0.375)
STORIES, GENERIC = 120, 120  # calibration sequences


def write_input(data: Path, folder: Path) -> dict[str, int]:
    """Checkpoints, stories and generic text of both models; name -> neurons of a layer."""
    sys.path.insert(0, str(ROOT / "tests"))
    from stories3m import TOKENS, load_stories3m
    from stories260k import encode_texts, load_stories260k, story_tokens

    from slmperf import models
    from slmperf.models.files import write_atomically

    found = {}
    for name, load, tokens in (
        ("stories260k", load_stories260k, "tok512.bin"),
        ("stories3m", load_stories3m, TOKENS),
    ):
        model = load(data)
        models.save(model, None, folder / name / "model")
        found[name] = model.config.intermediate_size
        lines = []
        for split, count in (("calib", STORIES), ("eval", 10**6)):
            for ids in story_tokens(data, split, count, tokens):
                lines.append(json.dumps({"input_ids": ids.tolist(), "split": split}))
        write_atomically(folder / name / "stories.jsonl", "\n".join(lines) + "\n")
        with (data / "text" / "c4_sample.jsonl").open(encoding="utf-8") as file:
            texts = [
                json.loads(line)["text"] for line, _ in zip(file, range(GENERIC), strict=False)
            ]
        generic = [
            json.dumps({"input_ids": ids.tolist()}) for ids in encode_texts(data, texts, tokens)
        ]
        write_atomically(folder / name / "c4.jsonl", "\n".join(generic) + "\n")
    return found


def main() -> None:
    """Write the input and run the command for each model."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--data", type=Path, required=True, help="the folder of shared data")
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--mode", default="sequential")
    options.add_argument("--methods", default=METHODS)
    options.add_argument("--calibration", action="store_true", help="C4 beside the stories")
    asked = options.parse_args()
    for name, neurons in write_input(asked.data, asked.out / "input").items():
        given = asked.out / "input" / name
        kept = sorted({round(neurons * (1 - share)) for share in SHARES}, reverse=True)
        command = [
            sys.executable, "-m", "slmperf.cli", "prune",
            given / "model", asked.out / f"{name}-{asked.mode}", "--compare",
            "--intermediate", ",".join(map(str, kept)),
            "--method", asked.methods, "--mode", asked.mode,
            "--calibration", given / "stories.jsonl", "--eval", given / "stories.jsonl",
            *(("--generic", given / "c4.jsonl") if asked.calibration else ()),
        ]  # fmt: skip
        print(name, flush=True)
        subprocess.run(list(map(str, command)), check=True)


if __name__ == "__main__":
    main()
