"""scales: which scales a weight's groups get, by what the layer's inputs weigh.

Two steps beside min-max, for grids whose scales belong to one output each:

    search   before rounding: the range shrunk by the factor that minimises
             sum_j H_jj (w_j - nearest(w_j))^2 over the group, the unshrunk range among them
    refit    after it: the scale that is best for the codes as they are, in closed form,
             s <- s + (E H)_g c / (c' H_gg c)   with c the group's codes less the zero point
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slmperf.ops.weight_spec import Scales, WeightSpec, stored

if TYPE_CHECKING:
    from slmperf.quant.layer.columns import Columns

_FACTORS = torch.linspace(1.0, 0.5, 41)[1:].tolist()
# Values looked at together, by device: a processor keeps them and what is made of them in its
# caches; a GPU wants few launches.
_CHUNK = {"cpu": 2**17, "cuda": 2**26}


def search_scales(weight: Tensor, diagonal: Tensor, spec: WeightSpec, dtype: torch.dtype) -> Scales:
    """Scales for `weight` (out, in) whose inputs weigh `diagonal` (in,) >= 0, stored in `dtype`."""
    outputs, inputs = weight.shape
    first = spec.scales(weight, dtype)
    groups = spec.scale_shape((outputs, inputs))[1]
    weights = (diagonal / diagonal.mean().clamp(min=1e-30)).float().view(1, groups, -1)
    scale, zero_point = first.scale.clone(), None
    if first.zero_point is not None:
        zero_point = first.zero_point.clone()
    step = max(1, _CHUNK[weight.device.type] // inputs)
    for start in range(0, outputs, step):
        rows = slice(start, start + step)
        part = weight[rows].detach().float().view(-1, groups, inputs // groups)
        high, low = part.amax(2), part.amin(2)
        least = torch.full_like(high, float("inf"))
        for factor in [1.0, *_FACTORS]:
            if spec.symmetric:
                top = (spec.highest - spec.lowest) / 2 if spec.kind == "int" else spec.highest
                tried = stored(torch.maximum(high, -low) * (factor / top), dtype)
                zeros = None
            else:
                below = low.clamp(max=0.0) * factor
                span = high.clamp(min=0.0) * factor - below
                tried = stored(span / (spec.highest - spec.lowest), dtype)
                zeros = (spec.lowest - below / tried.float()).clamp(spec.lowest, spec.highest)
                zeros = zeros.round()
            wide = tried.float()[..., None]
            code = part / wide
            if spec.kind == "float":
                code = code.clamp_(spec.lowest, spec.highest).to(torch.float8_e4m3fn).float()
            elif zeros is None:
                code = code.round_().clamp_(spec.lowest, spec.highest)
            else:
                code = code.round_().add_(zeros[..., None]).clamp_(spec.lowest, spec.highest)
                code -= zeros[..., None]
            code.mul_(wide).sub_(part).square_().mul_(weights)
            error = code.sum(2)
            better = error < least
            least = torch.where(better, error, least)
            scale[rows] = torch.where(better, tried, scale[rows])
            if zeros is not None and zero_point is not None:
                zero_point[rows] = torch.where(better, zeros.to(torch.int8), zero_point[rows])
    return Scales(scale, zero_point)


def refit_scales(columns: Columns, scales: Scales) -> Scales:
    """The scales that suit the codes of `columns`, group after group, rounded as they are stored.

    A group whose error would not fall keeps its scale. columns moves to the new values.
    """
    spec, inputs = columns.spec, len(columns.order)
    size = spec.group_of(inputs)
    scale = scales.scale.clone()
    place = torch.argsort(columns.order)  # where each input is processed
    for group in range(scale.shape[1]):
        members = place[group * size : (group + 1) * size]
        old = scale[:, group].float()
        code = columns.current[members] / old
        code = code.round_() if spec.kind == "int" else code.to(torch.float8_e4m3fn).float()
        rows = columns.gram[members]
        gain = ((rows @ columns.error) * code).sum(0)
        curvature = ((rows[:, members] @ code) * code).sum(0)
        wanted = old + torch.where(curvature > 0, gain / curvature, 0.0)
        new = stored(wanted.clamp(min=0.0, max=torch.finfo(scale.dtype).max), scale.dtype)
        step = new.float() - old
        falls = (wanted > 0) & (step * (step * curvature - 2 * gain) < 0)
        new = torch.where(falls, new, scale[:, group])
        scale[:, group] = new
        columns.current[members] = code * new.float()
        columns.error[members] = columns.weight[members] - columns.current[members]
    return scales._replace(scale=scale)
