"""Writes the tables of docs/methods.md from the code: `python docs/methods_tables.py`.

Nothing in them is typed by hand. What a method supports is found out by running it on a small synthetic federation,
two rounds each; a refusal is quoted. Figures are measured on the same federation.
"""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flexlora import lowrank, methods
from flexlora.types import ClientUpdate, FlexLoraError, LowRank, Method, Ranks, Sparse

PAGE = Path(__file__).with_name("methods.md")
BEGIN, END = "<!-- {}: written by docs/methods_tables.py -->\n", "<!-- end of {} -->\n"
SHAPES = {"q": (14, 18), "v": (12, 18)}
KINDS = [{"q": r, "v": r} for r in (2, 4, 8)]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "hetlora": [{}, {"handle_alpha": True}],
    "ffa": [{}, {"increments": True}],
    "rolora": [{}, {"increments": True}],
}
"""Options that change what a method supports or keeps; they get a row of their own."""

Plan = Sequence[Sequence[tuple[Ranks, float]]]
"""Round by round, client by client: ranks and alpha/r."""


def variants(built_in: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, options) for name in built_in for options in OPTIONS.get(name, [{}])]


def label(name: str, options: dict[str, Any]) -> str:
    return f"`{name}`" + "".join(f", {k}" for k in options)


def make(name: str, options: dict[str, Any]) -> Method:
    short = {"sparse_rounds": 1} if name == "slora" else {}
    return methods.get_method(name, **options, **short)


def train(x: LowRank | Sparse, trained: Sequence[str], scaling: float, g: torch.Generator) -> LowRank | Sparse:
    """A random step in each trained part; B carries alpha/r."""
    if isinstance(x, Sparse):
        return x._replace(values=x.values + torch.randn(x.values.shape, generator=g))
    B = x.B + scaling * torch.randn(x.B.shape, generator=g) if "B" in trained else x.B
    A = x.A + torch.randn(x.A.shape, generator=g) if "A" in trained else x.A
    return LowRank(B, A)


def play(method: Method, plan: Plan) -> list[list[ClientUpdate]]:
    """Run the plan. Raises FlexLoraError where the method refuses it; checks what clients are given and what comes out."""
    levels = [ranks for clients in plan for ranks, _ in clients]
    state = method.init(SHAPES, 0, levels)
    g = torch.Generator().manual_seed(0)
    played = []
    for clients in plan:
        updates = []
        for i, (ranks, scaling) in enumerate(clients):
            download = method.distribute(state, ranks)
            assert set(download.adapter) == set(ranks)
            assert all(isinstance(x, Sparse) or x.A.shape[0] == ranks[m] for m, x in download.adapter.items())
            adapter = {m: train(x, download.rule.train, scaling, g) for m, x in download.adapter.items()}
            updates.append(ClientUpdate(i, 1.0 + i, adapter, download.adapter, dict.fromkeys(ranks, scaling)))
        state = method.aggregate(state, updates)
        assert all(bool(torch.isfinite(lowrank.delta(x)).all()) for x in method.delta(state).values())
        played.append(updates)
    return played


FEATURES: dict[str, Plan] = {
    "ranks differ between clients": [[(r, 1.0) for r in KINDS]] * 2,
    "ranks differ between modules": [[({"q": 8, "v": 4}, 1.0)] * 3] * 2,
    "a client adapts fewer modules": [[({"q": 4, "v": 4}, 1.0), ({"q": 4}, 1.0)]] * 2,
    "alphas or scalings differ": [[({"q": 4, "v": 4}, s) for s in (16 / 4, 16 / 4**0.5, 1 / 4)]] * 2,
    "ranks change between rounds": [[(KINDS[2], 1.0)] * 2, [(KINDS[1], 1.0)] * 2, [(KINDS[2], 1.0)] * 2],
}


def supports(name: str, options: dict[str, Any], plan: Plan) -> str:
    """ "" where the method does it, else the line with which it refuses."""
    try:
        play(make(name, options), plan)
    except FlexLoraError as refusal:
        return str(refusal)
    return ""


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |\n"


def header(*cells: str) -> str:
    return row(*cells) + "|" + "---|" * len(cells) + "\n"


def overview(built_in: Sequence[str]) -> str:
    text = header("method", "paper", "what the server does", "options")
    for name in built_in:
        entry = methods.method_entry(name)
        paper = f"[{entry.paper}](https://arxiv.org/abs/{entry.paper})" if entry.paper != "ours" else "ours"
        options = ", ".join(f"`{o}`" for o in entry.options) + (", those of `then`" if entry.passes_on else "")
        text += row(f"`{name}`", paper, entry.summary, options or "none")
    return text


def features(built_in: Sequence[str]) -> str:
    notes: dict[str, int] = {}
    text = header("method", *FEATURES)
    for name, options in variants(built_in):
        cells = []
        for plan in FEATURES.values():
            refusal = supports(name, options, plan)
            cells.append("yes" if not refusal else f"refused ({notes.setdefault(refusal, len(notes) + 1)})")
        text += row(label(name, options), *cells)
    return text + "\n" + "".join(f"{n}. “{line}”\n" for line, n in notes.items())


def relative(got: LowRank, want: LowRank) -> float:
    return float(lowrank.norm(lowrank.stack([got, want], [1.0, -1.0])) / lowrank.norm(want))


def shown(error: float) -> str:
    return "exact" if error < 1e-5 else f"{error:.2f}"


def mean_error(method: Method, equal: bool) -> str:
    """‖W − Σ p_i ΔW_i‖ / ‖Σ p_i ΔW_i‖ of q after the first round."""
    plan: Plan = [[(KINDS[1] if equal else r, 1.0) for r in KINDS]]
    try:
        (updates,) = play(method, plan)
    except FlexLoraError:
        return "refused"
    levels = [ranks for ranks, _ in plan[0]]
    state = method.aggregate(method.init(SHAPES, 0, levels), updates)
    xs = [x for u in updates if isinstance(x := u.adapter["q"], LowRank)]
    total = sum(u.weight for u in updates)
    return shown(relative(method.delta(state)["q"], lowrank.stack(xs, [u.weight / total for u in updates])))


def idle_loss(method: Method) -> str:
    """‖W_5 − W_1‖ / ‖W_1‖, W_1 the first round's, after four more in which nobody trains, at shares .85, .10, .05 of ranks 2, 4, 8."""
    ranks = [KINDS[2]] * 3 if method.equal_ranks else KINDS
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 8, generator=g))[0] for n in SHAPES["q"])
    W = LowRank(U * torch.arange(8, 0, -1.0), V.T.contiguous())
    state = method.aggregate(method.init(SHAPES, 0, ranks), [ClientUpdate(0, 1.0, {"q": W}, scaling={"q": 1.0})])
    first = method.delta(state)["q"]
    for _ in range(4):
        sent = [method.distribute(state, r).adapter for r in ranks]
        state = method.aggregate(
            state,
            [
                ClientUpdate(i, p, {"q": s["q"]}, {"q": s["q"]}, {"q": 1.0})
                for i, (p, s) in enumerate(zip((0.85, 0.10, 0.05), sent, strict=True))
            ],
        )
    error = relative(method.delta(state)["q"], first)
    return "nothing" if error < 1e-5 else f"{error:.2f}"


def behaviour(built_in: Sequence[str]) -> str:
    text = header(
        "method",
        "parts sent up, by round",
        "base delta sent down",
        "error of the first mean, equal ranks",
        "… unequal ranks",
        "lost in four idle rounds",
    )
    for name, options in variants(built_in):
        method = make(name, options)
        kind = KINDS[1]
        state = method.init(SHAPES, 0, [kind])
        parts: list[str] = []
        base = False
        g = torch.Generator().manual_seed(0)
        for _ in range(4):
            download = method.distribute(state, kind)
            base = base or bool(download.base_delta)
            parts.append(", ".join(download.rule.send))
            adapter = {m: train(x, download.rule.train, 1.0, g) for m, x in download.adapter.items()}
            update = ClientUpdate(0, 1.0, adapter, download.adapter, dict.fromkeys(kind, 1.0))
            state = method.aggregate(state, [update])
        sent = parts[0] if len(set(parts)) == 1 else "; ".join(parts) + "; …"
        if method.personal:
            figures = ["no global model"] * 3
        elif isinstance(method.distribute(method.init(SHAPES, 0), kind).adapter["q"], Sparse):
            figures = ["as its second stage"] * 3
        else:
            figures = [mean_error(method, True), mean_error(method, False), idle_loss(method)]
        text += row(label(name, options), sent, "yes" if base else "no", *figures)
    return text


def collapse(built_in: Sequence[str]) -> str:
    path = PAGE.parents[1] / "benchmarks" / "collapse.py"
    benchmark = runpy.run_path(str(path))
    return benchmark["energy_table"]() + "\nand ‖W₄ − W₀‖ / ‖W₀‖ by method:\n\n" + benchmark["loss_table"]()


TABLES = {"collapse": collapse, "overview": overview, "features": features, "behaviour": behaviour}


def written(page: str, built_in: Sequence[str]) -> str:
    """The page with its tables made anew."""
    for name, table in TABLES.items():
        begin, end = BEGIN.format(name), END.format(name)
        head, rest = page.split(begin)
        page = head + begin + "\n" + table(built_in) + "\n" + end + rest.split(end)[1]
    return page


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), methods.methods()), encoding="utf-8")
