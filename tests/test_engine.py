"""The round loop with clients that add noise instead of training: what reaches whom, order, failure, resume, early stop."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexlora import lowrank, ranks, saved, wire
from flexlora.checkpoint import checkpoint_folder, checkpoint_rounds, read_checkpoint, write_checkpoint
from flexlora.collection import RoundLog
from flexlora.config import Config
from flexlora.engine import restore_adapter, run_rounds, validate
from flexlora.methods import get_method
from flexlora.randomness import generator
from flexlora.rundir import Run, create_run, read_metrics, with_rounds
from flexlora.sampling import participants
from flexlora.standing import Setup, Standing, first_standing, last_standing
from flexlora.tables import outcome, rounds_table
from flexlora.types import (
    ClientFailure,
    ClientInfo,
    ClientRule,
    ClientScore,
    ClientUpdate,
    Download,
    FlexLoraError,
    LocalTraining,
    LowRank,
    Ranks,
    TrainTask,
)

SHAPES = {"m.q_proj": (12, 10), "m.down_proj": (8, 14)}
SMALL, MIXED, LARGE = (
    {"m.q_proj": 2, "m.down_proj": 2},
    {"m.q_proj": 3, "m.down_proj": 6},
    {"m.q_proj": 8, "m.down_proj": 8},
)
TABLE: dict[int, Ranks] = {0: SMALL, 1: SMALL, 2: SMALL, 3: MIXED, 4: MIXED, 5: LARGE}


class CrashError(Exception):
    pass


class NoisyRunner:
    """Every client adds seeded noise to what it was sent; remembers all tasks and what it answered."""

    def __init__(
        self,
        *,
        backwards: bool = False,
        fail: Mapping[tuple[int, int], str] | None = None,
        crash: tuple[int, int] = (0, 0),
    ):
        self.backwards, self.fail, self.crash = backwards, fail or {}, crash
        self.tasks: list[TrainTask] = []
        self.updates: dict[int, list[ClientUpdate]] = {}

    def clients(self) -> Mapping[int, ClientInfo]:
        return {client: ClientInfo() for client in TABLE}

    def train(self, round: int, tasks: Sequence[TrainTask]) -> Iterator[ClientUpdate | ClientFailure]:
        self.tasks += tasks
        for task in reversed(tasks) if self.backwards else tasks:
            if (round, task.client) == self.crash:
                raise CrashError
            if reason := self.fail.get((round, task.client)):
                yield ClientFailure(task.client, reason)
                continue
            g = generator(task.seed, "noise")
            adapter = {
                m: LowRank(x.B + torch.randn(x.B.shape, generator=g), x.A + torch.randn(x.A.shape, generator=g))
                for m, x in task.download.adapter.items()
                if isinstance(x, LowRank)
            }
            metrics = {
                "train_loss": 1.0 / round,
                "examples": 3.0 + task.client,
                "bytes_up": wire.size(adapter),
                "bytes_down": 1.0,
            }
            update = ClientUpdate(task.client, 3.0 + task.client, adapter, metrics=metrics)
            self.updates.setdefault(round, []).append(update)
            yield update

    def evaluate(self, round: int, tasks: Any) -> Iterator[Any]:
        raise AssertionError("the server has data here")

    def close(self) -> None: ...


class ListedLosses:
    """A scorer whose validation loss in round t is the t-th of a list; the adapter is saved bare."""

    def __init__(self, losses: Sequence[float]) -> None:
        self.losses = losses
        self.seen: list[dict[str, LowRank]] = []

    def validate(self, adapter: Any) -> Mapping[str, Any]:
        self.seen.append(dict(adapter))
        return {"loss": self.losses[min(self.round, len(self.losses) - 1)], "examples": 1, "tokens": 1}

    round = 0

    def evaluate(self, adapter: Any, by_rank: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"rougeL": 0.5, "loss": 1.0, "loss_by_rank": {label: float(len(a)) for label, a in by_rank.items()}}

    def save(self, folder: Path, adapter: Mapping[str, LowRank], facts: Mapping[str, Any]) -> None:
        folder.mkdir()
        save_file(
            {f"{m}.{p}": getattr(x, p).contiguous().clone() for m, x in adapter.items() for p in "AB"},
            folder / "adapter.safetensors",
        )


def setup_of(folder: Path, losses: Sequence[float] = (5.0, 4.0, 3.0, 2.0, 1.0, 0.5), **keys: Any) -> Setup:
    values = {
        "participation": 0.5,
        "rounds": 4,
        "early_stop": False,
        "eval_every": 0,
        "name": "r",
        "output_dir": folder,
        **keys,
    }
    config = Config(**values)
    return Setup(config, get_method(config.method_name), SHAPES, TABLE, "chat", ListedLosses(losses), None)


def play(folder: Path, runner: NoisyRunner, setup: Setup | None = None) -> Run:
    setup = setup or setup_of(folder)
    path = folder / "r"
    run = Run(path) if (path / "config.yaml").exists() else create_run(setup.config, path, {})
    scorer: Any = setup.scorer
    notes: list[str] = []

    def notify(event: str, facts: Mapping[str, Any]) -> None:
        if event == "round":
            scorer.round = facts["round"] - 1
        if event == "note":
            notes.append(facts["text"])

    return run_rounds(setup, runner, run, last_standing(setup, run, notify), notify)


def same_files(a: Path, b: Path, pattern: str) -> None:
    left = {p.relative_to(a): p.read_bytes() for p in sorted(a.glob(pattern)) if p.is_file()}
    right = {p.relative_to(b): p.read_bytes() for p in sorted(b.glob(pattern)) if p.is_file()}
    assert left
    assert left == right


def timeless(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(run.folder)]


def dense(update: ClientUpdate, module: str) -> torch.Tensor:
    x = update.adapter[module]
    assert isinstance(x, LowRank)
    return x.B.double() @ x.A.double()


def test_clients_get_their_ranks_and_the_best_approximation_of_the_aggregate(tmp_path: Path) -> None:
    runner = NoisyRunner()
    play(tmp_path, runner)
    W = {m: torch.zeros(shape, dtype=torch.float64) for m, shape in SHAPES.items()}
    for round in (1, 2, 3, 4):
        tasks = [t for t in runner.tasks if t.round == round]
        assert len(tasks) == 3
        for task in tasks:
            assert task.ranks == TABLE[task.client]
            for module, rank in TABLE[task.client].items():
                sent = task.download.adapter[module]
                assert isinstance(sent, LowRank)
                assert sent.B.shape == (SHAPES[module][0], rank)
                assert sent.A.shape == (rank, SHAPES[module][1])
                assert bool((sent.A.norm(dim=1) > 0).all())
                U, S, Vt = torch.linalg.svd(W[module])
                best = U[:, :rank] @ torch.diag(S[:rank]) @ Vt[:rank]
                assert float((lowrank.delta(sent).double() - best).norm()) <= 1e-5 * max(1.0, float(best.norm()))
        total = sum(u.weight for u in runner.updates[round])
        for module in SHAPES:
            W[module] = sum(
                (u.weight / total * dense(u, module) for u in runner.updates[round]),
                torch.zeros(SHAPES[module], dtype=torch.float64),
            )  # fmt: skip


def test_arrival_order_changes_no_bit(tmp_path: Path) -> None:
    forward = play(tmp_path / "f", NoisyRunner())
    backward = play(tmp_path / "b", NoisyRunner(backwards=True))
    same_files(forward.folder, backward.folder, "checkpoints/*/state.safetensors")
    same_files(forward.folder, backward.folder, "adapter/*")
    assert timeless(forward) == timeless(backward)
    assert not (backward.folder / ".early").exists()


@pytest.mark.parametrize("method", ["flexlora", "fedavg"])
@pytest.mark.parametrize("crash", [(1, 0), (2, 1), (3, 2), (4, 0)])
def test_interrupted_and_resumed_equals_left_alone(tmp_path: Path, crash: tuple[int, int], method: str) -> None:
    keys: dict[str, Any] = {"method": method, "participation": 1.0}
    table = TABLE if method == "flexlora" else dict.fromkeys(TABLE, SMALL)

    def setup(folder: Path) -> Setup:
        return replace(setup_of(folder, **keys), table=table)

    alone = play(tmp_path / "a", NoisyRunner(), setup(tmp_path / "a"))
    with pytest.raises(CrashError):
        play(tmp_path / "b", NoisyRunner(crash=crash), setup(tmp_path / "b"))
    resumed = play(tmp_path / "b", NoisyRunner(), setup(tmp_path / "b"))
    same_files(alone.folder, resumed.folder, "adapter/*")
    same_files(alone.folder, resumed.folder, "checkpoints/*/state.safetensors")
    assert timeless(alone) == timeless(resumed)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    alone = play(tmp_path / "a", NoisyRunner())
    damaged = play(tmp_path / "b", NoisyRunner())
    path = damaged.folder / "checkpoints" / "round-0004" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    resumed = play(tmp_path / "b", NoisyRunner())
    same_files(alone.folder, resumed.folder, "checkpoints/*/state.safetensors")
    assert timeless(alone) == timeless(resumed)


def test_changed_configuration_is_refused(tmp_path: Path) -> None:
    play(tmp_path, NoisyRunner())
    with pytest.raises(FlexLoraError, match=r"learning_rate is 0\.5 now and was None"):
        play(tmp_path, NoisyRunner(), setup_of(tmp_path, learning_rate=0.5))
    more = play(tmp_path, NoisyRunner(), setup_of(tmp_path, rounds=6))
    assert [line["round"] for line in more.metrics] == [1, 2, 3, 4, 5, 6]
    elsewhere = {"runner": "ray", "workers": 2, "ray_address": "auto", "worker_gpus": 0.5, "round_timeout": 9.0}
    assert len(play(tmp_path, NoisyRunner(), setup_of(tmp_path, rounds=7, **elsewhere)).metrics) == 7


@pytest.mark.parametrize(("examples", "asked"), [(1, 1), (16, 2), (20, 2), (800, len(TABLE))])
def test_validation_asks_as_many_clients_as_the_sample_needs(tmp_path: Path, examples: int, asked: int) -> None:
    class Asked(NoisyRunner):
        def evaluate(self, round: int, tasks: Any) -> Iterator[Any]:
            for task in reversed(tasks):
                yield ClientScore(task.client, 2.0 * task.client, 10 + task.client, 8)

    class Blind(ListedLosses):
        def validate(self, adapter: Any) -> Mapping[str, Any]:
            return {}

    setup = replace(setup_of(tmp_path, validation_examples=examples), scorer=Blind(()))
    scores = validate(setup, Asked(), first_standing(setup), {})
    clients = participants(sorted(TABLE), asked / len(TABLE), seed=setup.config.seed, round=0)
    assert scores["clients"] == len(clients) == asked
    assert scores["loss"] == sum(2.0 * c for c in clients) / sum(10 + c for c in clients)
    assert scores["examples"] == 8 * asked


def held(run: Run) -> tuple[list[int], bytes]:
    return checkpoint_rounds(run.checkpoints), (run.folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("at", [None, 0, 3])
def test_another_method_is_refused_by_name_wherever_the_run_is_taken_up(tmp_path: Path, at: int | None) -> None:
    run = play(tmp_path, NoisyRunner())
    before = held(run)
    for method in ("hetlora", "flora"):
        with pytest.raises(FlexLoraError, match=f"method is '{method}' now and was 'auto'"):
            last_standing(setup_of(tmp_path, method=method), run, lambda event, facts: None, at)
    assert held(run) == before


@pytest.mark.parametrize("at", [None, 0, 3])
@pytest.mark.parametrize(("key", "what"), [("base", "the weights of smollm2"), ("wording", "the template chat")])
def test_other_contents_under_the_same_name_are_refused(tmp_path: Path, at: int | None, key: str, what: str) -> None:
    setup = replace(setup_of(tmp_path), base="b", wording="w")
    run = play(tmp_path, NoisyRunner(), setup)
    before = held(run)
    with pytest.raises(FlexLoraError, match=f"{what} changed since the run began; put back what it was"):
        last_standing(replace(setup, **{key: "other"}), run, lambda event, facts: None, at)
    assert held(run) == before


def test_a_checkpoint_that_does_not_say_its_contents_is_gone_on_from(tmp_path: Path) -> None:
    run = play(tmp_path, NoisyRunner())
    state, progress = read_checkpoint(checkpoint_folder(run.checkpoints, 4), first_standing(setup_of(tmp_path)).state)
    del progress["base"], progress["wording"]
    write_checkpoint(run.checkpoints, 4, state, progress)
    setup = replace(setup_of(tmp_path), base="b", wording="w")
    assert last_standing(setup, run, lambda event, facts: None).round == 4


def test_a_round_that_is_asked_for_and_damaged_is_refused_before_anything_is_removed(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, losses=(5.0, 1.0, 3.0, 3.0, 3.0, 3.0), rounds=6)
    run = play(tmp_path, NoisyRunner(), setup)
    assert checkpoint_rounds(run.checkpoints) == [2, 5, 6]
    (run.checkpoints / "round-0005" / "state.safetensors").write_bytes(b"")
    before = held(run)
    with pytest.raises(FlexLoraError, match=r"resume_from: .*round-0005.*; there are: 2, 5, 6"):
        last_standing(setup, run, lambda event, facts: None, 5)
    assert held(run) == before


def test_rounds_grown_later_equal_rounds_asked_for_at_once(tmp_path: Path) -> None:
    at_once = play(tmp_path / "a", NoisyRunner(), setup_of(tmp_path / "a", rounds=6))
    play(tmp_path / "b", NoisyRunner(), setup_of(tmp_path / "b", rounds=3))
    grown = play(tmp_path / "b", NoisyRunner(), setup_of(tmp_path / "b", rounds=6))
    same_files(at_once.folder, grown.folder, "adapter/*")
    assert timeless(at_once) == timeless(grown)


class SavedLosses(ListedLosses):
    """Saves the adapter as the real scorers do: its weights say of which round they are."""

    def save(self, folder: Path, adapter: Mapping[str, LowRank], facts: Mapping[str, Any]) -> None:
        saved.save_adapter(folder, adapter, base_model="m", about={"round": facts["round"]})


def test_a_run_that_stopped_early_and_is_given_more_rounds_goes_on_wherever_it_is_cut_off(tmp_path: Path) -> None:
    losses = (5.0, 1.0, 3.0, 3.0, 0.5, 3.0, 3.0, 3.0, 3.0)
    keys: dict[str, Any] = {"losses": losses, "early_stop": True, "patience": 2}

    def stopped(folder: Path) -> Setup:
        assert len(play(folder, NoisyRunner(), setup_of(folder, rounds=5, **keys)).metrics) == 4
        return setup_of(folder, rounds=9, **keys)

    whole = play(tmp_path / "a", NoisyRunner(), stopped(tmp_path / "a"))
    assert len(whole.metrics) == 7
    more = stopped(tmp_path / "b")
    with pytest.raises(CrashError):
        play(tmp_path / "b", NoisyRunner(crash=(5, 0)), more)
    with_rounds(Run(tmp_path / "b" / "r"), 9)
    assert Run(tmp_path / "b" / "r").metrics[-1]["stopped"] is None
    cut = play(tmp_path / "b", NoisyRunner(), more)
    assert timeless(cut) == timeless(whole)
    same_files(whole.folder, cut.folder, "adapter/*")
    assert len(play(tmp_path / "b", NoisyRunner(), more).metrics) == 7


class CountedScores(SavedLosses):
    """Held-out scores tell which adapter they are of, by its size."""

    def evaluate(self, adapter: Any, by_rank: Mapping[str, Any]) -> Mapping[str, Any]:
        size = sum(float(x.B.norm()) for x in adapter.values())
        return {"rougeL": size, "loss": size, "exact_match": 0.0, "loss_by_rank": {}}


def test_the_best_round_is_scored_when_the_run_ends(tmp_path: Path) -> None:
    losses = (5.0, 1.0, 3.0, 3.0, 3.0, 3.0)

    def played(folder: Path, every: int, **keys: Any) -> Run:
        setup = replace(
            setup_of(folder, losses=losses, rounds=5, eval_every=every, **keys), scorer=CountedScores(losses)
        )
        return play(folder, NoisyRunner(), setup)

    each, last = played(tmp_path / "each", 1), played(tmp_path / "last", 5)
    assert each.metrics[-1]["eval_best"] == {}
    assert [bool(line["eval"]) for line in last.metrics] == [False] * 4 + [True]
    assert last.metrics[-1]["eval_best"] == {"round": 2, **each.metrics[1]["eval"]}
    assert outcome(last)["rougeL"] == outcome(each)["rougeL"] == each.metrics[1]["eval"]["rougeL"]
    assert last.adapter_round == 2
    assert last.line(2)["eval"] == each.line(2)["eval"]
    assert last.line(3)["eval"] == {}
    shown, best = rounds_table(last), last.line(2)["eval"]
    assert [list(column.cells) for column in shown.columns[3:5]] == [
        ["–", f"{best[key]:.3f}", "–", "–", f"{last.line(5)['eval'][key]:.3f}"] for key in ("loss", "rougeL")
    ]
    stopped = played(tmp_path / "stopped", 5, early_stop=True, patience=2)
    assert len(stopped.metrics) == 4
    assert stopped.metrics[-1]["eval_best"] == last.metrics[-1]["eval_best"]
    # one that was not scored says nothing of another's scores
    for line in (lines := last.metrics):
        line.pop("eval_best", None)
    (last.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert outcome(last)["rougeL"] is None


def test_a_round_without_a_score_is_neither_better_nor_worse(tmp_path: Path) -> None:
    unanswered: Any = None
    losses = (unanswered, 5.0, 1.0, unanswered, 9.0, 9.0)
    run = play(tmp_path, NoisyRunner(), setup_of(tmp_path, losses=losses, rounds=6))
    assert [line["best_round"] for line in timeless(run)] == [1, 2, 3, 3, 3, 3]
    assert checkpoint_rounds(run.checkpoints) == [3, 5, 6]
    stopped = setup_of(tmp_path / "s", losses=losses, rounds=6, early_stop=True, patience=2)
    assert [line["round"] for line in timeless(play(tmp_path / "s", NoisyRunner(), stopped))] == [1, 2, 3, 4, 5, 6]


def test_the_adapter_of_a_round_that_is_forgotten_gives_way_to_the_best_ones(tmp_path: Path) -> None:
    def taken_up(at: int) -> tuple[Standing, Run]:
        standing = last_standing(setup, run, lambda event, facts: None, at)
        restore_adapter(setup, run, standing)
        return standing, run

    losses = (5.0, 4.0, 6.0, 7.0, 1.0, 8.0)
    setup = replace(setup_of(tmp_path, losses=losses, rounds=6), scorer=SavedLosses(losses))
    short = replace(setup_of(tmp_path / "short", losses=losses, rounds=4), scorer=SavedLosses(losses))
    expected = play(tmp_path / "short", NoisyRunner(), short)
    # Round 5 was the best and its adapter written when the process died; this time it is not played.
    with pytest.raises(CrashError):
        play(tmp_path, NoisyRunner(crash=(6, 0)), setup)
    run = Run(tmp_path / "r")
    assert run.adapter_round == 5
    standing, _ = taken_up(4)
    assert standing.best_round == 2
    assert run.adapter_round == 2
    same_files(expected.folder, run.folder, "adapter/*")
    taken_up(0)
    assert not run.adapter.exists()


def test_no_checkpoint_is_ever_without_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_of(tmp_path, rounds=4)
    run = play(tmp_path, NoisyRunner(), setup)
    held: list[tuple[list[int], int]] = []
    remove = shutil.rmtree

    def watched(path: Path, **more: Any) -> None:
        held.append((checkpoint_rounds(run.checkpoints), len(run.metrics)))
        remove(path, **more)

    monkeypatch.setattr(shutil, "rmtree", watched)
    last_standing(setup, run, lambda event, facts: None, 3)
    assert held
    assert all(max(rounds) <= lines for rounds, lines in held)
    assert checkpoint_rounds(run.checkpoints)[-1] == len(run.metrics) == 3


def test_last_two_checkpoints_and_the_best_stay(tmp_path: Path) -> None:
    run = play(tmp_path, NoisyRunner(), setup_of(tmp_path, losses=(5.0, 1.0, 3.0, 3.0, 3.0, 3.0), rounds=6))
    assert checkpoint_rounds(run.checkpoints) == [2, 5, 6]
    assert run.best_round == 2


def test_the_adapter_is_that_of_the_best_round_at_the_largest_rank(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, losses=(5.0, 1.0, 3.0, 3.0))
    run = play(tmp_path, NoisyRunner(), setup)
    scorer: Any = setup.scorer
    saved = load_file(run.adapter / "adapter.safetensors")
    assert {m: saved[f"{m}.A"].shape[0] for m in SHAPES} == LARGE
    assert all(torch.equal(saved[f"{m}.B"], scorer.seen[1][m].B) for m in SHAPES)


@pytest.mark.parametrize(("patience", "rounds_played"), [(1, 3), (2, 4), (9, 6)])
def test_early_stop(tmp_path: Path, patience: int, rounds_played: int) -> None:
    setup = setup_of(
        tmp_path, losses=(5.0, 4.0, 4.5, 4.0, 4.2, 4.3), rounds=6, early_stop=True, patience=patience, eval_every=50
    )
    run = play(tmp_path, NoisyRunner(), setup)
    assert len(run.metrics) == rounds_played
    assert run.best_round == 2
    # what is reported is taken after the last round too, however it came to be the last
    assert run.metrics[-1]["eval"]["rougeL"] == 0.5
    assert run.metrics[0]["eval"] == {}


def test_a_diverged_loss_is_no_improvement(tmp_path: Path) -> None:
    run = play(tmp_path, NoisyRunner(), setup_of(tmp_path, losses=(float("nan"), 4.0, float("nan"), float("inf"))))
    assert run.metrics[1]["validation"]["loss"] == 4.0
    assert json.loads((run.checkpoints / "round-0004" / "state.json").read_text())["progress"]["best_round"] == 2


def test_a_client_that_fails_does_not_end_the_round(tmp_path: Path) -> None:
    probe = NoisyRunner()
    play(tmp_path / "probe", probe)
    first = probe.tasks[0].client
    runner = NoisyRunner(fail={(1, first): "out of memory"})
    run = play(tmp_path / "r", runner)
    line = run.metrics[0]
    assert [c["id"] for c in line["failed"]] == [first]
    assert line["failed"][0]["failed"] == "out of memory"
    assert first not in [c["id"] for c in line["clients"]]
    assert len(line["clients"]) == 2


def test_too_few_answers_repeat_the_round_with_others(tmp_path: Path) -> None:
    probe = NoisyRunner()
    play(tmp_path / "probe", probe)
    asked = [t.client for t in probe.tasks if t.round == 2]
    runner = NoisyRunner(fail={(2, asked[0]): "late", (2, asked[1]): "late"})
    run = play(tmp_path / "r", runner, setup_of(tmp_path / "r", min_clients=2))
    assert run.metrics[1]["attempt"] > 0
    assert len(run.metrics[1]["clients"]) >= 2


def test_nobody_answers_stops_with_the_state_saved(tmp_path: Path) -> None:
    runner = NoisyRunner(fail={(3, client): "gone" for client in TABLE})
    with pytest.raises(
        FlexLoraError, match=r"round 3: too few clients answered.*gone.*round 2 is saved.*flexlora resume"
    ):
        play(tmp_path, runner)
    assert checkpoint_rounds(tmp_path / "r" / "checkpoints")[-1] == 2
    resumed = play(tmp_path, NoisyRunner())
    alone = play(tmp_path / "alone", NoisyRunner())
    same_files(alone.folder, resumed.folder, "adapter/*")


def test_too_few_asked_are_told_by_counts(tmp_path: Path) -> None:
    """Everyone who was asked has answered."""
    with pytest.raises(
        FlexLoraError, match=r"too few clients answered in 3 attempts \(1 of 1 clients answered, 2 needed\)"
    ):
        play(tmp_path, NoisyRunner(), setup_of(tmp_path, participation=0.01, min_clients=2))


def test_energy_and_truncation_are_logged(tmp_path: Path) -> None:
    runner = NoisyRunner()
    run = play(tmp_path, runner)
    W = {m: torch.zeros(shape, dtype=torch.float64) for m, shape in SHAPES.items()}
    total = sum(u.weight for u in runner.updates[1])
    for u in runner.updates[1]:
        for m in SHAPES:
            W[m] += u.weight / total * dense(u, m)
    squares = {m: torch.linalg.svdvals(w).square() for m, w in W.items()}
    whole = sum(float(s.sum()) for s in squares.values())
    for label, kind in (("2", SMALL), ("3+6", MIXED), ("8", LARGE)):
        beyond = sum(float(squares[m][r:].sum()) for m, r in kind.items()) / whole
        assert run.metrics[0]["energy"][label] == pytest.approx(beyond, abs=1e-6)
        for client in run.metrics[1]["clients"]:
            if client["ranks"] == label:
                assert client["truncation"] == pytest.approx(beyond**0.5, abs=1e-5)


def test_a_start_adapter_is_the_first_global_model(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    start = {m: LowRank(torch.randn(a, 4, generator=g), torch.randn(4, b, generator=g)) for m, (a, b) in SHAPES.items()}
    for method in ("flexlora", "flexlora-carry", "raflora", "rbla", "flora"):
        setup = replace(setup_of(tmp_path, method=method), start=start)
        delta = setup.method.delta(first_standing(setup).state)
        for m, x in start.items():
            torch.testing.assert_close(lowrank.delta(delta[m]), lowrank.delta(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(FlexLoraError, match="init_adapter: method fedsa cannot start from"):
        first_standing(replace(setup_of(tmp_path, method="fedsa"), start=start))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("flexlora-carry", {"momentum": 0.9}),
        ("flexlora-carry", {"eta": 0.3}),
        ("hetlora", {"handle_alpha": True, "prune_lambda": 0.0}),
        ("raflora", {}),
        ("rbla", {}),
        ("rolora", {"increments": True}),
    ],
)
def test_a_start_adapter_stays_in_a_round_that_changes_nothing(
    tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    g = torch.Generator().manual_seed(0)
    start = {m: LowRank(torch.randn(a, 4, generator=g), torch.randn(4, b, generator=g)) for m, (a, b) in SHAPES.items()}
    setup = replace(setup_of(tmp_path), method=get_method(method, **options), start=start)
    state = first_standing(setup).state
    for _ in range(2):
        download = setup.method.distribute(state, LARGE)
        assert download.rule.train[0] == ("A" if method == "rolora" and state.round else "B") or method != "rolora"
        scaling = dict.fromkeys(SHAPES, 1.0)
        state = setup.method.aggregate(
            state, [ClientUpdate(0, 1.0, download.adapter, sent=download.adapter, scaling=scaling)]
        )
        for m, x in start.items():
            got = lowrank.delta(setup.method.delta(state)[m])
            torch.testing.assert_close(got, lowrank.delta(x), rtol=1e-4, atol=1e-4)


def test_one_configuration_stands_for_each_label() -> None:
    a, b, c = ({"q": 8, "k": 7, "v": 7}, {"q": 8, "k": 8, "v": 7}, {"q": 4, "k": 4, "v": 4})
    assert ranks.labelled([b, c, a, a]) == {"4": c, "8+7": a}


def test_truncation_is_that_of_the_clients_own_ranks(tmp_path: Path) -> None:
    """Two configurations of one label: the figure stands only where it is the client's."""
    table: dict[int, Ranks] = {**TABLE, 4: {"m.q_proj": 3, "m.down_proj": 6}, 3: {"m.q_proj": 3, "m.down_proj": 5}}
    assert ranks.label(table[3]) != ranks.label(table[4])
    log = RoundLog({"3+6": 0.25}, {"3+6": table[4]})
    task = TrainTask(1, 0, table[4], Download({}, {}, ClientRule()), LocalTraining(), 0)
    log.add(task, ClientFailure(0, "x"))
    log.add(replace(task, ranks={"m.q_proj": 3, "m.down_proj": 6, "m.up_proj": 6}), ClientFailure(1, "x"))
    assert [record.get("truncation") for record in log.records] == [0.5, None]


def test_adapters_travel_in_bfloat16_when_asked(tmp_path: Path) -> None:
    runner = NoisyRunner()
    play(tmp_path, runner, setup_of(tmp_path, wire_dtype="bfloat16"))
    for task in runner.tasks:
        for x in task.download.adapter.values():
            assert isinstance(x, LowRank)
            assert torch.equal(x.B, x.B.bfloat16().float())
