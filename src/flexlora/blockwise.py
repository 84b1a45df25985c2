"""Causal attention, softmax(q kᵀ · scale) v, block by block of queries.

A block is multiplied with the keys that it sees alone, so that a row costs little more than half of its square, and all heads
that have their keys in common are one product. Torch's kernels for a processor compute whole squares, in bfloat16 from tiny
blocks on their way back (docs/log.md has the figures). Scores and softmax are float32 in every precision but float64. Nothing
is kept for the way back but what came in and what went out: the softmax is made twice.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexlora.processor import multiplies_bfloat16
from flexlora.products import empty
from flexlora.rows import Shared

ROWS = 96
"""Queries of a block at most: in smaller ones less is computed in vain, but every block has a dozen small operations."""
SCORES = 2**20
"""Scores of a block at most, over all heads: there may be fewer queries for it."""


class Block(NamedTuple):
    """Some tokens of a row and what they see."""

    rows: slice
    keys: tuple[slice, ...]
    """Of all keys, those in front of the row first."""
    hidden: Tensor | None
    """(heads that have a key head in common · tokens, n) float32, 0 or -inf: what is added to the scores of the last n keys."""


@functools.lru_cache(maxsize=16)
def blocks(shared: Shared, heads: int, each: int) -> list[Block]:
    """How the tokens of a row attend that lies as `shared` says, in all layers of `heads`, `each` to a key head."""
    ends = list(itertools.accumulate(shared.own, initial=shared.beginning))
    found: list[Block] = []
    with torch.inference_mode(False):
        mask = shared.mask()[0, 0]
        length, keys = mask.shape
        most = max(16, min(ROWS, SCORES // (heads * keys)))
        at = 0
        while at < length:
            # A block ends where a sequence does if that is near: fewer scores are thrown away.
            near = [end for end in ends if at + most // 2 < end <= at + most]
            rows = slice(at, max(near, default=min(at + most, length)))
            columns = mask[rows].any(0).nonzero().flatten()
            runs = columns.tensor_split((columns.diff() > 1).nonzero().flatten() + 1)
            seen = mask[rows, columns]
            some = (~seen).any(0).nonzero().flatten().tolist()
            hidden = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, some[0] :] if some else None
            places = tuple(slice(int(run[0]), int(run[-1]) + 1) for run in runs)
            found.append(Block(rows, places, None if hidden is None else hidden.repeat_interleave(each, 0)))
            at = rows.stop
    return found


def attention(q: Tensor, k: Tensor, v: Tensor, plan: Sequence[Block], scale: float) -> Tensor:
    """What the tokens attend to, (batch, heads, length, d), which lies in memory token by token.

    q is (batch, heads, length, d); k and v are (batch, key heads, keys, d or another), those in front of the row first.
    """
    batch, groups = k.shape[:2]
    wide, exact = _precisions(q)
    queries, keys, values = _grouped(q, groups).to(wide), k.flatten(0, 1).to(wide), v.flatten(0, 1).to(exact)
    y = torch.empty(*queries.shape[:2], v.shape[-1], dtype=exact)
    for block in plan:
        of = _rows(block, q.shape[1] // groups)
        shares = _softmax(queries[:, of], _seen(keys, block), block, scale)
        torch.bmm(shares.to(exact), _seen(values, block), out=y[:, of])
    return _heads(y, batch, q.shape[1], q.dtype)


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, plan: Sequence[Block], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of q, k and v, of the output y's; all as in `attention`, and of keys and values in float32."""
    batch, groups = k.shape[:2]
    wide, exact = _precisions(q)
    queries, keys, values = _grouped(q, groups), k.flatten(0, 1), v.flatten(0, 1).to(exact)
    wide_queries, wide_keys, queries, keys = queries.to(wide), keys.to(wide), queries.to(exact), keys.to(exact)
    mean = _grouped((grad.to(wide) * y).sum(-1, keepdim=True), groups)
    grad = _grouped(grad, groups).to(exact)
    dq = torch.empty_like(queries)
    dk, dv = (torch.zeros(x.shape, dtype=wide) for x in (keys, values))
    for block in plan:
        of = _rows(block, q.shape[1] // groups)
        shares = _softmax(wide_queries[:, of], _seen(wide_keys, block), block, scale)
        ds = torch.bmm(grad[:, of], _seen(values, block).transpose(1, 2)).to(wide)
        ds = ds.sub_(mean[:, of]).mul_(shares).to(exact)
        torch.bmm(ds, _seen(keys, block), out=dq[:, of])
        _add(dk, ds, queries[:, of], block)
        _add(dv, shares.to(exact), grad[:, of], block)
    dq = _heads(dq, batch, q.shape[1], q.dtype).mul_(scale)
    return dq, dk.mul_(scale).unflatten(0, (batch, groups)), dv.unflatten(0, (batch, groups))


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(batch, heads, length, d) -> (batch · key heads, length · heads each, d): what has its keys in common is one matrix."""
    x = x.unflatten(1, (groups, -1)).transpose(2, 3)
    return x.reshape(x.shape[0] * groups, -1, x.shape[-1])


def _heads(x: Tensor, batch: int, heads: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `_grouped`, which lies in memory token by token."""
    groups = len(x) // batch
    x = x.view(batch, groups, -1, heads // groups, x.shape[-1]).transpose(1, 2)  # (batch, length, key heads, each, d)
    y = empty(*x.shape) if dtype == torch.float32 else torch.empty(x.shape, dtype=dtype)
    return y.copy_(x).flatten(2, 3).transpose(1, 2)


def _rows(block: Block, each: int) -> slice:
    return slice(block.rows.start * each, block.rows.stop * each)


def _seen(x: Tensor, block: Block) -> Tensor:
    """Of keys or values (batch · key heads, keys, d) those that it sees."""
    parts = [x[:, place] for place in block.keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _add(total: Tensor, a: Tensor, b: Tensor, block: Block) -> None:
    """Add aᵀ b to what it sees; a (batch · key heads, rows, keys seen), b (batch · key heads, rows, d)."""
    if len(block.keys) == 1 and a.dtype == total.dtype:
        total[:, block.keys[0]].baddbmm_(a.transpose(1, 2), b)
        return
    found = torch.bmm(a.transpose(1, 2), b).split([place.stop - place.start for place in block.keys], 1)
    for place, part in zip(block.keys, found, strict=True):
        total[:, place] += part


def _softmax(queries: Tensor, keys: Tensor, block: Block, scale: float) -> Tensor:
    """(batch · key heads, rows, keys)"""
    scores = torch.baddbmm(queries.new_empty(()), queries, keys.transpose(1, 2), beta=0, alpha=scale)
    if block.hidden is not None:
        scores[..., -block.hidden.shape[1] :].add_(block.hidden)
    return scores.softmax(-1)


def _precisions(x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Those of scores, and of the products that come after them."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return wide, x.dtype if x.dtype == torch.bfloat16 and multiplies_bfloat16() else wide
