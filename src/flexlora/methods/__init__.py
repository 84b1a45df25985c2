"""Every method under one contract; one file per paper. `flexlora methods` lists them.

Importing this package registers the built-in methods in the order of the list below.
"""

from flexlora.methods.base import MethodEntry, get_method, method_entry, methods, register
from flexlora.types import Method

# isort: split
from flexlora.methods import fedavg, flexlora  # noqa: F401  (each registers itself)

__all__ = ["Method", "MethodEntry", "get_method", "method_entry", "methods", "register"]
