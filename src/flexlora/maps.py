"""Maps in YAML files, as people write them."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from flexlora.types import FlexLoraError


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one map, of which YAML's own loaders take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for name, _ in node.value:
            key = None if name.tag.endswith(":merge") else self.construct_object(name, deep=True)  # pyright: ignore[reportUnknownMemberType]
            if isinstance(key, Hashable) and key is not None:
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"{key} stands here twice", problem_mark=name.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


UNREADABLE = (
    OSError, yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError
)  # fmt: skip
"""What comes of text that is no YAML, or whose tags promise what it does not hold (`!!bool foo`, 2001-99-99)."""


def read_map(path: Path, what: str) -> dict[Any, Any]:
    """The map in a YAML file, {} for an empty one. Raises FlexLoraError, which asks for `what`, where there is none to be read."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except FileNotFoundError:
        raise FlexLoraError(f"{path}: no such file; give {what}") from None
    except IsADirectoryError:
        raise FlexLoraError(f"{path}: is a folder; give {what}") from None
    except UNREADABLE as error:
        raise FlexLoraError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())[:300]}") from None
    if values is not None and not isinstance(values, dict):
        raise FlexLoraError(f"{path}: holds no map of keys to values; write one `key: value` a line")
    return values or {}
