"""timing: latency of all stages in one pass, taking turns: ratios share one state of the machine.

Kept apart from the manifests: times differ from run to run, everything there does not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slmperf import arch, models
from slmperf.check import InputError
from slmperf.engine import Engine, layer_split, prefill_latency, rank_latency
from slmperf.models.files import write_atomically
from slmperf.recipe.manifest import Manifest, digest
from slmperf.recipe.material import Material
from slmperf.recipe.results import StageLatency
from slmperf.recipe.schema import Timing


def check(timing: Timing, material: Material) -> None:
    """InputError for a context that the models will not know or that no candidate fits into."""
    limit, candidate = material.builder.context, _candidate_tokens(material)
    context = timing.context or limit
    if not candidate < context <= limit:
        raise InputError(
            f"timing.context: expected {candidate + 1} (a candidate and a token before it) "
            f"to {limit} (data.context), found {context}"
        )


def measure(
    timing: Timing,
    stages: Mapping[str, tuple[Path, Manifest]],
    material: Material,
    file: Path,
    progress: Callable[[int, int], None],
) -> dict[str, StageLatency]:
    """Latency of each stage, by name; stages: name -> (checkpoint, manifest).

    Written to `file`, and read from there while weights, settings and machine are the same.
    """
    candidate_tokens = _candidate_tokens(material)
    key = digest(
        {
            "timing": timing.model_dump(mode="json"),
            "candidate_tokens": candidate_tokens,
            "weights": {name: manifest.weights for name, (_, manifest) in stages.items()},
            "machine": [arch.cpu_name(), arch.threads(), arch.cuda_name()],
        }
    )
    if file.is_file():
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored["key"] == key:
            return {name: StageLatency(**value) for name, value in stored["stages"].items()}
    device = "cuda" if arch.cuda_name() else "cpu"
    engines = {
        name: Engine(models.load(folder).to(device), material.builder.answer_ids)
        for name, (folder, _) in stages.items()
    }
    context = timing.context or material.builder.context
    samples: dict[str, list[tuple[float, float, float, dict[str, float]]]] = {
        name: [] for name in engines
    }
    for turn in range(timing.repeats):
        for place, (name, engine) in enumerate(engines.items()):
            samples[name].append(_once(engine, context, timing.candidates, candidate_tokens))
            progress(turn * len(engines) + place + 1, timing.repeats * len(engines))
    found = {name: _summary(taken, context, timing.candidates) for name, taken in samples.items()}
    content: dict[str, Any] = {
        "key": key,
        "stages": {name: dataclasses.asdict(one) for name, one in found.items()},
    }
    write_atomically(file, json.dumps(content, indent=2) + "\n")
    return found


def _once(
    engine: Engine, context: int, candidates: int, candidate_tokens: int
) -> tuple[float, float, float, dict[str, float]]:
    prefill = prefill_latency(engine, context, repeats=1, warmup=1)
    rank = rank_latency(
        engine,
        context,
        candidates=candidates,
        candidate_tokens=candidate_tokens,
        repeats=1,
        warmup=1,
    )
    parts = layer_split(engine.model, context, repeats=1, warmup=0)
    return prefill.median_ms, rank.uncached_ms, rank.cached_ms, parts


def _summary(
    samples: list[tuple[float, float, float, dict[str, float]]], context: int, candidates: int
) -> StageLatency:
    prefill, uncached, cached, parts = zip(*samples, strict=True)
    return StageLatency(
        context=context,
        prefill_ms=float(np.median(prefill)),
        prefill_p90_ms=float(np.quantile(prefill, 0.9)),
        candidates=candidates,
        rank_uncached_ms=float(np.median(uncached)),
        rank_cached_ms=float(np.median(cached)),
        layer_ms={part: float(np.median([one[part] for one in parts])) for part in parts[0]},
    )


def _candidate_tokens(material: Material) -> int:
    """Median length of a candidate."""
    lengths = [len(ids) for prompt in material.prompts for ids in prompt.candidates]
    return int(np.median(lengths))
