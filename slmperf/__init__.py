"""slmperf turns a large teacher into a small, fast ranking model and measures what it costs.

Shapes are written in one legend everywhere:

    T tokens        V vocabulary       D hidden          F intermediate
    H query heads   G key/value heads  C head size       P page size
    M, N, K only inside matrix products

Submodules load on first use (`slmperf.ops`, `slmperf.prune`, ...); this file imports no torch.
"""

import importlib
import pkgutil
from types import ModuleType

__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    """Import the submodule `name` on first use (PEP 562)."""
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise  # the submodule is there; something that it needs is not
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    submodules = [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]
    return sorted([*globals(), *submodules])
