"""heads: which attention heads a pruned model may have, and the units a solver removes for them.

    kv_group   whole key/value heads with all query heads that read them: the ratio stays, the cache
               shrinks, stock engines run it
    uniform    the same number of query heads leaves every key/value head, which all stay: stock
               engines run it, the cache stays as it is
    free       any query heads. The layer's head map (slmperf.ops.head_map) says who reads what;
               key/value heads that nobody reads any more leave too

With H query heads over G key/value heads only these exist: 12 of 24 query heads cannot stay with 8
key/value heads, because 12 / 8 is no whole number of readers. Requests are refused here, before
anything is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from slmperf.check import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Mode = Literal["kv_group", "uniform", "free"]
MODES: tuple[Mode, ...] = get_args(Mode)


class HeadGroups(NamedTuple):
    """What `osscar` is asked for one layer's o_proj, in units of whole heads."""

    group_size: int  # input columns of o_proj per group
    keep: int  # groups that stay
    families: Tensor | None  # (m,) int64: as many groups leave each family; None: no such rule
    mode: Mode
    readers: int  # query heads of each key/value head before

    def heads(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The groups kept (k,), ascending -> query heads and key/value heads kept, int64."""
        if self.mode == "kv_group":
            queries = kept[:, None] * self.readers + torch.arange(self.readers)
            return queries.reshape(-1), kept
        return kept, (kept // self.readers).unique()  # ascending


class HeadPlan(NamedTuple):
    """Heads after pruning, one number per layer.

    In mode "free" the key/value heads are what may stay at most: how many are still read depends on
    which query heads leave.
    """

    mode: Mode
    attention_heads: tuple[int, ...]
    key_value_heads: tuple[int, ...]
    head_size: int
    before: tuple[tuple[int, int], ...]  # (query heads, key/value heads) of each layer

    def prunes(self, layer: int) -> bool:
        """Whether this layer loses heads."""
        return self.attention_heads[layer] < self.before[layer][0]

    def groups(self, layer: int) -> HeadGroups:
        """What the solver is asked for in this layer."""
        queries, keys = self.before[layer]
        readers = queries // keys
        if self.mode == "kv_group":
            size, keep = readers * self.head_size, self.key_value_heads[layer]
            return HeadGroups(size, keep, None, self.mode, readers)
        families = torch.arange(queries) // readers if self.mode == "uniform" else None
        keep = self.attention_heads[layer]
        return HeadGroups(self.head_size, keep, families, self.mode, readers)


def plan_heads(
    config: PretrainedConfig,
    *,
    attention_heads: int | Sequence[int | None] | None = None,
    key_value_heads: int | Sequence[int | None] | None = None,
    heads: str = "kv_group",
) -> HeadPlan:
    """The heads of every layer after pruning, or InputError with the nearest that are possible.

    config: of the model before; layers may differ (see `layer_sizes`).
    attention_heads, key_value_heads: wanted, a number for all layers or one per layer. In mode
        kv_group either follows from the other; uniform and free keep all key/value heads. None for
        both: nothing leaves.
    heads: of MODES.

    The message of a refused request names the layer where layers differ, the reason, and the
    nearest legal counts as query heads / key/value heads.
    """
    from slmperf.models.structure import head_size

    if heads not in MODES:
        raise InputError(f"heads: wanted one of {', '.join(MODES)}, found {heads!r}")
    mode: Mode = heads
    have = list(
        zip(
            layer_sizes(config, "num_attention_heads"),
            layer_sizes(config, "num_key_value_heads"),
            strict=True,
        )
    )
    queries = per_layer("attention_heads", attention_heads, len(have))
    keys = per_layer("key_value_heads", key_value_heads, len(have))
    alike = len({*zip(have, queries, keys, strict=True)}) == 1
    found = []
    mapped = head_maps(config)
    for layer, (before, query, key) in enumerate(zip(have, queries, keys, strict=True)):
        where = "heads" if alike else f"heads: layer {layer}"
        if mapped[layer] and (query, key) != (None, None):
            raise InputError(
                f"{where}: wanted equally many query heads on every key/value head, found a head "
                f"map of {before[0]} on {before[1]}: such a layer only loses neurons"
            )
        found.append(_legal(where, before, query, key, mode))
    return HeadPlan(
        mode,
        tuple(query for query, _ in found),
        tuple(key for _, key in found),
        head_size(config),
        tuple(have),
    )


def legal_heads(attention_heads: int, key_value_heads: int, mode: Mode) -> list[tuple[int, int]]:
    """All (query heads, key/value heads) that pruning can leave in this mode, smallest first."""
    readers = attention_heads // key_value_heads
    if mode == "kv_group":
        return [(readers * keys, keys) for keys in range(1, key_value_heads + 1)]
    if mode == "uniform":
        return [(each * key_value_heads, key_value_heads) for each in range(1, readers + 1)]
    return [(queries, key_value_heads) for queries in range(1, attention_heads + 1)]


def layer_sizes(config: PretrainedConfig, name: str) -> list[int]:
    """A size of the config for every layer, where `per_layer_config` says that they differ too."""
    if getattr(config, "is_heterogeneous", False):
        return [int(getattr(layer, name)) for layer in config.per_layer_config]
    value = getattr(config, name, None)
    if value is None and name == "num_key_value_heads":  # no grouped queries: each has its own
        value = config.num_attention_heads
    if value is None:
        raise InputError(f"{type(config).__name__}: wanted {name}, found none")
    return [int(value)] * config.num_hidden_layers


def head_maps(config: PretrainedConfig) -> list[bool]:
    """Of every layer, whether its key/value heads have unequally many readers."""
    layers = [config] * config.num_hidden_layers
    if getattr(config, "is_heterogeneous", False):
        layers = config.per_layer_config
    return [getattr(layer, "head_map", None) is not None for layer in layers]


def per_layer(
    what: str, wanted: int | Sequence[int | None] | None, layers: int
) -> list[int | None]:
    """A size for every layer, from one for all or a list; None is no wish.

    Raises InputError for another number of them, and for what is no whole number.
    """
    single = wanted is None or not isinstance(wanted, Iterable)
    sizes: list[Any] = [wanted] * layers if single else list(cast(Iterable[Any], wanted))
    if len(sizes) != layers:
        raise InputError(
            f"{what}: wanted one number for each of {layers} layers, found {len(sizes)}"
        )
    for size in sizes:
        if size is not None and (isinstance(size, bool) or not isinstance(size, Integral)):
            raise InputError(f"{what}: wanted whole numbers, found {size!r}")
    return [None if size is None else int(size) for size in sizes]


def _legal(
    where: str, before: tuple[int, int], query: int | None, key: int | None, mode: Mode
) -> tuple[int, int]:
    """The one legal pair of this mode that fits the request."""
    if query is None and key is None:
        return before
    legal = legal_heads(*before, mode)
    fits = [pair for pair in legal if query in (None, pair[0]) and key in (None, pair[1])]
    if fits:
        return fits[-1]  # where only the key/value heads are named, all query heads stay
    raise InputError(f"{where}: {_reason(before, query, key, mode)}; nearest legal: "
                     f"{_nearest(before, query, key)}")  # fmt: skip


def _reason(before: tuple[int, int], query: int | None, key: int | None, mode: Mode) -> str:
    for what, count, most in (
        ("query", query, before[0]),
        ("key/value", key, before[1]),
    ):
        if count is not None and not 1 <= count <= most:
            return f"wanted {count} {what} heads, the model has {most}"
    readers = before[0] // before[1]
    if mode == "kv_group" and key is None:
        return f"{query} query heads are no whole groups of {readers} that share a key/value head"
    keys = before[1] if key is None else key
    if mode == "kv_group":
        return (
            f"{query} query heads over {keys} KV heads are no whole groups, "
            f"which have {readers} query heads each"
        )
    if keys != before[1]:
        return f"mode {mode} keeps all {before[1]} KV heads, wanted {keys}"
    return f"{query} query heads over {keys} KV heads is no legal {mode} model"


def _nearest(before: tuple[int, int], query: int | None, key: int | None) -> str:
    """Per mode the exact count, or the next above and below, such as "12/4, 16/8, 8/8"."""
    readers = before[0] // before[1]
    wanted = query if query is not None else (key or 1) * readers
    found, modes = [], []
    for mode in ("kv_group", "uniform"):
        legal = legal_heads(*before, mode)
        exact = [pair for pair in legal if pair[0] == wanted]
        above = [pair for pair in legal if pair[0] > wanted][:1]
        below = [pair for pair in legal if pair[0] < wanted][-1:]
        pairs = [f"{q}/{k}" for q, k in (exact or above + below)]
        found += [pair for pair in pairs if pair not in found]
        modes.append(f"{mode}: {', '.join(pairs)}")
    return f"{', '.join(found)} ({'; '.join(modes)})"
