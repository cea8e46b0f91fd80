"""Stands in for torchvision, which has no wheel for this torch: SGLang's image processors name its
parts when they are imported, and no text model calls one.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

__version__ = "0.28.0"


class _Anything(MetaPathFinder, Loader):
    """Every submodule is there, and has every name."""

    def find_spec(self, name, path=None, target=None):
        inside = name.startswith(f"{__name__}.")
        return ModuleSpec(name, self, is_package=True) if inside else None

    def create_module(self, spec):
        return MagicMock(name=spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(_Anything())


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return importlib.import_module(f"{__name__}.{name}")
