"""Watching what flows into linear layers while a model, or a part of it, runs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from slmperf.calibrate.gram import Gram
from slmperf.calibrate.tokens import Tokens
from slmperf.check import InputError

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.down_proj")
# A block's parts, and the norms whose inputs the parts' outputs are added to.
_NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}


class _EnoughError(Exception):
    """All watched layers have had their inputs: the rest need not run."""


def pruned_layers(block: nn.Module) -> list[str]:
    """Names within a decoder block of the layers whose inputs pruning removes.

    They are self_attn.o_proj and mlp.down_proj; of a mixture, mlp.experts.<e>.down_proj of every
    expert.
    """
    experts = getattr(block.mlp, "experts", None)
    if experts is None:
        return ["self_attn.o_proj", "mlp.down_proj"]
    return ["self_attn.o_proj"] + [
        f"mlp.experts.{expert}.down_proj" for expert in range(len(experts.down_proj))
    ]


def group_size_of(name: str, sizes: Mapping[str, int]) -> int | None:
    """The group size of a layer: `sizes` by name, or by the last part of it."""
    return sizes.get(name, sizes.get(name.rpartition(".")[2]))


class Watch:
    """Hooks on named layers of a module.

    names are what `get_submodule` takes ("mlp.down_proj"), or "mlp.experts.<e>.down_proj" for one
    expert of a mixture, whose weights Transformers holds in one tensor for all experts.
    Raises InputError for a layer that is not there.
    """

    def __init__(self, root: nn.Module, names: Iterable[str]) -> None:
        self.names = list(names)
        self._root = root
        self._linear: dict[str, nn.Module] = {}
        self._experts: dict[str, dict[str, int]] = {}  # experts' module -> layer name -> expert
        for name in self.names:
            match = _EXPERT.fullmatch(name)
            if match and self._is_mixture(match[1], int(match[2])):
                self._experts.setdefault(match[1], {})[name] = int(match[2])
            else:
                self._linear[name] = self._submodule(name)

    def weight(self, name: str) -> Tensor:
        """The (N, d) weight of a watched layer."""
        for module, experts in self._experts.items():
            if name in experts:
                return self._submodule(module).down_proj[experts[name]]
        return self._linear[name].weight

    def grams(self, *, sizes: Mapping[str, int], target: bool, spill: Any) -> dict[str, Gram]:
        """Empty Gram matrices of the watched layers, on their devices."""
        return {
            name: Gram(
                weight.shape[1],
                group_size=group_size_of(name, sizes),
                outputs=weight.shape[0] if target else 0,
                device=weight.device,
                spill=spill,
            )
            for name in self.names
            for weight in [self.weight(name)]
        }

    @contextlib.contextmanager
    def inputs(self, take: Callable[[str, tuple[Tensor, ...]], object]) -> Iterator[None]:
        """For one run of the module: take(name, arguments) before each of the watched ones runs.

        The run ends with the last of them, and the `with` block with it. The name of an expert is
        that of the module of all experts.
        """
        modules = self._linear | {name: self._submodule(name) for name in self._experts}
        left = set(modules)

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def before(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                take(name, arguments)
                left.discard(name)
                if not left:
                    raise _EnoughError

            return before

        handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
        try:
            yield
        except _EnoughError:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def add(
        self,
        grams: Mapping[str, Gram],
        tokens: Tokens,
        dense: Dense | None,
        name: str,
        arguments: tuple[Tensor, ...],
    ) -> None:
        """Add what `inputs` gave (the last two) to the matrices of the module's layers.

        tokens: the batch's. dense: the same batch in the block whose outputs are the targets.
        """
        if name in self._linear:
            outputs = dense.outputs(name) if dense is not None else None
            grams[name].add_tokens(arguments[0], tokens, outputs)
            return
        hidden, chosen, router = arguments[:3]
        module = self._submodule(name)
        for layer, expert in self._experts[name].items():
            routed = tokens.routed(chosen == expert, router)
            rows = expert_inputs(module, expert, routed.select(hidden))
            outputs = dense.expert_outputs(name, expert, routed) if dense is not None else None
            grams[layer].add_tokens(rows, routed.alone(), outputs)

    def _is_mixture(self, name: str, expert: int) -> bool:
        """Whether a module holds all experts' weights in one tensor, that expert's too."""
        try:
            stacked = getattr(self._root.get_submodule(name), "down_proj", None)
        except AttributeError:
            return False
        return stacked is not None and expert < len(stacked)

    def _submodule(self, name: str) -> Any:
        try:
            return self._root.get_submodule(name)
        except AttributeError as error:
            raise InputError(
                f"calibrate: {type(self._root).__name__} has no layer {name}"
            ) from error


class Dense:
    """What the layers of a block are to give for one batch: what makes the dense model's hidden
    states of theirs.

    A layer's outputs y are added to a stream r (hidden states), which has drifted from the dense
    model's when layers before it are pruned. Wanted is y_dense + r_dense - r, so that the drift is
    made good, and not y_dense, which would carry it on.
    """

    def __init__(self, original: nn.Module) -> None:
        """original: the block as it is in the dense model."""
        self._original = original
        self._inputs: dict[str, Tensor] = {}
        self._streams: dict[str, dict[str, Tensor]] = {"dense": {}, "own": {}}

    def note(self, name: str, arguments: tuple[Tensor, ...]) -> None:
        """Keep a module's first argument in the dense block; what `Watch.inputs` calls."""
        self._inputs[name] = arguments[0]

    @contextlib.contextmanager
    def streams(self, which: str, block: nn.Module) -> Iterator[None]:
        """For one run of a block, "dense" or "own": note what its two parts are added to."""
        found = self._streams[which]

        def hook(part: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda module, arguments: found.update({part: arguments[0]})

        handles = [
            block.get_submodule(norm).register_forward_pre_hook(hook(part))
            for part, norm in _NORMS.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def outputs(self, name: str) -> Tensor:
        """What a linear layer is to give, (B, T, N), without its bias."""
        weight = self._original.get_submodule(name).weight
        outputs = nn.functional.linear(self._inputs[name], weight)
        return (outputs.float() + self._drift(name)).to(outputs.dtype)

    def expert_outputs(self, name: str, expert: int, routed: Tokens) -> Tensor:
        """What an expert is to give for its tokens, (n, N): what it makes of the dense inputs, and
        the drift. The router's weights of a token sum to 1, so the drift is made good once.
        """
        module: Any = self._original.get_submodule(name)
        rows = expert_inputs(module, expert, routed.select(self._inputs[name]))
        outputs = nn.functional.linear(rows, module.down_proj[expert])
        drift = routed.select(self._drift(name).flatten(0, 1))
        return (outputs.float() + drift).to(outputs.dtype)

    def _drift(self, name: str) -> Tensor:
        """r_dense - r of a layer's part of the block, (B, T, N) fp32."""
        part = name.partition(".")[0]
        return self._streams["dense"][part].float() - self._streams["own"][part].float()


def expert_inputs(experts: Any, expert: int, hidden: Tensor) -> Tensor:
    """What flows into down_proj of one expert: (n, D) -> (n, F)."""
    both = nn.functional.linear(hidden, experts.gate_up_proj[expert])
    gate, up = both.chunk(2, dim=-1)
    return experts.act_fn(gate) * up


def check(grams: Mapping[str, Gram], within: str = "") -> None:
    """InputError for a layer (`within` + its name) without tokens, or with values not finite.

    An expert may go without tokens as long as another one of its block has some.
    """
    seen: dict[str, int] = {}
    for name, gram in grams.items():
        match = _EXPERT.fullmatch(name)
        layer = match[1] if match else name
        seen[layer] = seen.get(layer, 0) + gram.tokens
        if not gram.finite:
            raise InputError(
                f"calibrate: {within}{name}: wanted finite inputs, found some that are not"
            )
    for layer, tokens in seen.items():
        if not tokens:
            raise InputError(
                f"calibrate: wanted at least one calibration token for {within}{layer}, found none"
            )
