"""Names of number formats, of which only the bits are asked for: uint4b8 has 4."""

import re
from typing import NamedTuple


class ScalarType(NamedTuple):
    """One format."""

    name: str
    size_bits: int


class _ScalarTypes:
    def __getattr__(self, name):
        bits = re.search(r"\d+", name)
        if bits is None:
            raise AttributeError(name)
        return ScalarType(name, int(bits[0]))


scalar_types = _ScalarTypes()
