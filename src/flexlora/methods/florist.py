"""FLoRIST (arXiv 2506.09199): SVD of the stacked updates, cut where the singular values hold enough energy.

The smallest p with Σ_{j ≤ p} σ_j² ≥ τ Σ σ_j² is kept: one global adapter of rank p by module, merged into the base;
each round starts with a fresh adapter, as in flora.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from flexlora import lowrank
from flexlora.cores import each
from flexlora.lowrank import Matrix
from flexlora.methods.base import register
from flexlora.methods.flora import State, delta, distribute, grown, init, mean_deltas
from flexlora.types import ClientUpdate, FlexLoraError, LowRank, Method


def kept_rank(S: Tensor, threshold: float) -> int:
    """The smallest p with Σ_{j ≤ p} σ_j² ≥ threshold · Σ σ_j²; 0 where all are zero."""
    energy = S.double().square().cumsum(0)
    if not len(energy) or not energy[-1]:
        return 0
    return min(int((energy < threshold * energy[-1]).sum()) + 1, len(energy))


def florist(threshold: float = 0.9) -> Method:
    """threshold: τ in (0, 1], the share of each module's energy that the global adapter keeps; 1 loses nothing.

    Raises FlexLoraError for a value out of range.
    """
    if not 0 < threshold <= 1:
        raise FlexLoraError(f"florist: threshold is {threshold}, it must be above 0 and at most 1")

    def step(x: Matrix) -> LowRank:
        U, S, Vt = lowrank.svd(x)
        p = kept_rank(S, threshold)
        return LowRank(U[:, :p] * S[:p], Vt[:p])

    def aggregate(state: State, updates: Iterable[ClientUpdate]) -> State:
        sums = mean_deltas(state.shapes, updates)

        def finish(module: str) -> LowRank:
            total = sums.pop(module)
            return grown(state.base[module], step(total.over(total.total or 1.0)))

        modules = list(sums)
        base = {**state.base, **dict(zip(modules, each(finish, modules), strict=True))}
        return State(state.round + 1, state.seed, state.shapes, base)

    return Method(init, aggregate, distribute, delta)


register(
    "florist",
    florist,
    paper="2506.09199",
    summary="SVD of the stack, cut at a share of its energy (threshold), goes into the base; fresh adapters each round",
)
