"""latency: how long a prefill or a decode step takes, from shapes and a few physical constants.

A forward pass of n new tokens over l layers on `ranks` GPUs (tensor parallel) takes

    gemm         2 n (weights of the layers' matrices) / (ranks gemm_tflops)
    attention    4 l H C (pairs of query and visible key) / (ranks attention_tflops)
    allreduce    l 2 (2 (ranks - 1) / ranks) n D 2 bytes / allreduce_gbs          (ring, bf16)
    elementwise  l n (bytes that norms, rope, activation and quantisation move) / memory_gbs
    token        n token_us       whatever is paid per token and not per weight: tokenisation,
                                  paging, unfused passes
    fixed        fixed_ms         whatever is paid per forward pass

and never less than reading the weights (gemm) or the cached keys and values (attention) once takes
at read_gbs: that is what a decode step and a short suffix on a cached prefix cost. A cold prompt of
L tokens has L^2 / 2 pairs. Rates are what the serving stack reached, not what a data sheet says.

Fitted on the ten P50 cells of Tables 9 and 10 of arXiv 2502.14305 (8B to 2.1B, 16k and 32k tokens,
4 x H100, SGLang 0.4.1, FP8), four constants reproduce each of them within 1%. One rate with one
overhead misses them by up to 30%: the cost per token is 31 to 57% of the time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, cast

from slmperf.check import InputError
from slmperf.models.files import write_atomically
from slmperf.models.shapes import Shape, shape_of
from slmperf.plan.work import SCHEMES, Work, prefill_works

SCHEMA = "slmperf.latency/1"


class Breakdown(NamedTuple):
    """Milliseconds by term."""

    gemm: float
    attention: float
    allreduce: float
    elementwise: float
    token: float
    fixed: float

    @property
    def layers_ms(self) -> float:
        """What the layers take: proportional to their number."""
        return self.gemm + self.attention + self.allreduce + self.elementwise

    @property
    def total_ms(self) -> float:
        """The whole."""
        return sum(self)


class Prediction(float):
    """Milliseconds, as a float, and how far to trust them.

    breakdown      the terms
    residual_pct   largest error of the model on the measurements it was fitted to, in percent;
                   None: nothing was measured on this hardware
    extrapolates   in which ways the question lies outside those measurements; empty: inside
    """

    breakdown: Breakdown
    residual_pct: float | None
    extrapolates: tuple[str, ...]

    def __new__(
        cls, breakdown: Breakdown, residual_pct: float | None, extrapolates: tuple[str, ...]
    ) -> Prediction:
        """The sum of the terms."""
        made = super().__new__(cls, breakdown.total_ms)
        made.breakdown, made.residual_pct = breakdown, residual_pct
        made.extrapolates = extrapolates
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:  # copies and pickles are made by __new__
        return self.breakdown, self.residual_pct, self.extrapolates

    def __str__(self) -> str:
        fitted = "" if self.residual_pct is None else f"fit within {self.residual_pct:.2g}%"
        return f"{float(self):.4g} ms ({'; '.join(filter(None, (fitted, *self.extrapolates)))})"


@dataclass(frozen=True)
class Fitted:
    """What the measurements behind a model covered."""

    cells: int = 0  # measurements
    context: tuple[int, int] = (0, 0)  # least and most tokens of a prompt
    parameters: tuple[int, int] = (0, 0)
    tensor_parallel: tuple[int, ...] = ()
    schemes: tuple[str, ...] = ()
    hot: bool = False  # prompts on a cached prefix were among them
    residual_pct: float | None = None  # largest error on them
    left_out_pct: float | None = None  # largest error on one that was left out of the fit


@dataclass(frozen=True)
class LatencyModel:
    """Constants of one GPU (or CPU) and serving stack; predicts from them.

    `preset(name)` gives the shipped ones, `load(path)` those that `slmperf plan fit` wrote.
    """

    name: str
    source: str  # where the constants are from, in words
    # Fitted.
    gemm_tflops: Mapping[str, float]  # by scheme
    attention_tflops: float
    token_us: float
    fixed_ms: float
    # Given.
    allreduce_gbs: float
    memory_gbs: float  # of element-wise passes
    read_gbs: float  # of weights and cached keys and values
    device_memory_gb: float
    fitted: Fitted

    @classmethod
    def preset(cls, name: str) -> LatencyModel:
        """A shipped model: "h100-paper", "a100-paper", "h200-paper", or the one that begins so
        ("h100"). InputError for another name.
        """
        folder = resources.files("slmperf.plan") / "presets"
        names = [entry.name.removesuffix(".json") for entry in folder.iterdir()]
        fits = [one for one in names if name and one.startswith(name.lower())]
        if len(fits) != 1:
            known = ", ".join(sorted(names))
            raise InputError(f"plan: no preset {name!r}, expected one of {known}")
        return cls._parse((folder / f"{fits[0]}.json").read_text(encoding="utf-8"), fits[0])

    @classmethod
    def load(cls, path: str | Path) -> LatencyModel:
        """A model that `save` wrote; InputError for anything else."""
        return cls._parse(Path(path).read_text(encoding="utf-8"), str(path))

    @classmethod
    def named(cls, name: str) -> LatencyModel:
        """What a command's option says: a preset, or a file that `save` wrote."""
        path = Path(name)
        return cls.load(path) if path.suffix == ".json" or path.is_file() else cls.preset(name)

    @classmethod
    def _parse(cls, text: str, source: str) -> LatencyModel:
        try:
            value = json.loads(text)
        except ValueError as error:
            raise InputError(f"{source}: no JSON: {error}") from None
        found = value.pop("schema", None) if isinstance(value, dict) else None
        if found != SCHEMA:
            raise InputError(f"{source}: schema is {found!r}, expected {SCHEMA!r}")
        assert isinstance(value, dict)  # it has a schema
        try:
            seen: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in value["fitted"].items()
            }
            rates = {k: _number(v) for k, v in value["gemm_tflops"].items()}
            flat = {k: _number(v) for k, v in value.items() if k not in ("fitted", "gemm_tflops")}
            found = cls(**flat, gemm_tflops=rates, fitted=Fitted(**seen))
            found._check()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{source}: not a latency model: {error}") from None
        return found

    def _check(self) -> None:
        """ValueError or TypeError where a file's constants are none."""
        if not self.gemm_tflops or not self.gemm_tflops.keys() <= SCHEMES.keys():
            raise ValueError(f"gemm_tflops is {dict(self.gemm_tflops)}, expected schemes' rates")
        positive = {f"gemm_tflops {name}": rate for name, rate in self.gemm_tflops.items()}
        for name in ("attention_tflops", "allreduce_gbs", "memory_gbs", "read_gbs"):
            positive[name] = getattr(self, name)
        for name, number in (positive | {"device_memory_gb": self.device_memory_gb}).items():
            if not number > 0:
                raise ValueError(f"{name} is {number}, expected a number > 0")
        for name in ("token_us", "fixed_ms"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number >= 0")
        for low, high in (self.fitted.context, self.fitted.parameters):
            if low > high:
                raise ValueError(f"fitted: {low} to {high} is no range")

    def save(self, path: str | Path) -> None:
        """Write as JSON that `load` reads."""
        value = {"schema": SCHEMA, **asdict(self)}
        for name, number in value.items():
            if number == math.inf:
                value[name] = None  # JSON knows no infinity
        value["gemm_tflops"] = {
            scheme: None if rate == math.inf else rate for scheme, rate in self.gemm_tflops.items()
        }
        write_atomically(path, json.dumps(value, indent=1) + "\n")

    def prefill_ms(
        self,
        shape: Shape | str | Path | Mapping[str, Any] | Any,
        *,
        context: int,
        tensor_parallel: int = 1,
        items: int = 1,
        item_tokens: int = 128,
        hot: bool = False,
        scheme: str = "",
    ) -> Prediction:
        """Milliseconds until `items` prompts with a common prefix are answered (TTFT of the last).

        shape        what `slmperf.models.shapes.shape_of` takes: "2.4b", a config, a folder; of a
                     model whose layers differ a list, a Shape for each kind with its number
        context      tokens of one whole prompt, its own `item_tokens` included
        items        prompts on the prefix; the first computes it, the others come in one batch
        hot          the prefix is cached already: only items x item_tokens are computed
        scheme       of SCHEMES; the first that the model has a rate for if empty

        Raises InputError for sizes that cannot be.
        """
        question = self._question(shape, context, tensor_parallel, scheme)
        shapes, ranks, scheme = question
        settings: dict[str, Any] = {"items": items, "item_tokens": item_tokens, "hot": hot}
        works = (prefill_works(one, ranks, scheme, context=context, **settings) for one in shapes)
        found = [self.times(Work.together(kinds), scheme) for kinds in zip(*works, strict=True)]
        outside = self._outside(*question, context=context)
        if (hot or items > 1) and self.fitted.cells and not self.fitted.hot:
            outside += ("a cached prefix was not measured",)
        total = Breakdown(*map(sum, zip(*found, strict=True)))
        return Prediction(total, self.fitted.residual_pct, outside)

    def decode_ms(
        self,
        shape: Shape | str | Path | Mapping[str, Any] | Any,
        *,
        context: int,
        tensor_parallel: int = 1,
        batch: int = 1,
        scheme: str = "",
    ) -> Prediction:
        """Milliseconds of one decode step of `batch` sequences that hold `context` tokens each.

        The vocabulary's head (bf16) is read in every step. Raises InputError as `prefill_ms`.
        """
        question = self._question(shape, context, tensor_parallel, scheme)
        if batch < 1:
            raise InputError(f"plan: batch is {batch}, expected at least 1")
        shapes, ranks, scheme = question
        step: dict[str, Any] = {"new": batch, "pairs": batch * context, "cached": batch * context}
        work = Work.together([Work.of(one, ranks, scheme, **step) for one in shapes])
        found = self.times(work, scheme)
        head_ms = 2 * shapes[0].vocabulary * shapes[0].hidden / (ranks * self.read_gbs * 1e6)
        outside = self._outside(*question, context=context)
        if self.fitted.cells:
            outside += ("decode steps were not measured",)
        found = found._replace(gemm=found.gemm + head_ms)
        return Prediction(found, self.fitted.residual_pct, outside)

    def breakdown(
        self, shape: Shape | str | Path | Mapping[str, Any] | Any, **settings: Any
    ) -> Breakdown:
        """The terms of `prefill_ms` with the same settings."""
        return self.prefill_ms(shape, **settings).breakdown

    def _question(
        self, what: Any, context: int, ranks: int, scheme: str
    ) -> tuple[list[Shape], int, str]:
        shapes = [shape_of(one) for one in (what if isinstance(what, list) else [what])]
        if not isinstance(context, int) or context < 1:
            raise InputError(
                f"plan: context is {context!r}, expected a whole number of tokens >= 1"
            )
        scheme = scheme or next(iter(self.gemm_tflops))
        if scheme not in self.gemm_tflops:
            known = ", ".join(self.gemm_tflops)
            raise InputError(f"plan: scheme is {scheme!r}, expected one of {known} ({self.name})")
        for shape in shapes:
            shape.rank(ranks)  # refuses what does not divide
        return shapes, ranks, scheme

    def times(self, work: Work, scheme: str) -> Breakdown:
        """Milliseconds of one forward pass, by term."""
        return Breakdown(
            gemm=max(work.gemm_flops / self.gemm_tflops[scheme] / 1e9, self.weights_ms(work)),
            attention=max(work.attention_flops / self.attention_tflops / 1e9, self.cache_ms(work)),
            allreduce=work.allreduce_bytes / self.allreduce_gbs / 1e6,
            elementwise=work.elementwise_bytes / self.memory_gbs / 1e6,
            token=work.new * self.token_us / 1e3,
            fixed=self.fixed_ms,
        )

    def weights_ms(self, work: Work) -> float:
        """What reading the weights once takes: the least that the matrix products can."""
        return work.weight_bytes / self.read_gbs / 1e6

    def cache_ms(self, work: Work) -> float:
        """What reading the cached keys and values once takes."""
        return work.cache_bytes / self.read_gbs / 1e6

    def _outside(
        self, shapes: Sequence[Shape], ranks: int, scheme: str, *, context: int
    ) -> tuple[str, ...]:
        seen = self.fitted
        if not seen.cells:
            return ("nothing was measured on this hardware",)
        found = []
        for what, value, (low, high) in (
            ("context", context, seen.context),
            ("parameters", parameters_of(shapes), seen.parameters),
        ):
            if not low <= value <= high:
                side, end = ("below", low) if value < low else ("above", high)
                found.append(f"{what} {value:,} {side} the measured {end:,}")
        if ranks not in seen.tensor_parallel:
            found.append(f"tensor parallel {ranks}, measured {_list(seen.tensor_parallel)}")
        if scheme not in seen.schemes:
            found.append(f"scheme {scheme}, measured {_list(seen.schemes)}")
        return tuple(found)

    def carried_to(self, name: str, source: str, **constants: Any) -> LatencyModel:
        """Another machine's model with these constants replaced; nothing of it was measured."""
        return replace(self, name=name, source=source, fitted=Fitted(), **constants)


def parameters_of(shapes: Sequence[Shape]) -> int:
    """All weights of a model whose layers are of these shapes; what is no layer's counts once."""
    first, *rest = shapes
    per_layer = ((one.layers, one.layer_matrix_parameters + 2 * one.hidden) for one in rest)
    return first.parameters + sum(layers * each for layers, each in per_layer)


def _list(values: tuple) -> str:
    return ", ".join(map(str, values))


def _number(value: Any) -> Any:
    return cast(Any, math.inf if value is None else value)
