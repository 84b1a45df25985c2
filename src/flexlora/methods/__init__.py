"""Every method under one contract; one file per paper. `flexlora methods` lists them.

Importing this package registers the built-in methods in the order of the list below.
"""

from flexlora.methods.base import MethodEntry, get_method, method_entry, methods, register
from flexlora.types import Method

# isort: split
from flexlora.methods import (  # noqa: F401, I001  (each registers itself, in this order)
    fedavg,
    flexlora,
    carry,
    raflora,
    hetlora,
    slora,
    flora,
    fedex,
    ffa,
    rolora,
    fedsa,
    rbla,
    florist,
)

__all__ = ["Method", "MethodEntry", "get_method", "method_entry", "methods", "register"]
