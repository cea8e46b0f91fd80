"""recipe: a choice of the plan as a recipe that `slmperf run` takes as it is.

The base is trained, cut to the chosen shape as in arXiv 2502.14305 (neurons in two equal steps,
then whole groups of heads) with distillation from the uncut base after every cut, and quantised.
"""

from __future__ import annotations

from typing import Any

import yaml

from slmperf.models.shapes import Shape
from slmperf.plan.search import Choice

# Recipes train a tokenizer of their own on the prompts; a vocabulary of 128k would learn nothing.
VOCABULARY = 2048
_RATE = 0.144  # learning rate x width: 3e-3 at 48, in inverse proportion


def recipe_text(choice: Choice) -> str:
    """YAML of a recipe; on the embedded world unless `slmperf run --data` names interactions."""
    base, shape = choice.base, choice.shape
    training = {
        "epochs": 1,
        "learning_rate": float(f"{min(3e-3, _RATE / base.hidden):.2g}"),
        "batch_tokens": max(3072, choice.context),
    }
    healing = {**training, "epochs": 0.25}
    stages: list[dict[str, Any]] = [
        {"name": "base", "stage": "teacher", "shape": _sizes(base), "training": training}
    ]

    def distilled(cut: dict[str, Any], source: str) -> str:
        healed = f"{cut['name']}-kd"
        stages.append({**cut, "from": source})
        after = {"stage": "distil", "from": cut["name"], "teacher": "base", "training": healing}
        stages.append({"name": healed, **after})
        return healed

    last = "base"
    widths = [shape.intermediate] if shape.intermediate < base.intermediate else []
    if base.intermediate - shape.intermediate >= 2:
        widths.insert(0, (base.intermediate + shape.intermediate) // 2)
    for width in widths:
        last = distilled(
            {"name": f"mlp-{width}", "stage": "prune_mlp", "intermediate": width}, last
        )
    if shape.kv_heads < base.kv_heads:
        name = f"heads-{shape.heads}"
        cut = {"name": name, "stage": "prune_attention", "kv_heads": shape.kv_heads}
        last = distilled(cut, last)
    low_precision = choice.scheme not in ("bf16", "fp32")
    if low_precision:
        stages.append({"name": choice.scheme, "stage": "quantise", "from": last, **_scheme(choice)})
    recipe = {
        "name": "planned",
        "seeds": [0],
        "data": {"context": choice.context, "vocabulary": min(VOCABULARY, base.vocabulary)},
        "stages": stages,
        "timing": {"candidates": choice.items},
    }
    body = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=98)
    cold, hot = choice.ttft_cold_ms, choice.ttft_hot_ms
    head = [
        f"{shape}, {choice.parameters:,} parameters with a vocabulary of {base.vocabulary:,}.",
        f"Predicted for {choice.scheme}, {choice.context:,} tokens, {choice.items} items, tensor "
        f"parallel {choice.tensor_parallel}:",
        f"TTFT cold {cold}",
        f"TTFT hot {hot}",
        f"The base is trained anew with {base}'s sizes: no checkpoint's weights are used.",
    ]
    return "".join(f"# {line}\n" for line in head) + body


def _scheme(choice: Choice) -> dict[str, Any]:
    """Keys of a stage that quantises: groups are as large as the shape lets them be."""
    if choice.scheme != "w4a16":
        return {"scheme": choice.scheme}
    shape = choice.shape
    inputs = (shape.hidden, shape.heads * shape.head_size, shape.intermediate)
    sizes = (size for size in (128, 64, 32) if not any(one % size for one in inputs))
    return {"scheme": choice.scheme, "group_size": next(sizes, -1)}


def _sizes(shape: Shape) -> dict[str, int]:
    return {
        "layers": shape.layers,
        "hidden": shape.hidden,
        "intermediate": shape.intermediate,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_size": shape.head_size,
    }
