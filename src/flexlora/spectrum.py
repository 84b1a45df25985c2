"""The spectrum of a run's global delta weight, module by module, and the ranks that it asks for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import count

import torch
import yaml
from torch import Tensor

from flexlora import lowrank
from flexlora.cores import each
from flexlora.rundir import Run
from flexlora.trained import standing_at
from flexlora.types import FlexLoraError


def spectra(run: Run, round: int | None = None) -> dict[str, Tensor]:
    """Module -> singular values of the global delta weight, float64, descending; at the best round by default.

    No model is loaded. Raises FlexLoraError where the round has no checkpoint or the method has no global model.
    """
    method, standing, _ = standing_at(run, round)
    delta = method.delta(standing.state)
    if not delta:
        raise FlexLoraError(f"{run.folder}: method {run.config.method_name} has no global delta weight to look at")
    values = each(lowrank.singular_values, delta.values())
    return {module: x.double() for module, x in zip(delta, values, strict=True)}


def beyond(values: Sequence[Tensor]) -> list[float]:
    """Share of Σ‖W‖² that lies beyond rank 0, 1, 2, … when every module is cut there; the last entry is 0.

    All zero modules give [0.0].
    """
    length = max((len(x) for x in values), default=0)
    energy = torch.zeros(length, dtype=torch.float64)
    for x in values:
        energy[: len(x)] += x.double() ** 2
    total = energy.sum()
    if not total:
        return [0.0]
    # Summed from the small end, so that small tails keep their digits.
    tails = energy.flip(0).cumsum(0).flip(0) / total
    return [*tails.tolist(), 0.0]


def rank_for(values: Tensor, energy: float) -> int:
    """The smallest rank that keeps the share `energy` of ‖W‖², at least 1."""
    tails = beyond([values])
    return max(1, next(rank for rank, share in enumerate(tails) if share <= 1 - energy + 1e-12))


def advised_ranks(found: Mapping[str, Tensor], energy: float) -> dict[str, int]:
    """For each module the smallest rank that keeps the share `energy` of its own ‖W‖²."""
    return {module: rank_for(values, energy) for module, values in found.items()}


def rank_file(found: Mapping[str, Tensor], energy: float) -> str:
    """`advised_ranks` as a YAML file for the configuration key `ranks`: one type, which every client gets."""
    heading = f"# The smallest ranks that keep {energy:g} of the energy of every module.\n"
    return heading + yaml.safe_dump(
        {"types": {"advised": advised_ranks(found, energy)}, "shares": {"advised": 1.0}}, sort_keys=False
    )


def place(module: str) -> tuple[str, int]:
    """(kind, layer) of a module's name: ("q_proj", 3) of "model.layers.3.self_attn.q_proj"; layer 0 where it has none."""
    layer = re.search(r"\.(\d+)\.", f".{module}.")
    return module.rsplit(".", 1)[-1], int(layer[1]) if layer else 0


def by_kind(found: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
    """Kind of module -> layer -> singular values, in network order.

    A kind that a layer has twice is told by more of the name: GPT-BigCode's "attn.c_proj" and "mlp.c_proj".
    """
    alike: dict[str, list[str]] = {}
    for module in found:
        alike.setdefault(place(module)[0], []).append(module)
    parts = {kind: next(n for n in count(1) if _told(modules, n)) for kind, modules in alike.items()}
    kinds: dict[str, dict[int, Tensor]] = {}
    for module, values in found.items():
        kind, layer = place(module)
        kinds.setdefault(_tail(module, parts[kind]), {})[layer] = values
    return kinds


def _tail(module: str, parts: int) -> str:
    return ".".join(module.split(".")[-parts:])


def _told(modules: Sequence[str], parts: int) -> bool:
    """Whether layer and the last `parts` of the name tell each from each."""
    return len({(place(module)[1], _tail(module, parts)) for module in modules}) == len(modules)
