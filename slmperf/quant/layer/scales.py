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
    weights = (diagonal / diagonal.mean().clamp(min=1e-30)).float()
    step = max(1, _CHUNK[weight.device.type] // inputs)
    found = [
        _searched(weight[start : start + step].detach().float(), weights, spec, dtype)
        for start in range(0, outputs, step)
    ]
    scale = torch.cat([one.scale for one in found])
    zeros = [one.zero_point for one in found if one.zero_point is not None]
    return Scales(scale, torch.cat(zeros) if zeros else None)


def _searched(weight: Tensor, weights: Tensor, spec: WeightSpec, dtype: torch.dtype) -> Scales:
    """The same for some outputs, fp32, of inputs that weigh `weights` (in,) fp32."""
    shape = (weight.shape[0], weight.shape[1])
    scale, zero_point = spec.scales(weight, dtype)
    least = torch.full_like(scale, float("inf"), dtype=torch.float32)
    for factor in [1.0, *_FACTORS]:
        tried = spec.scales(weight, dtype, shrink=factor)
        made = spec.decode(spec.encode(weight, tried), tried._replace(scale=tried.scale.float()))
        error = made.sub_(weight).square_().mul_(weights).view(*spec.scale_shape(shape), -1).sum(2)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, tried.scale, scale)
        if tried.zero_point is not None and zero_point is not None:
            zero_point = torch.where(better, tried.zero_point, zero_point)
    return Scales(scale, zero_point)


def refit_scales(columns: Columns, scales: Scales) -> Scales:
    """The scales that suit the codes of `columns`, group after group, rounded as they are stored.

    A group whose error would not fall keeps its scale. columns moves to the new values.
    """
    size = columns.spec.group_of(len(columns.order))
    scale = scales.scale.clone()
    place = torch.argsort(columns.order)  # where each input is processed
    for group in range(scale.shape[1]):
        members = place[group * size : (group + 1) * size]
        old = scale[:, group].float()
        code = columns.whole_steps(members)
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
