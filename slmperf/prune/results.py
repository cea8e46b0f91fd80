"""results: what a pruning did, layer by layer and in sum; as plain data it is a JSON file.

`PruneReport.to_json` and `from_json` are exact inverses but for the model, which is no plain data,
and figures that are not finite, which JSON does not have.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from slmperf.check import InputError
from slmperf.models.files import finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LayerPruned:
    """What happened to one linear layer. Errors are of its output on its calibration tokens.

    `curve` is empty for methods that do not eliminate one group after the other; it ends above
    `relative_error`, because it counts the damping.
    """

    name: str  # such as "model.layers.0.mlp.down_proj", "model.layers.0.mlp.experts.3.down_proj"
    method: str  # the one asked for, or "magnitude" for an expert that saw no token
    groups: int  # before
    group_size: int  # inputs in a group
    kept: tuple[int, ...]  # ascending
    order: tuple[int, ...]  # the groups removed, first to last, before any swaps
    energy: float  # 1/2 tr(W H W') of the layer before; in mode dense_target of its refit
    error: float  # 1/2 tr((W - V) H (W - V)'), H without damping
    relative_error: float  # error / energy; 0 where nothing flows
    curve: tuple[float, ...]  # relative error after each removal, damping included
    tokens: int
    gram_seconds: float  # its share of running the block and adding up
    solve_seconds: float


@dataclass(frozen=True)
class PruneReport:
    """The layers in the order in which they were pruned, and the model before and after."""

    model: PreTrainedModel | None = field(compare=False, repr=False)  # pruned; None if read back
    layers: tuple[LayerPruned, ...]
    tokens: int  # of the calibration set
    parameters_before: int
    parameters_after: int
    calibration_seconds: float  # before the first layer: in mode one_pass, the pass
    advance_seconds: float  # running the pruned blocks
    seconds: float  # in all
    peak_mib: float  # the most memory that the process held, since it began
    device_peak_mib: float | None  # tensors on the model's CUDA device; None without one
    settings: dict[str, Any]  # sizes, mode, method, damping, ...
    calibration: dict[str, Any]  # the calibration's manifest

    @property
    def forwards_seconds(self) -> float | None:
        """What no pruning block by block avoids: two passes of the text through the blocks (once
        for the Gram matrices, once to go on), taken as two of the second kind. None in mode
        one_pass, where there is but one, within the calibration.
        """
        return None if self.settings.get("mode") == "one_pass" else 2 * self.advance_seconds

    def to_json(self) -> str:
        """One JSON object; figures that are not finite become null."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        plain["layers"] = [asdict(layer) for layer in self.layers]
        return json.dumps(finite(plain), allow_nan=False, default=_plain) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PruneReport:
        """The inverse of to_json, without the model; InputError where the text is not one."""
        try:
            plain = json.loads(text)
            layers = tuple(LayerPruned(**_tuples(layer)) for layer in plain["layers"])
            return cls(model=None, **{name: plain[name] for name in _PLAIN}, layers=layers)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"pruning report: wanted what to_json wrote: {error!r}") from error


_PLAIN = [one.name for one in fields(PruneReport) if one.name not in ("model", "layers")]


def _tuples(layer: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(one) if isinstance(one, list) else one for key, one in layer.items()}


def _plain(value: Any) -> Any:
    """Sizes may be numbers or arrays of numpy's."""
    return value.tolist()
