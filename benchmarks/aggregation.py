"""Seconds, peak memory and error of one server step: ours against four other ways to do the same.

    python benchmarks/aggregation.py --quick             # one SmolLM2 layer, one 1.3 B layer: some ten minutes
    python benchmarks/aggregation.py --models llama-7b --clients 10 heavy_tail

One server step takes what all clients of a round sent to the best adapters of every rank that occurs. The others are

- published: each product dense, torch.svd of the sum, U[:, :r] diag(S[:r]) once for each of the 1,613 clients;
- dense: each product dense, torch.linalg.svd, one slice a distinct rank;
- peft: add_weighted_adapter(combination_type="svd"), one rank only;
- chorus: FedExLoRA of chorus-fl 0.1.0, one rank only; skipped where it is not installed (`pip install --no-deps`).

Ours runs all modules of two layers at once, over the cores, and half of that counts. The others use the same cores
inside each operation, on one module of each distinct shape; their seconds are multiplied by how often a layer has that
shape. The slices of `published` are timed for 40 clients and scaled to 1,613. Medians over the repeats, in one process;
memory is the growth of resident memory while it works, sampled every 2 ms. Factors are Gaussian: the flattest spectra,
the hardest to cut.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexlora import lowrank
from flexlora.cores import each
from flexlora.methods import get_method
from flexlora.products import mm
from flexlora.types import ClientUpdate, LowRank

POPULATION = 1613
AT_ONCE = 2
"""Layers that ours works on side by side, so that the cores have even work as with a whole model."""
ATTENTION, MLP = "attention", "mlp"


@dataclass(frozen=True)
class Shape:
    d_out: int
    d_in: int
    kind: str
    count: int
    """Modules of this shape in one layer."""


MODELS = {
    "smollm2-135m": (
        30,
        [
            Shape(576, 576, ATTENTION, 2),
            Shape(192, 576, ATTENTION, 2),
            Shape(1536, 576, MLP, 2),
            Shape(576, 1536, MLP, 1),
        ],
    ),
    "llama-1.3b": (24, [Shape(2048, 2048, ATTENTION, 4), Shape(5504, 2048, MLP, 2), Shape(2048, 5504, MLP, 1)]),
    "llama-7b": (32, [Shape(4096, 4096, ATTENTION, 4), Shape(11008, 4096, MLP, 2), Shape(4096, 11008, MLP, 1)]),
}
TYPES = [{ATTENTION: 8, MLP: 8}, {ATTENTION: 30, MLP: 30}, {ATTENTION: 30, MLP: 200}, {ATTENTION: 200, MLP: 200}]


def clients(name: str) -> list[dict[str, int]]:
    """The rank of each kind of module, for every client of one round; a number: so many, ranks 8, 30, 200 in turn."""
    if name.isdigit():
        return [{ATTENTION: r, MLP: r} for r in [(8, 30, 200)[i % 3] for i in range(int(name))]]
    shares = {"heavy_tail": [68, 4, 4, 4], "heavy_tail_strong": [4, 4, 4, 68]}[name]
    return [ranks for ranks, count in zip(TYPES, shares, strict=True) for _ in range(count)]


class Round:
    """The updates of one round, cut out of one pool of Gaussian numbers, so that making them takes no time."""

    def __init__(self, modules: dict[str, Shape], name: str) -> None:
        self.modules = modules
        self.truths: dict[str, tuple[Tensor, float]] = {}
        g = torch.Generator().manual_seed(1)
        self._pool = torch.randn(1 << 25, generator=g)
        ranks = clients(name)
        self.weights = torch.randint(16, 521, (len(ranks),), generator=g).tolist()
        self.ranks = [{m: min(r[s.kind], s.d_out, s.d_in) for m, s in modules.items()} for r in ranks]
        self._starts = torch.randint(0, 1 << 23, (len(ranks), len(modules), 2), generator=g).tolist()

    def pair(self, i: int, module: str) -> LowRank:
        s, r = self.modules[module], self.ranks[i][module]
        at_b, at_a = self._starts[i][list(self.modules).index(module)]
        B = self._pool[at_b : at_b + s.d_out * r].view(s.d_out, r)
        return LowRank(B, self._pool[at_a : at_a + r * s.d_in].view(r, s.d_in))

    def pairs(self, module: str) -> list[LowRank]:
        return [self.pair(i, module) for i in range(len(self.weights))]

    def updates(self) -> Iterator[ClientUpdate]:
        for i, weight in enumerate(self.weights):
            yield ClientUpdate(i, weight, {m: self.pair(i, m) for m in self.modules})

    def distinct(self, module: str) -> list[int]:
        return sorted({r[module] for r in self.ranks})

    def stacked(self, module: str) -> int:
        return sum(r[module] for r in self.ranks)

    def shares(self) -> list[float]:
        return [w / sum(self.weights) for w in self.weights]


# --- the ways; each but ours does one module and returns its adapter of the largest rank --------------------------------


def ours(r: Round) -> Callable[[], dict[str, Tensor]]:
    method = get_method("flexlora")
    levels = [dict(t) for t in {tuple(sorted(ranks.items())) for ranks in r.ranks}]
    state = method.init({m: (s.d_out, s.d_in) for m, s in r.modules.items()}, 0, levels)

    def work() -> dict[str, Tensor]:
        after = method.aggregate(state, r.updates())
        downloads = [method.distribute(after, ranks) for ranks in levels]
        best = {m: max((d.adapter[m] for d in downloads), key=lambda x: x[1].shape[0]) for m in r.modules}
        return {m: lowrank.delta(x) for m, x in best.items() if isinstance(x, LowRank)} if ours_result else {}

    return work


ours_result = False
"""Whether the adapters of `ours` are multiplied out, for the error; not while it is timed."""


def dense_sum(r: Round, module: str) -> Tensor:
    s = r.modules[module]
    W = torch.zeros((s.d_out, s.d_in))
    for x, p in zip(r.pairs(module), r.shares(), strict=True):
        W += p * (x.B @ x.A)
    return W


def published(r: Round, module: str) -> Callable[[], tuple[Tensor, float]]:
    def work() -> tuple[Tensor, float]:
        U, S, V = torch.svd(dense_sum(r, module))
        start = time.perf_counter()
        sample = [r.ranks[i * len(r.ranks) // 40][module] for i in range(40)]
        for rank in sample:
            B, A = U[:, :rank] @ torch.diag(S[:rank]), V[:, :rank].T.contiguous()
        seconds = time.perf_counter() - start
        rank = max(r.distinct(module))
        B, A = U[:, :rank] @ torch.diag(S[:rank]), V[:, :rank].T
        return B @ A, seconds * (POPULATION / 40 - 1)

    return work


def dense(r: Round, module: str) -> Callable[[], tuple[Tensor, float]]:
    def work() -> tuple[Tensor, float]:
        U, S, Vt = torch.linalg.svd(dense_sum(r, module), full_matrices=False)
        B = A = torch.empty(0)
        for rank in r.distinct(module):
            B, A = U[:, :rank] * S[:rank], Vt[:rank].contiguous()
        return B @ A, 0.0

    return work


def peft(r: Round, module: str) -> Callable[[], tuple[Tensor, float]]:
    from peft import LoraConfig, get_peft_model

    s = r.modules[module]
    net = torch.nn.ModuleDict({"m": torch.nn.Linear(s.d_in, s.d_out, bias=False)})
    model: Any = None
    for i, x in enumerate(r.pairs(module)):
        rank = x.A.shape[0]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["m"])
        if model is None:
            model = get_peft_model(net, config, adapter_name="c0")  # type: ignore[arg-type]
        else:
            model.add_adapter(f"c{i}", config)
        layer = model.base_model.model["m"]
        layer.lora_A[f"c{i}"].weight.data, layer.lora_B[f"c{i}"].weight.data = x.A, x.B
    names = [f"c{i}" for i in range(len(r.weights))]

    def work() -> tuple[Tensor, float]:
        if "sum" in model.peft_config:  # of the repeat before: PEFT would leave it as it is
            model.delete_adapter("sum")
        model.base_model.add_weighted_adapter(
            names, r.shares(), "sum", combination_type="svd", svd_rank=max(r.distinct(module))
        )
        with torch.no_grad():
            return model.base_model.model["m"].get_delta_weight("sum"), 0.0

    return work


def chorus(r: Round, module: str) -> Callable[[], tuple[Tensor, float]]:
    from chorus.server.aggregation import FedExLoRA  # type: ignore[import-not-found]

    sent = [{"m.lora_A.weight": x.A, "m.lora_B.weight": x.B} for x in r.pairs(module)]

    def work() -> tuple[Tensor, float]:
        got = FedExLoRA().aggregate(sent, list(r.weights))
        return got["m.lora_B.weight"] @ got["m.lora_A.weight"], 0.0

    return work


OTHERS = {"published": published, "dense": dense, "peft": peft, "chorus": chorus}


# --- measuring -----------------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


@dataclass(frozen=True)
class Timed:
    """What one call returned, its seconds, the CPU seconds of all its threads, and the growth of resident memory in MB."""

    result: Any
    seconds: float
    cpu: float
    memory: float


def watched(work: Callable[[], object]) -> Timed:
    gc.collect()
    before = peak = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    done.set()
    thread.join()
    if isinstance(result, tuple) and isinstance(result[1], float):
        seconds, cpu = seconds + result[1], cpu + result[1]
    return Timed(result, seconds, cpu, (peak - before) / 1e6)


def timed(work: Callable[[], object], repeats: int) -> Timed:
    """Medians of the repeats' seconds, the most memory, and what the last one returned; no earlier result is held."""
    runs = [watched(work)]
    for _ in range(repeats - 1):
        runs[-1] = replace(runs[-1], result=None)
        runs.append(watched(work))
    seconds, cpu = (statistics.median(values) for values in zip(*((x.seconds, x.cpu) for x in runs), strict=True))
    return Timed(runs[-1].result, seconds, cpu, max(x.memory for x in runs))


def truth(r: Round, module: str) -> tuple[Tensor, float]:
    """The sum in float64, and the least error of any matrix of the largest rank."""
    if module not in r.truths:
        B = torch.cat([x.B.double() * p for x, p in zip(r.pairs(module), r.shares(), strict=True)], 1)
        W = B @ torch.cat([x.A.double() for x in r.pairs(module)])
        squares = torch.linalg.eigvalsh(W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W).clamp(min=0)
        r.truths[module] = W, float(squares[: len(squares) - max(r.distinct(module))].sum()) ** 0.5
    return r.truths[module]


def excess(r: Round, module: str, X: Tensor) -> float:
    """‖W − X‖_F beyond the optimum of X's rank, relative, in float64."""
    W, least = truth(r, module)
    error, size = float(torch.linalg.vector_norm(W - X.double())), float(torch.linalg.vector_norm(W))
    # Nothing is lost where the rank reaches that of the sum: then the error itself, as a share of the sum.
    return error / least - 1 if least > 1e-6 * size else error / size


def compare(model: str, name: str, repeats: int, ways: list[str], errors: bool) -> list[dict[str, object]]:
    global ours_result
    layers, shapes = MODELS[model]
    modules = {f"{s.d_out}x{s.d_in}.{i}": s for s in shapes for i in range(AT_ONCE * s.count)}
    r = Round(modules, name)
    firsts = {s: f"{s.d_out}x{s.d_in}.0" for s in shapes}
    rows: list[dict[str, object]] = []

    def row(way: str, seconds: float, cpu: float, memory: float, error: float | None) -> None:
        whole = {"seconds": seconds * layers, "cpu": cpu * layers, "MB": memory, "error": error}
        rows.append({"model": model, "clients": name, "way": way, **whole})

    work = ours(r)
    run = timed(work, repeats)
    ours_result = True
    X = work() if errors else {}
    ours_result = False
    error = max((excess(r, m, X[m]) for m in firsts.values()), default=None) if errors else None
    row("ours", run.seconds / AT_ONCE, run.cpu / AT_ONCE, run.memory, error)
    for way in ways:
        total, cpu, memory, worst = 0.0, 0.0, 0.0, 0.0
        try:
            for shape, module in firsts.items():
                run = timed(OTHERS[way](r, module), repeats)
                total += run.seconds * shape.count
                cpu += run.cpu * shape.count
                memory = max(memory, run.memory)
                if errors:
                    worst = max(worst, excess(r, module, run.result[0]))
        except ImportError as missing:
            print(f"{way}: skipped, {missing}")
            continue
        row(way, total, cpu, memory, worst if errors else None)
    # the floor: nothing but the products of the stacked factors, one large product a core, by the faster library
    n, threads = 2048, torch.get_num_threads()
    M = torch.randn(n, n)
    run = timed(lambda: each(lambda x: mm(x, x), [M] * threads), 5)
    share = sum(2.0 * s.d_out * s.d_in * r.stacked(m) for m, s in modules.items()) / (2 * n**3) / threads / AT_ONCE
    row("(products alone)", run.seconds * share, run.cpu * share, 0.0, None)
    return rows


def table(rows: list[dict[str, object]]) -> str:
    lines = [
        "| model | clients | way | seconds a model | ours is faster by | CPU seconds | by | MB | beyond the optimum |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    base = base_cpu = 1.0
    for row in rows:
        seconds, cpu = float(row["seconds"]), float(row["cpu"])  # type: ignore[arg-type]
        base, base_cpu = (seconds, cpu) if row["way"] == "ours" else (base, base_cpu)
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        lines.append(
            f"| {row['model']} | {row['clients']} | {row['way']} | {seconds:.1f} | {seconds / base:.2f} | "
            f"{cpu:.1f} | {cpu / base_cpu:.2f} | {row['MB']:.0f} | {error} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="SmolLM2-135M and LLaMA-1.3B, one repeat")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=None)
    cases = ["10", "heavy_tail", "heavy_tail_strong"]
    parser.add_argument("--clients", nargs="+", default=cases, help="a number, heavy_tail or heavy_tail_strong")
    parser.add_argument("--ways", nargs="*", choices=OTHERS, default=list(OTHERS))
    parser.add_argument("--repeats", type=int, default=None, help="3, or 1 with --quick")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-errors", action="store_true", help="leave the float64 truth out")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = args.models or (["smollm2-135m", "llama-1.3b"] if args.quick else list(MODELS))
    repeats = args.repeats or (1 if args.quick else 3)
    rows: list[dict[str, object]] = []
    for model in models:
        for name in args.clients:
            rows += compare(model, name, repeats, args.ways, not args.no_errors)
            print(table(rows[-len(args.ways) - 2 :]), flush=True)
    print(f"\ntorch {torch.__version__}, {args.threads} threads, {repeats} repeats\n\n{table(rows)}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
