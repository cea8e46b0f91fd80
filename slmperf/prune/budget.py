"""solve_budget: sizes of a pruned model that meet a number of parameters, bytes or milliseconds.

    parameters      the nearest legal shape, on either side
    KV bytes        of one token in the cache, bf16 keys and values: never exceeded
    milliseconds    until the first token, by `slmperf.plan.LatencyModel`: never exceeded

Sizes are legal where kernels take them: neurons in multiples of a granularity, heads as
`slmperf.prune.heads` says. All layers get one size, or, with error curves, each its own: then steps
are taken where the error grows least for what they save, until the target is met. No weights are
needed: parameters are counted on the meta device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from slmperf.check import InputError
from slmperf.prune.counts import Counts, LayerSize
from slmperf.prune.heads import MODES, Mode, head_maps, legal_heads
from slmperf.prune.latency import milliseconds_of
from slmperf.prune.targets import Target, parse_target

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from slmperf.plan import LatencyModel

DIMENSIONS = ("mlp", "attention")
_LAYERS = {"mlp": "mlp.down_proj", "attention": "self_attn.o_proj"}


class Budget(NamedTuple):
    """Sizes after pruning: numbers, or lists with one per layer where layers differ."""

    intermediate_size: int | list[int]
    attention_heads: int | list[int]
    key_value_heads: int | list[int]
    parameters: int
    kv_bytes_per_token: int
    milliseconds: float | None = None  # where the target was milliseconds
    notes: tuple[str, ...] = ()  # what bound the choice, in sentences


class _Question(NamedTuple):
    """A target and how sizes are measured against it."""

    target: Target
    measure: Callable[[Sequence[LayerSize]], float]
    counts: Counts
    moves: tuple[str, ...]
    options: Sequence[Mapping[str, list]]  # per layer and dimension, legal values, largest first


def solve_budget(
    model_config: PretrainedConfig,
    target: str | int | Target,
    *,
    prune: Collection[str] = ("mlp",),
    granularity: int = 512,
    heads: str = "kv_group",
    curves: Mapping[str, Sequence[float]] | None = None,
    gpu: str | LatencyModel = "h100",
    context: int = 16384,
    tensor_parallel: int = 1,
    scheme: str = "",
) -> Budget:
    """The sizes that meet `target` when the dimensions `prune` of the model may shrink.

    model_config  of the model before: Llama-like, dense or Mixtral; its weights are not needed
    target        "2.4B" or a whole number: parameters; "56 KiB" or "57344 bytes": KV cache bytes
                  per token; "170 ms"
    prune         "mlp" and "attention": which dimensions may move. The others stay
    granularity   neurons come in multiples of it, besides the model's own number. 512 lets blocks
                  of 128 (FP8) divide over four ranks
    heads         what leaves together: see `slmperf.prune.heads`. In mode free the key/value heads
                  that nobody reads leave too, which no shape tells before the heads are chosen:
                  they are all counted, so that parameters and bytes are the most there can be
    curves        None: one size for all layers. Otherwise error after each removal, by layer name
                  ("model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"), all in one
                  unit: every layer gets its own size, where the sum of errors grows least. Relative
                  errors (`error_curves`) treat layers alike; absolute ones starve the first layers,
                  whose outputs are small. The sum is no perplexity: measure both (--eval)
    gpu, context, tensor_parallel, scheme   for milliseconds, as `slmperf.plan` takes them

    Of shapes equally near to a number of parameters the one that takes like shares of neurons and
    heads is taken; of those within bytes or milliseconds the one with the most parameters.

    Raises InputError for a target that the model does not reach this way, and says how far it goes.
    """
    asked = target if isinstance(target, Target) else parse_target(target)
    question, options = _question(
        model_config, asked, prune, granularity, heads, gpu, context, tensor_parallel, scheme
    )
    counts, measure = question.counts, question.measure
    sizes = _alike(question) if curves is None else _by_error(question, curves)
    notes = []
    if "mlp" in question.moves and granularity > 1 and curves is None:
        exact = _alike(question._replace(options=_freed(question, sizes, options(1))))
        if exact[0].neurons != sizes[0].neurons:
            notes.append(
                f"granularity: {sizes[0].neurons:,} neurons are a multiple of {granularity}; "
                f"in steps of 1, {exact[0].neurons:,} would meet {asked}"
            )
    if asked.kind == "milliseconds":
        name = gpu if isinstance(gpu, str) else gpu.name
        notes.append(
            f"{measure(sizes):.4g} ms predicted, not measured: {name}, {context:,} tokens, tensor "
            f"parallel {tensor_parallel}"
        )
    fewer = any(now.heads < then.heads for now, then in zip(sizes, counts.before, strict=True))
    if heads == "free" and fewer:
        notes.append("free heads: of the key/value heads those that nobody reads leave, too: fewer "
                     f"than {counts.parameters(sizes):,} parameters may stay")  # fmt: skip
    if list(sizes) == list(counts.before):
        notes.append(f"nothing is pruned: no smaller shape meets {asked} as well")
    return Budget(
        intermediate_size=_plain([size.neurons for size in sizes]),
        attention_heads=_plain([size.heads for size in sizes]),
        key_value_heads=_plain([size.kv_heads for size in sizes]),
        parameters=counts.parameters(sizes),
        kv_bytes_per_token=counts.kv_bytes_per_token(sizes),
        milliseconds=float(measure(sizes)) if asked.kind == "milliseconds" else None,
        notes=tuple(notes),
    )


def check_target(model_config: PretrainedConfig, target: Target, **settings: Any) -> None:
    """InputError where no sizes, of all layers or of each, meet `target`.

    settings: prune, granularity, heads, gpu, context, tensor_parallel, as `solve_budget` takes
    them. It is what can be said before error curves are there.
    """
    _question(model_config, target, **settings, scheme="")


def _question(
    model_config: PretrainedConfig,
    target: Target,
    prune: Collection[str],
    granularity: int,
    heads: str,
    gpu: str | LatencyModel,
    context: int,
    tensor_parallel: int,
    scheme: str,
) -> tuple[_Question, Callable[[int], list[dict[str, list]]]]:
    """The question of `solve_budget`, and the options at any granularity."""
    moves = _moves(prune, target)
    if heads not in MODES:
        raise InputError(f"heads: wanted one of {', '.join(MODES)}, found {heads!r}")
    for name, value in (("granularity", granularity), ("tensor_parallel", tensor_parallel)):
        if value < 1:
            raise InputError(f"{name}: wanted a number >= 1, found {value}")
    counts, ranks = Counts.of(model_config), 1
    if target.kind == "milliseconds":
        measure = milliseconds_of(model_config, counts, gpu, context, tensor_parallel, scheme)
        ranks = tensor_parallel
    else:
        measure = counts.parameters if target.kind == "parameters" else counts.kv_bytes_per_token
    mapped = head_maps(model_config)

    def options(step: int) -> list[dict[str, list]]:
        return [
            {
                "mlp": _neurons(size, step, ranks),
                "attention": _heads(size, heads, ranks)[: 1 if fixed else None],
            }
            for size, fixed in zip(counts.before, mapped, strict=True)
        ]

    question = _Question(target, measure, counts, moves, options(granularity))
    _refuse_unreachable(question, granularity)
    return question, options


def _moves(prune: Collection[str], target: Target) -> tuple[str, ...]:
    names = (prune,) if isinstance(prune, str) else tuple(prune)
    unknown = [name for name in names if name not in DIMENSIONS]
    if unknown or not names:
        found = repr(unknown[0]) if unknown else "none"
        raise InputError(f"prune: wanted some of {', '.join(DIMENSIONS)}, found {found}")
    if target.kind == "KV bytes per token" and "attention" not in names:
        raise InputError(
            "prune: KV bytes per token depend on attention alone, wanted 'attention' among "
            f"what may shrink, found {', '.join(names)}"
        )
    return names


def _neurons(size: LayerSize, granularity: int, ranks: int) -> list[int]:
    """Legal numbers of neurons of a layer, largest first: its own, then multiples."""
    last = (size.neurons - 1) // granularity * granularity
    found = [size.neurons, *range(last, 0, -granularity)]
    return [neurons for neurons in found if neurons % ranks == 0]


def _heads(size: LayerSize, mode: Mode, ranks: int) -> list[tuple[int, int]]:
    """Legal pairs (query heads, key/value heads) of a layer, largest first."""
    own = (size.heads, size.kv_heads)
    legal = legal_heads(*own, mode)[::-1]
    return [
        (heads, keys)
        for heads, keys in legal
        if heads % ranks == 0 and (keys % ranks == 0 or ((heads, keys) == own and ranks > keys))
    ]


def _refuse_unreachable(question: _Question, granularity: int) -> None:
    target, counts = question.target, question.counts
    for layer, options in enumerate(question.options):
        if not options["mlp"] or not options["attention"]:
            raise InputError(
                f"solve_budget: layer {layer} has {counts.before[layer]}: nothing that can be left "
                "of it divides over the ranks of tensor_parallel"
            )
    least = [
        LayerSize(
            one["mlp"][-1 if "mlp" in question.moves else 0],
            *one["attention"][-1 if "attention" in question.moves else 0],
        )
        for one in question.options
    ]
    if "mlp" in question.moves and all(len(one["mlp"]) < 2 for one in question.options):
        raise InputError(
            f"granularity: {granularity} leaves no smaller number of neurons than "
            f"{counts.before[0].neurons}, wanted a smaller granularity"
        )
    after = question.measure(least)
    what = " and ".join(question.moves)
    if target.kind != "parameters":
        if after > target.value:
            raise InputError(
                f"target: wanted at most {target}, {what} can shrink to {target.like(after)}"
            )
        return
    before = question.measure(counts.before)
    if target.value > before:
        raise InputError(f"target: wanted {target}, the model has {target.like(before)}")
    steps = max(len(one[name]) - 1 for one in question.options for name in question.moves)
    if target.value < after - (before - after) / max(1, steps) / 2:
        raise InputError(f"target: wanted {target}, {what} can shrink to {target.like(after)}")


def _alike(question: _Question) -> list[LayerSize]:
    """One size for all layers: every combination is measured."""
    first = question.counts.before[0]
    if any(size != first for size in question.counts.before):
        raise InputError(
            "solve_budget: the model's layers differ in size, wanted error curves of its layers"
        )
    layers, options = len(question.counts.before), question.options[0]

    def rank(size: LayerSize) -> tuple[float, float, float]:
        found = question.measure([size] * layers)
        shares = size.neurons / first.neurons, size.heads / first.heads
        if question.target.kind == "parameters":
            return abs(found - question.target.value), abs(shares[0] - shares[1]), -found
        over = found > question.target.value
        return over, -question.counts.parameters([size] * layers), found

    sizes = (LayerSize(neurons, *pair) for neurons, pair in _pairs(options, question.moves))
    return [min(sizes, key=rank)] * layers


def _pairs(options: Mapping[str, list], moves: Collection[str]) -> Iterator[tuple[int, Any]]:
    kept = [options[name] if name in moves else options[name][:1] for name in DIMENSIONS]
    return itertools.product(*kept)


def _freed(
    question: _Question, sizes: Sequence[LayerSize], finest: Sequence[Mapping[str, list]]
) -> list[dict[str, list]]:
    """Options with the heads as chosen and any number of neurons that is not far from the choice.

    "Not far" is one step of the granularity, so that the search stays short.
    """
    steps = question.options[0]["mlp"]
    at = steps.index(sizes[0].neurons)
    high, low = steps[max(at - 1, 0)], steps[min(at + 1, len(steps) - 1)]
    return [
        {
            "mlp": [neurons for neurons in one["mlp"] if low <= neurons <= high],
            "attention": [(sizes[0].heads, sizes[0].kv_heads)],
        }
        for one in finest
    ]


def _by_error(question: _Question, curves: Mapping[str, Sequence[float]]) -> list[LayerSize]:
    """A size for each layer: steps in the order of error per unit saved, until the target is met.

    Where a curve bends the wrong way, several steps count as one slope (the lower convex hull), so
    that a dear step before a cheap one is not an end.
    """
    before = list(question.counts.before)
    whole = question.measure(before)
    steps: list[tuple[float, int, int, str, Any]] = []
    for layer, name in itertools.product(range(len(before)), question.moves):
        values = question.options[layer][name]
        curve = _curve(curves, layer, name, before[layer], values)
        saved = []
        for value in values:
            sizes = [*before]
            sizes[layer] = _with(before[layer], name, value)
            saved.append(whole - question.measure(sizes))
        for index, slope in enumerate(_slopes(saved, curve), start=1):
            steps.append((slope, layer, index, name, values[index]))
    steps.sort(key=lambda step: step[:4])
    sizes, last = before, before
    for _, layer, _, name, value in steps:
        if question.measure(sizes) <= question.target.value:
            break
        last, sizes = sizes, [*sizes]
        sizes[layer] = _with(sizes[layer], name, value)
    if question.target.kind == "parameters":
        near = (abs(question.measure(one) - question.target.value) for one in (last, sizes))
        return last if next(near) < next(near) else sizes
    return sizes


def _curve(
    curves: Mapping[str, Sequence[float]], layer: int, name: str, size: LayerSize, values: list
) -> list[float]:
    """Error at each of the values (largest first, so 0 first)."""
    key = f"model.layers.{layer}.{_LAYERS[name]}"
    if key not in curves:
        raise InputError(f"curves: wanted an error curve of {key}, found {', '.join(curves)}")
    curve = curves[key]
    found = [0.0]
    for value in values[1:]:
        if name == "mlp":
            removed = size.neurons - value
        else:  # groups are key/value heads, or query heads where all key/value heads stay
            groups = value[1] != size.kv_heads
            removed = size.kv_heads - value[1] if groups else size.heads - value[0]
        if removed > len(curve):
            raise InputError(
                f"curves: {key}: wanted the error after {removed} removals, found {len(curve)}"
            )
        found.append(float(curve[removed - 1]))
    return found


def _slopes(saved: Sequence[float], error: Sequence[float]) -> list[float]:
    """Of each step the slope of the lower convex hull over it: error per unit saved."""
    slopes: list[float] = []
    while len(slopes) < len(saved) - 1:
        start = len(slopes)
        slope, end = min(
            ((error[end] - error[start]) / max(saved[end] - saved[start], 1e-300), -end)
            for end in range(start + 1, len(saved))
        )
        slopes += [slope] * (-end - start)
    return slopes


def _with(size: LayerSize, name: str, value: Any) -> LayerSize:
    if name == "mlp":
        return size._replace(neurons=value)
    return size._replace(heads=value[0], kv_heads=value[1])


def _plain(column: Sequence[int]) -> int | list[int]:
    return column[0] if len(set(column)) == 1 else list(column)
