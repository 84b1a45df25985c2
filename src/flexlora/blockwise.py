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
    before: tuple[slice, ...]
    """Keys in front of the row."""
    own: tuple[slice, ...]
    """Keys of the row, ascending."""
    hidden: Tensor | None
    """(tokens, n) float32, 0 or -inf: what is added to the scores of the last n of all these keys."""


@functools.lru_cache(maxsize=16)
def blocks(shared: Shared, heads: int) -> list[Block]:
    """How the tokens of a row attend that lies as `shared` says; the same for every layer."""
    starts = list(itertools.accumulate(shared.own, initial=shared.beginning))
    length, front = starts[-1], shared.before + shared.cut_off
    most = max(16, min(ROWS, SCORES // (heads * (front + length))))
    with torch.inference_mode(False):
        sizes = torch.tensor([shared.beginning, *shared.own])
        whose = torch.arange(len(sizes)).repeat_interleave(sizes)
        found: list[Block] = []
        at = 0
        while at < length:
            # A block ends where a sequence does if that is near: fewer scores are thrown away.
            near = [end for end in starts if at + most // 2 < end <= at + most]
            rows = slice(at, max(near, default=min(at + most, length)))
            found.append(_block(shared, whose, rows, [x for x in starts[:-1] if x <= at]))
            at = rows.stop
    return found


def _block(shared: Shared, whose: Tensor, rows: slice, begun: Sequence[int]) -> Block:
    """`whose`: number of each token's sequence, 0 for the beginning; `begun`: where those begin that do so by the block's first token."""
    cut = shared.cut_off if not shared.own or rows.start < shared.beginning + shared.own[0] else 0
    before = tuple(x for x, n in ((slice(shared.before), shared.before), (slice(-cut, None), cut)) if n)
    # A sequence right behind the beginning is one with it.
    first = max((x for x in begun if x > shared.beginning), default=0)
    own = tuple(x for x in (slice(0, shared.beginning * (first > 0)), slice(first, rows.stop)) if x.stop)
    keys = torch.cat([torch.arange(x.start, x.stop) for x in own])
    tokens = torch.arange(rows.start, rows.stop)[:, None]
    seen = (keys <= tokens) & ((whose[keys] == whose[tokens]) | (whose[keys] == 0))
    if cut:
        seen = torch.cat([(whose[tokens] == 1).expand(-1, cut), seen], 1)
    some = (~seen).any(0).nonzero().flatten().tolist()
    hidden = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, some[0] :].contiguous() if some else None
    return Block(rows, before, own, hidden)


def attention(q: Tensor, k: Tensor, v: Tensor, before: Sequence[Tensor], plan: Sequence[Block], scale: float) -> Tensor:
    """What the tokens attend to, (batch, heads, length, d), which lies in memory token by token.

    q is (batch, heads, length, d), k and v are (batch, key heads, length, d or another); `before` is empty, or keys and values
    (batch, key heads, any length, the same) in front of the row.
    """
    batch, heads, length, _ = q.shape
    shape = batch, length, heads, v.shape[-1]
    y = (empty(*shape) if q.dtype == torch.float32 else torch.empty(shape, dtype=q.dtype)).transpose(1, 2)
    exact = _precision(q)
    for block in plan:
        keys, values = _seen(k, before[:1], block), _seen(v, before[1:], block)
        shares = _softmax(_of(block, q, k), keys, block, scale)
        y[:, :, block.rows] = torch.bmm(shares.to(exact), values.to(exact)).view(batch, heads, -1, v.shape[-1])
    return y


def gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    before: Sequence[Tensor],
    plan: Sequence[Block],
    scale: float,
) -> list[Tensor]:
    """Those of q, k, v and what is `before`, of the output y's; all as in `attention`, and of keys and values in float32."""
    exact, dq = _precision(q), torch.empty_like(q)
    totals = [torch.zeros(x.shape, dtype=_wide(q)) for x in (k, v, *before)]
    for block in plan:
        keys, values = _seen(k, before[:1], block), _seen(v, before[1:], block)
        queries, g = _of(block, q, k), _of(block, grad, k)
        shares = _softmax(queries, keys, block, scale)
        mean = (g.to(shares.dtype) * _of(block, y, k)).sum(-1, keepdim=True)
        g, queries = g.to(exact), queries.to(exact)
        ds = torch.bmm(g, values.to(exact).transpose(1, 2)).to(shares.dtype).sub_(mean).mul_(shares).to(exact)
        dq[:, :, block.rows] = torch.bmm(ds, keys.to(exact)).mul_(scale).view(dq[:, :, block.rows].shape)
        _add(totals[0::2], torch.bmm(ds.transpose(1, 2), queries), block)
        _add(totals[1::2], torch.bmm(shares.to(exact).transpose(1, 2), g), block)
    for total in totals[0::2]:
        total.mul_(scale)
    return [dq, *totals]


def _of(block: Block, x: Tensor, k: Tensor) -> Tensor:
    """Its tokens of x (batch, heads, length, d), for one key head side by side: (batch · key heads, heads each · tokens, d)."""
    return x[:, :, block.rows].reshape(k.shape[0] * k.shape[1], -1, x.shape[-1])


def _seen(x: Tensor, before: Sequence[Tensor], block: Block) -> Tensor:
    """The keys or values that it sees, (batch · key heads, n, d)."""
    parts = [y[:, :, place] for y in before for place in block.before] + [x[:, :, place] for place in block.own]
    return torch.cat(parts, 2).flatten(0, 1) if len(parts) > 1 else parts[0].flatten(0, 1)


def _add(totals: Sequence[Tensor], found: Tensor, block: Block) -> None:
    """Add gradients of what it sees, (batch · key heads, n, d), to those of the row, and of what is before it."""
    own, *before = totals
    places = [(x, place) for x in before for place in block.before] + [(own, place) for place in block.own]
    views = [total[:, :, place] for total, place in places]
    parts = found.view(*own.shape[:2], *found.shape[1:]).split([x.shape[2] for x in views], 2)
    for view, part in zip(views, parts, strict=True):
        view += part


def _softmax(queries: Tensor, keys: Tensor, block: Block, scale: float) -> Tensor:
    """(batch · key heads, heads each · tokens, keys)"""
    wide = _wide(queries)
    a, b = queries.to(wide), keys.to(wide).transpose(1, 2)
    scores = torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)
    if block.hidden is not None:
        tokens, n = block.hidden.shape
        scores.view(len(scores), -1, tokens, scores.shape[-1])[..., -n:].add_(block.hidden)
    return scores.softmax(-1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _precision(x: Tensor) -> torch.dtype:
    """In which the products are that come after the scores."""
    return x.dtype if x.dtype == torch.bfloat16 and multiplies_bfloat16() else _wide(x)
