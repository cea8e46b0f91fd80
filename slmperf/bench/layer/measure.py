"""measure: where the time of one Transformer block goes, part by part, pruned beside unpruned and
quantised beside bf16.

A prefill of `context` tokens, batch 1, or one decode step of several sequences; random weights, of
any shape; for tensor parallelism the share of one rank. Each part is measured alone, on the tensors
that it meets in the block, and the block as one call; variants are interleaved, so that a neighbour
disturbs all of them alike. The all-reduces are not measured but computed, as a ring at a given
bandwidth.

    part             time of the op alone
    sum of parts     of those that were measured
    block            all of them as one call, measured
    residue          block less sum: what the parts do to each other's caches and clocks
    all-reduce       simulated: two per layer, of T D bf16 numbers over the ranks
    attention block  qkv, rope, attention, o and one all-reduce
    layer            block and both all-reduces
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from slmperf.bench.layer.block import DTYPES, PARTS, SCHEMES, Block, random_weights
from slmperf.bench.layer.options import check_layers, choose_schemes
from slmperf.bench.results import check_device
from slmperf.check import InputError
from slmperf.models.shapes import Shape, shape_of
from slmperf.testing.timing import rotations, timings

if TYPE_CHECKING:
    from slmperf.bench.roof import Roof

ALLREDUCE = "all-reduce"
ATTENTION_BLOCK = ("qkv", "rope", "attention", "o")


class PartTime(NamedTuple):
    """One part of a layer: median and quartiles in microseconds, and the work.

    bytes and flops are the least that the part has to move and (in matrix products) to compute;
    `roof_share` is the share of the machine's roof for them, None where no roof was given. Those of
    the block are the sums of its parts': its roof is that of the parts one after the other.
    """

    part: str
    time_us: float
    low_us: float
    high_us: float
    samples: int  # 0: simulated
    bytes: int
    flops: int
    roof_share: float | None = None


class LayerTime(NamedTuple):
    """One layer's time on one rank, by part."""

    shape: Shape  # the whole layer's, not the rank's
    context: int
    tensor_parallel: int
    scheme: str
    dtype: str  # of the activations
    device: str
    parts: tuple[PartTime, ...]  # of PARTS, in their order; "quantise" only where there is one
    block: PartTime  # all of them as one call
    allreduce: PartTime  # both of them, simulated
    decode: int = 0  # sequences of a decode step; 0: a prefill
    beside: LayerTime | None = None  # the same layer in the first scheme

    @property
    def name(self) -> str:
        """Of its rows: shape, context, ranks and scheme, and the sequences of a decode step."""
        step = f"-decode{self.decode}" if self.decode else ""
        return f"{self.shape}-{self.context}-tp{self.tensor_parallel}-{self.scheme}{step}"

    @property
    def work(self) -> str:
        """In words what the layer does."""
        if not self.decode:
            return f"{self.context} tokens"
        return f"decode of {self.decode} at {self.context} tokens"

    @property
    def speed(self) -> float | None:
        """How many times as fast as in the first scheme."""
        return None if self.beside is None else self.beside.layer_us / self.layer_us

    def part_us(self, part: str) -> float:
        """Median of a part, 0 where the layer has none of that name."""
        return sum(one.time_us for one in (*self.parts, self.allreduce) if one.part == part)

    @property
    def sum_us(self) -> float:
        """Of the measured parts."""
        return sum(part.time_us for part in self.parts)

    @property
    def residue_us(self) -> float:
        """What the block as one call takes beyond its parts; below 0 where it takes less."""
        return self.block.time_us - self.sum_us

    @property
    def attention_block_us(self) -> float:
        """qkv, rope, attention, o and one of the two all-reduces."""
        return sum(map(self.part_us, ATTENTION_BLOCK)) + self.allreduce.time_us / 2

    @property
    def layer_us(self) -> float:
        """The block as one call, and both all-reduces."""
        return self.block.time_us + self.allreduce.time_us

    def rows(self) -> list[dict[str, Any]]:
        """Rows of a result file: every part, the block and the all-reduces."""
        common = {
            "shape": str(self.shape),
            "context": self.context,
            "tensor_parallel": self.tensor_parallel,
            "decode": self.decode,
            "scheme": self.scheme,
            "dtype": self.dtype,
        }
        rows = [
            {"name": f"{self.name}-{one.part}", **common, **one._asdict()}
            for one in (*self.parts, self.block, self.allreduce)
        ]
        if self.beside is not None:
            rows[-2] |= {f"times_{self.beside.scheme}": self.speed}
        return rows


def allreduce(shape: Shape, tokens: int, ranks: int, gbs: float | None = None) -> PartTime:
    """A layer's two all-reduces of tokens x D bf16 numbers, simulated: a ring, no latency.

    gbs   what each rank's links carry; that of the shipped model of four H100 if None
    """
    if gbs is None:
        from slmperf.plan import LatencyModel

        gbs = LatencyModel.preset("h100-paper").allreduce_gbs
    if not gbs > 0:
        raise InputError(f"all-reduce bandwidth is {gbs} GB/s, expected more than 0")
    moved = 2 * 2 * (ranks - 1) * tokens * shape.hidden * 2 // ranks
    time_us = moved / gbs * 1e-3
    return PartTime(ALLREDUCE, time_us, time_us, time_us, samples=0, bytes=moved, flops=0)


class _Subject:
    """One shape's block on tensors to rotate through, and the work of its parts.

    variants   part (or "block") -> a call per set of inputs
    work       part (or "block") -> bytes and flops
    """

    def __init__(
        self,
        rank: Shape,
        context: int,
        decode: int,
        scheme: str,
        dtype: str,
        device: str,
        seed: int,
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        weights = random_weights(rank, DTYPES[dtype], device, generator)
        self._block = Block(rank, weights, context, SCHEMES[scheme], decode)
        inputs = self._block.inputs(generator)
        self._tensors = self._block.trace(inputs)
        self._copies: dict[tuple[int, str], Tensor] = {}
        work = {part: self._work(part) for part in PARTS}
        self.work = {part: found for part, found in work.items() if found[0]}
        moved, computed = zip(*self.work.values(), strict=True)
        # By what a call reads: a graph's results reuse one another's memory.
        counts = {part: rotations(self._read(part), device) for part in self.work}
        self.variants = {
            part: [self._part_call(part, number) for number in range(count)]
            for part, count in counts.items()
        }
        self.work["block"] = sum(moved), sum(computed)
        self.variants["block"] = [
            self._block_call(inputs, number)
            for number in range(rotations(sum(one.nbytes for one in inputs.values()), device))
        ]

    def _read(self, part: str) -> int:
        """Bytes of the tensors that a part takes, weights among them."""
        names = {name for step in self._block.steps if step.part == part for name in step.takes}
        return sum(self._tensors[name].nbytes for name in names)

    def _work(self, part: str) -> tuple[int, int]:
        """Bytes (each tensor read or written once) and flops."""
        steps = [step for step in self._block.steps if step.part == part]
        names = [name for step in steps for name in (*step.takes, *step.gives)]
        moved = sum(self._tensors[name].nbytes for name in names)
        return moved, sum(step.flops for step in steps)

    def _copy(self, number: int, name: str) -> Tensor:
        """The block's own tensor, or for numbers from 1 on a copy, the same for every part."""
        tensor = self._tensors[name]
        if number and (number, name) not in self._copies:
            copy = torch.empty_strided(  # views keep the strides that they have in the block
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )
            self._copies[number, name] = copy.copy_(tensor)
        return self._copies[number, name] if number else tensor

    def _part_call(self, part: str, number: int) -> Callable[[], None]:
        """All steps of a part, on the tensors that they meet in the block."""
        steps = [step for step in self._block.steps if step.part == part]
        given = [(step.run, [self._copy(number, name) for name in step.takes]) for step in steps]

        def run() -> None:
            for function, tensors in given:
                function(*tensors)

        return run

    def _block_call(self, inputs: Mapping[str, Tensor], number: int) -> Callable[[], None]:
        block, tensors = self._block, {name: self._copy(number, name) for name in inputs}

        def run() -> None:
            block.run(tensors)

        return run


def measure_layers(
    shapes: Sequence[Shape | str | Path | Mapping[str, Any] | Any],
    context: int,
    *,
    tensor_parallel: int = 1,
    decode: int = 0,
    scheme: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    roof: Roof | None = None,
    allreduce_gbs: float | None = None,
    seconds: float = 1.0,
    seed: int = 0,
) -> list[LayerTime]:
    """Time one layer of each shape in each scheme, part by part and whole: in a prefill of
    `context` tokens, or a step that decodes one token of each of `decode` sequences of so many.

    shapes           each what `slmperf.models.shapes.shape_of` takes: "2.4b", a config, a folder;
                     all of them are in memory at once, and measured in turns
    tensor_parallel  ranks; the share of one of them is timed, the all-reduces are simulated
    scheme, dtype    see `choose_schemes`
    device           "auto", "cpu" or "cuda"
    roof             what `slmperf.bench.roof.roof(device)` found; no shares of it if None
    allreduce_gbs    see `allreduce`
    seconds          about, per part; never less than 5 rounds

    Raises InputError, one line, for sizes that cannot be, that do not suit the scheme, or that do
    not fit into memory, and for a scheme or device that is not there.
    """
    whole, device = [shape_of(shape) for shape in shapes], check_device(device)
    schemes = choose_schemes(scheme, dtype, device)
    ranks = check_layers(whole, context, tensor_parallel, schemes, device, decode)
    measured = [(shape, rank, *one) for shape, rank in zip(whole, ranks, strict=True)
                for one in schemes]  # fmt: skip
    exchanges = [
        allreduce(shape, decode or context, tensor_parallel, allreduce_gbs)
        for shape, *_ in measured
    ]

    with torch.inference_mode():
        subjects = [
            _Subject(rank, context, decode, own, kind, device, seed)
            for _, rank, own, kind in measured
        ]
        variants = {
            f"{number} {part}": calls
            for number, subject in enumerate(subjects)
            for part, calls in subject.variants.items()
        }
        found = timings(variants, device, seconds)
    works = [subject.work for subject in subjects]
    del variants, subjects
    if device == "cuda":
        torch.cuda.empty_cache()

    layers: list[LayerTime] = []
    for number, (shape, _, own, kind) in enumerate(measured):
        times = [
            PartTime(part, *found[f"{number} {part}"], *work)
            for part, work in works[number].items()
        ]
        if roof is not None:
            times = _with_shares(times, roof, SCHEMES[own].rate, kind)
        *parts, block = times
        first = number % len(schemes)
        layers.append(
            LayerTime(
                shape=shape,
                context=context,
                tensor_parallel=tensor_parallel,
                scheme=own,
                dtype=kind,
                device=device,
                parts=tuple(parts),
                block=block,
                allreduce=exchanges[number],
                decode=decode,
                beside=layers[number - first] if first else None,
            )
        )
    return layers


def _with_shares(times: Sequence[PartTime], roof: Roof, rate: str, dtype: str) -> list[PartTime]:
    """The parts and, last, the block, with their shares of the roof."""
    *parts, block = times
    if (roof.kind, rate) == ("cpu", "fp8"):  # whose codes are multiplied in bf16
        rate = "bf16"
    # Attention is computed in the activations' own format, in any scheme.
    ideals = [
        roof.ideal_us(one.bytes, one.flops, dtype if one.part == "attention" else rate)
        for one in parts
    ]
    ideals.append(sum(ideals))
    return [
        one._replace(roof_share=ideal / one.time_us)
        for one, ideal in zip(times, ideals, strict=True)
    ]


def measure_layer(
    shape: Shape | str | Path | Mapping[str, Any] | Any, context: int, **settings: Any
) -> LayerTime:
    """`measure_layers` of one shape in one scheme, with the same settings."""
    return measure_layers([shape], context, **settings)[0]
