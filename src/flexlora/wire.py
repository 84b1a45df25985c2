"""The one encoding of adapters between server and client: a safetensors message. Bytes are counted by its length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from flexlora.types import Adapter, FlexLoraError, LowRank, Sparse

PARTS = ("A", "B", "values")


def parts_of(x: LowRank | Sparse) -> dict[str, Tensor]:
    """The parts of one module's factors that can travel; a sparse index never does."""
    return {"values": x.values} if isinstance(x, Sparse) else {"B": x.B, "A": x.A}


def encode(adapter: Adapter, parts: Iterable[str] = PARTS, *, dtype: torch.dtype | None = None) -> bytes:
    """A safetensors message of the named parts, tensors called `{module}.{part}`, cast to `dtype` where one is given."""
    wanted = set(parts)
    tensors = {
        f"{module}.{part}": (tensor if dtype is None else tensor.to(dtype)).contiguous()
        for module, x in adapter.items()
        for part, tensor in parts_of(x).items()
        if part in wanted
    }
    return save({name: t.clone() for name, t in tensors.items()})


def decode(message: bytes) -> dict[str, dict[str, Tensor]]:
    """module -> part -> tensor. Raises FlexLoraError where the message is no safetensors file or names no part."""
    try:
        tensors = load(message)
    except SafetensorError as error:
        raise FlexLoraError(f"message is not safetensors: {error}") from None
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if not module or part not in PARTS:
            raise FlexLoraError(f"message has a tensor named {name!r}; names end in .A, .B or .values")
        modules.setdefault(module, {})[part] = tensor
    return modules


def complete(received: Mapping[str, Mapping[str, Tensor]], sent: Adapter) -> dict[str, LowRank | Sparse]:
    """The adapter of a message, with the parts that did not travel filled in from what was sent; float32."""
    adapter: dict[str, LowRank | Sparse] = {}
    for module, parts in received.items():
        origin = sent[module]
        if isinstance(origin, Sparse):
            adapter[module] = Sparse(parts["values"].float(), origin.index, origin.shape)
        else:
            B, A = (parts[p].float() if p in parts else getattr(origin, p) for p in ("B", "A"))
            # A client that pruned its rank sends fewer directions: the first ones.
            rank = min(B.shape[1], A.shape[0])
            adapter[module] = LowRank(B[:, :rank], A[:rank])
    return adapter


def cast(adapter: Adapter, dtype: torch.dtype) -> dict[str, LowRank | Sparse]:
    """The adapter as it arrives after travelling in `dtype`: rounded, and float32 again."""
    if dtype == torch.float32:
        return dict(adapter)
    return {
        module: x._replace(values=x.values.to(dtype).float())
        if isinstance(x, Sparse)
        else LowRank(x.B.to(dtype).float(), x.A.to(dtype).float())
        for module, x in adapter.items()
    }


def size(adapter: Adapter, parts: Iterable[str] = PARTS, *, dtype: torch.dtype | None = None) -> int:
    """Length in bytes of the message that `encode` makes."""
    return len(encode(adapter, parts, dtype=dtype))
