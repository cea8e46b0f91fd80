"""Linear layers with their rows and columns elsewhere, and zeros between: also quantised ones.

Codes move with the scales that they have. A weight stays exactly what it was where no scale comes
to be shared by channels that had different ones, which scales of groups and blocks can ask for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slmperf.check import InputError
from slmperf.models.engines.layout import HeadLayout, place
from slmperf.models.quantized import QuantizedLinear
from slmperf.models.structure import heads_of, neurons_of
from slmperf.ops.weight_spec import WeightSpec


class Move:
    """Where the channels of one side of a weight come from: groups of `size` neighbours in the
    order of `groups`; None: zeros."""

    def __init__(self, groups: Sequence[int | None], size: int = 1) -> None:
        self.groups, self.size = list(groups), size

    def __len__(self) -> int:
        return len(self.groups) * self.size

    def channels(self) -> Tensor:
        """The old channel of each new one, (n,) int64; -1: a zero."""
        starts = torch.tensor([-1 if group is None else group for group in self.groups])
        inside = torch.arange(self.size)
        return torch.where(starts[:, None] < 0, -1, starts[:, None] * self.size + inside).flatten()

    def scales(self, shared: int) -> list[int | None]:
        """Of channels of which `shared` neighbours have one scale: which of the old scales each new
        one is; None: any, for zeros alone.

        Raises InputError where one would have to be two of them.
        """
        old = self.channels()
        old = nn.functional.pad(old, (0, -len(old) % shared), value=-1).view(-1, shared)
        if self.size % shared == 0 or shared == 1:  # groups hold whole scales
            return [None if first < 0 else first // shared for first in old[:, 0].tolist()]
        found: list[int | None] = []
        for channels in old:
            scales = (channels[channels >= 0] // shared).unique().tolist()
            if len(scales) > 1:
                raise InputError(
                    f"{shared} channels share a scale, {self.size} move together: wanted whole "
                    "scales, or the move before quantising"
                )
            found.append(scales[0] if scales else None)
        return found


def moved(
    layer: nn.Module, rows: Move | None = None, columns: Move | None = None
) -> dict[str, Tensor]:
    """The tensors that a linear layer has in a checkpoint, with outputs (rows) and inputs moved;
    None: as they are.

    layer   nn.Linear or QuantizedLinear, (out, in)
    Raises InputError as `Move.scales` does.
    """
    bias = getattr(layer, "bias", None)
    if rows is not None and bias is not None:
        bias = _placed(bias, rows, 0)
    if not isinstance(layer, QuantizedLinear):
        weight = _both(layer.weight.detach(), rows, columns)
        return {"weight": weight} | ({} if bias is None else {"bias": bias.detach()})
    spec = layer.scheme.weights
    scale, zero_point = layer.scales
    codes = layer.codes
    raw = codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes
    codes = _both(raw, rows, columns).view(codes.dtype)
    down, across = _shared(spec, layer.in_features)
    for move, shared, dim in ((rows, down, 0), (columns, across, 1)):
        if move is None or shared is None:
            continue
        old = move.scales(shared)
        scale = _placed(scale, Move(old), dim)
        new = torch.tensor([at for at, one in enumerate(old) if one is None], dtype=torch.int64)
        scale.index_fill_(dim, new.to(scale.device), 1.0)
        if zero_point is not None:
            zero_point = _placed(zero_point, Move(old), dim)
    if zero_point is not None:  # the code of 0 is another one
        codes = _zeros_at(codes, spec, zero_point, rows, columns)
    made = QuantizedLinear(
        codes,
        scale,
        zero_point,
        None if bias is None else bias.detach(),
        scheme=layer.scheme,
        input_scale=layer.input_scale,
    )
    return dict(made.state_dict())


def block_tensors(block: nn.Module, layout: HeadLayout, neurons: int) -> dict[str, Tensor]:
    """A dense block's tensors by their names in it, heads where the layout puts them, and filled up
    with zeros to so many neurons.

    A query head that is added beside others of its key/value head is a copy of one of them without
    output columns: of queries of zeros the output is the mean of the values, which would change
    the scales that inputs of o are rounded with. Raises InputError, naming the layer, as
    `Move.scales` does.
    """
    tensors = dict(block.state_dict())
    have, size = neurons_of(block), block.self_attn.head_dim
    queries, keys = Move(layout.query_heads, size), Move(layout.kv_heads, size)
    filled = Move([*range(have), *[None] * (neurons - have)])
    stay = layout.keeps(heads_of(block))
    for name, rows, columns in (
        ("self_attn.q_proj", Move(_copies(layout), size), None),
        ("self_attn.k_proj", keys, None),
        ("self_attn.v_proj", keys, None),
        ("self_attn.o_proj", None, queries),
        ("mlp.gate_proj", filled, None),
        ("mlp.up_proj", filled, None),
        ("mlp.down_proj", None, filled),
    ):
        if stay if name.startswith("self_attn") else neurons == have:
            continue
        try:
            own = moved(block.get_submodule(name), rows, columns)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        tensors |= {f"{name}.{kind}": tensor for kind, tensor in own.items()}
    return tensors


def _copies(layout: HeadLayout) -> list[int | None]:
    """The query heads, and in the place of those that are added one that reads the same key/value
    head; None where the whole group is added, or where none is."""
    queries = list(layout.query_heads)
    if None not in queries:
        return queries
    group = len(queries) // len(layout.kv_heads)
    for start in range(0, len(queries), group):
        own = [head for head in queries[start : start + group] if head is not None]
        added = group - len(own)
        queries[start : start + group] = [*own, *own[:1] * added] if own else [None] * group
    return queries


def _shared(spec: WeightSpec, inputs: int) -> tuple[int | None, int | None]:
    """Outputs and inputs that share a scale; None: all of them."""
    if spec.block is not None:
        return spec.block
    if spec.group_size is None:
        return None, None
    group = spec.group_of(inputs)
    return 1, None if spec.group_size == -1 else group


def _both(weight: Tensor, rows: Move | None, columns: Move | None) -> Tensor:
    if rows is not None:
        weight = _placed(weight, rows, 0)
    return weight if columns is None else _placed(weight, columns, 1)


def _placed(tensor: Tensor, move: Move, dim: int) -> Tensor:
    return place(tensor.movedim(dim, 0), move.groups, move.size).movedim(0, dim).contiguous()


def _zeros_at(
    codes: Tensor, spec: WeightSpec, zero_point: Tensor, rows: Move | None, columns: Move | None
) -> Tensor:
    """Codes with the zero point where rows or columns are zeros."""
    shape = (codes.shape[0], codes.shape[1])
    zeros = torch.zeros(shape, dtype=torch.bool, device=codes.device)
    if rows is not None:
        zeros |= (rows.channels() < 0).to(zeros.device)[:, None]
    if columns is not None:
        zeros |= (columns.channels() < 0).to(zeros.device)[None]
    return torch.where(zeros, spec.spread(zero_point, shape), codes)
