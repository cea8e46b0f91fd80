"""fit: the constants of a LatencyModel from measured times to first token.

Every term of the model is linear in one constant (a rate's inverse, microseconds per token,
milliseconds per pass), so the fit is one least-squares problem of relative errors with constants
that cannot be negative; bandwidths of all-reduce, element-wise passes and plain reads are given,
because prefills of a few shapes do not tell them from the cost per token. A hot prompt may be
bound by reading instead of computing; which of the two it is depends on the constants, so the
problem is solved again until that no longer changes.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slmperf.check import InputError
from slmperf.models.shapes import Shape, shape_of
from slmperf.plan.latency import Fitted, LatencyModel
from slmperf.plan.work import SCHEMES, prefill_works

BENCH_SCHEMA = "slmperf.bench/1"
# Tables of the paper's results file: name -> (tokens of a prompt, prompts per member).
PAPER_TABLES = {"m1_k1_16k": (16384, 1), "m1_k1_32k": (32768, 1)}
PAPER_RANKS, PAPER_SCHEME = 4, "fp8"


class Cell(NamedTuple):
    """One measurement: what was asked, and the median milliseconds to the first token."""

    shape: Shape
    context: int
    tensor_parallel: int
    scheme: str
    items: int
    item_tokens: int
    hot: bool
    ttft_ms: float

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of `LatencyModel.prefill_ms`."""
        skip = ("shape", "ttft_ms")
        return {name: value for name, value in self._asdict().items() if name not in skip}


class Fit(NamedTuple):
    """A fitted model and how it does on each cell, in percent: of all, and when left out."""

    model: LatencyModel
    cells: list[Cell]
    error_pct: list[float]
    left_out_pct: list[float]


def read_cells(path: str | Path) -> list[Cell]:
    """Cells of a measurements file: results of `slmperf bench serve`, or the paper's figures.

    The paper's layout has `shapes` (name -> sizes, or `base` and what differs) and `ttft` with
    Tables 9 and 10 (name -> {model: [p50_ms, p99_ms, tokens/s]}); models without a shape, such as
    mixtures of experts, and misprinted cells (null) are left out. Raises InputError for a file of
    another schema, or without a cell.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: no JSON: {error}") from None
    if isinstance(value, dict) and value.get("schema") == BENCH_SCHEMA:
        if value.get("kind") != "serve":
            raise InputError(f"{path}: kind is {value.get('kind')!r}, expected 'serve'")
        rows = value.get("rows")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{path}: expected rows, each a mapping")
        cells = [_bench_cell(row, path) for row in _predictable(rows)]
    elif isinstance(value, dict) and {"shapes", "ttft"} <= value.keys():
        cells = _paper_cells(value, path)
    else:
        name = value.get("schema") if isinstance(value, dict) else type(value).__name__
        raise InputError(
            f"{path}: schema is {name!r}, expected {BENCH_SCHEMA!r} (of bench serve) or a table "
            "of the paper's figures with shapes and ttft"
        )
    if not cells:
        raise InputError(f"{path}: no measurement has a shape (bench serve --shape)")
    return cells


def _predictable(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows that name a shape and measure what a prediction says (`items` null: they do not, such as
    siblings that waited for a cold prefix). Where prompts went as token ids, text is left out: it
    pays for tokenising.
    """
    found = [row for row in rows if row.get("shape") and row.get("items", 1) is not None]
    ids = [row for row in found if row.get("prompts", "ids") == "ids"]
    return ids or found


def _bench_cell(row: Mapping[str, Any], path: Path) -> Cell:
    try:
        return Cell(
            shape=shape_of(row["shape"]),
            context=int(row["context"]),
            tensor_parallel=int(row.get("tensor_parallel") or 1),
            scheme=str(row.get("scheme") or "bf16"),
            items=int(row.get("items") or 1),
            item_tokens=int(row.get("item_tokens") or 1),
            hot=bool(row.get("hot")),
            ttft_ms=float(row["ttft_p50_ms"]),
        )
    except InputError as error:
        raise InputError(f"{path}: row {row.get('name')!r}: {error}") from None
    except KeyError as error:
        raise InputError(f"{path}: row {row.get('name')!r}: no {error.args[0]}") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: row {row.get('name')!r}: {error}") from None


def _paper_cells(value: Mapping[str, Any], path: Path) -> list[Cell]:
    cells = []
    try:
        for table, (context, items) in PAPER_TABLES.items():
            for model, row in value["ttft"].get(table, {}).items():
                if model not in value["shapes"] or row[0] is None:
                    continue
                shape = shape_of(value["shapes"][model], model)
                where = (context, PAPER_RANKS, PAPER_SCHEME, items, 1, False)
                cells.append(Cell(shape, *where, ttft_ms=float(row[0])))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: expected ttft: table -> model -> [p50_ms, ...] and shapes: {error}"
        ) from None
    return cells


def fit(cells: Sequence[Cell], like: LatencyModel, name: str, source: str) -> Fit:
    """Fit the rates, token_us and fixed_ms to the cells; everything else is as in `like`.

    Rates of schemes that no cell has keep their ratio to the first fitted one, where `like` has
    that one; else they are not known. Each cell is also
    left out once and predicted from the others. Raises InputError where the cells cannot tell the
    constants apart.
    """
    schemes = tuple(dict.fromkeys(cell.scheme for cell in cells))
    for cell in cells:
        if not 0 < cell.ttft_ms < math.inf:
            raise InputError(f"fit: a time is {cell.ttft_ms} ms, expected a finite number > 0")
        if cell.scheme not in SCHEMES:
            raise InputError(
                f"fit: scheme is {cell.scheme!r}, expected one of {', '.join(SCHEMES)}"
            )
    if schemes and schemes[0] not in like.gemm_tflops:  # nothing to keep a ratio to
        like = replace(like, gemm_tflops=dict.fromkeys(schemes, 1.0))
    model = _rounded(_solve(cells, like, schemes))
    errors = [_error_pct(model, cell) for cell in cells]
    left_out = []
    for place, cell in enumerate(cells):
        others = [*cells[:place], *cells[place + 1 :]]
        try:
            left_out.append(_error_pct(_solve(others, like, schemes), cell))
        except InputError:  # the cell alone tells one of the constants
            left_out.append(math.nan)
    contexts = [cell.context for cell in cells]
    sizes = [cell.shape.parameters for cell in cells]
    judged = [abs(error) for error in left_out if not math.isnan(error)]
    seen = Fitted(
        context=(min(contexts), max(contexts)),
        parameters=(min(sizes), max(sizes)),
        tensor_parallel=tuple(sorted({cell.tensor_parallel for cell in cells})),
        schemes=schemes,
        cells=len(cells),
        residual_pct=round(max(map(abs, errors)), 2),
        left_out_pct=round(max(judged), 2) if judged else None,
        hot=any(cell.hot or cell.items > 1 for cell in cells),
    )
    model = replace(model, name=name, source=source, fitted=seen)
    return Fit(model, list(cells), errors, left_out)


def _rounded(model: LatencyModel) -> LatencyModel:
    """Five digits: more would be noise, fewer would be seen in a prediction."""
    return replace(
        model,
        gemm_tflops={scheme: _digits(rate) for scheme, rate in model.gemm_tflops.items()},
        attention_tflops=_digits(model.attention_tflops),
        token_us=_digits(model.token_us),
        fixed_ms=_digits(model.fixed_ms),
    )


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


def _error_pct(model: LatencyModel, cell: Cell) -> float:
    return 100 * (model.prefill_ms(cell.shape, **cell.settings) / cell.ttft_ms - 1)


def _solve(cells: Sequence[Cell], like: LatencyModel, schemes: tuple[str, ...]) -> LatencyModel:
    """The constants that fit best; again while terms change between computing and reading."""
    model, bound = like, None
    for turn in range(20):
        rows = [_row(model, cell, schemes) for cell in cells]
        now = [row.by_rate for row in rows]
        if now == bound:
            break
        if turn == 0:
            _check_determined(rows, schemes)
        bound = now
        model = _with(like, schemes, _least_squares(rows, cells))
    return model


class _Row(NamedTuple):
    coefficients: list[float]  # ms per unit of each constant, in the order of `_with`
    known_ms: float  # what no fitted constant changes
    by_rate: list[bool]  # is gemm, is attention bound by its rate, of each forward pass


def _row(model: LatencyModel, cell: Cell, schemes: tuple[str, ...]) -> _Row:
    """The cell's time as a linear function of the constants."""
    settings = cell.settings
    ranks, scheme = settings.pop("tensor_parallel"), settings.pop("scheme")
    gemm = attention = tokens = known = 0.0
    by_rate: list[bool] = []
    works = prefill_works(cell.shape, ranks, scheme, **settings)
    for work in works:
        times = model.times(work, scheme)
        known += times.allreduce + times.elementwise
        tokens += work.new
        # A term that reading does not bound, or bounds no more than its rate, is the rate's.
        by_rate += [
            work.gemm_flops / model.gemm_tflops[scheme] / 1e9 >= model.weights_ms(work),
            work.attention_flops / model.attention_tflops / 1e9 >= model.cache_ms(work),
        ]
        gemm += work.gemm_flops / 1e9 * by_rate[-2]
        attention += work.attention_flops / 1e9 * by_rate[-1]
        known += times.gemm * (not by_rate[-2]) + times.attention * (not by_rate[-1])
    rates = [gemm * (scheme == one) for one in schemes]
    return _Row([*rates, attention, tokens / 1e3, float(len(works))], known, by_rate)


def _with(like: LatencyModel, schemes: tuple[str, ...], constants: np.ndarray) -> LatencyModel:
    """`like` with these constants: inverse rates of the schemes and of attention, us, ms."""
    *inverse, token_us, fixed_ms = constants.tolist()
    rates = [1 / one if one > 0 else math.inf for one in inverse]
    found = dict(zip(schemes, rates[:-1], strict=True))
    scale = rates[0] / like.gemm_tflops[schemes[0]]
    for scheme, rate in like.gemm_tflops.items():
        found.setdefault(scheme, rate * scale)
    return replace(
        like,
        gemm_tflops=found,
        attention_tflops=rates[-1],
        token_us=token_us,
        fixed_ms=fixed_ms,
    )


def _check_determined(rows: Sequence[_Row], schemes: tuple[str, ...]) -> None:
    """InputError where the measurements cannot tell the constants apart."""
    names = [*(f"gemm rate ({one})" for one in schemes), "attention rate", "token_us", "fixed_ms"]
    matrix = np.array([row.coefficients for row in rows])
    size = np.linalg.norm(matrix, axis=0)
    unseen = [name for name, one in zip(names, size, strict=True) if one == 0]
    if unseen:
        raise InputError(f"fit: no measurement depends on the {', '.join(unseen)}")
    # Noise of a percent must not move a constant by its own size.
    if len(rows) < len(names) or np.linalg.cond(matrix / size) > 1e4:
        raise InputError(
            f"fit: {len(rows)} measurements do not tell {', '.join(names)} apart, expected "
            f"at least {len(names)}, of several contexts and shapes"
        )


def _least_squares(rows: Sequence[_Row], cells: Sequence[Cell]) -> np.ndarray:
    """Constants >= 0 with the least sum of squared relative errors.

    With so few of them every choice of constants held at zero is tried: the best one whose others
    come out positive is the optimum. A constant that no row depends on any more stays at zero: its
    rate came out so high that reading bounds the term everywhere.
    """
    weight = 1 / np.array([cell.ttft_ms for cell in cells])
    matrix = np.array([row.coefficients for row in rows]) * weight[:, None]
    wanted = 1 - np.array([row.known_ms for row in rows]) * weight
    size = np.linalg.norm(matrix, axis=0)
    seen = size > 0
    matrix, size = matrix[:, seen] / size[seen], size[seen]
    best, least = np.zeros(seen.sum()), math.inf
    for kept in itertools.product((True, False), repeat=len(size)):
        some = np.array(kept)
        found = np.zeros(len(size))
        if some.any():
            found[some] = np.linalg.lstsq(matrix[:, some], wanted, rcond=None)[0]
        error = float(np.sum((matrix @ found - wanted) ** 2))
        if (found >= 0).all() and error < least:
            best, least = found, error
    constants = np.zeros(len(seen))
    constants[seen] = best / size
    return constants
