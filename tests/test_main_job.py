"""The main job on a tiny model, through the command line: run, resume, evaluate, export, generate, and the original's lines."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from flexlora import Config, cli, ranks, run
from flexlora.data.federation import open_federation
from flexlora.launch import resume
from flexlora.modeling import load_model
from flexlora.rundir import Run
from flexlora.saved import save_adapter
from flexlora.trained import open_trained, records_of, score
from flexlora.types import FlexLoraError, LowRank
from tiny import tiny_federation, tiny_model

FAST = {"eval_batch_size": 4, "max_new_tokens": 4, "validation_examples": 4, "lora_dropout": 0.1, "learning_rate": 0.01}
RANKS = {"types": {"a": 2, "b": {"q_proj": 3, "down_proj": 5, "*": 4}, "c": 8}, "clients": dict(enumerate("aaabbc"))}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_model(folder / "model"), tiny_federation(folder / "data", 6)


def config(tiny: tuple[Path, Path], folder: Path, **keys: Any) -> Config:
    values = {
        "model": str(tiny[0]),
        "data": tiny[1],
        "ranks": RANKS,
        "participation": 0.5,
        "rounds": 3,
        "output_dir": folder,
        "name": "r",
        "eval_every": 3,
        **FAST,
        **keys,
    }
    return Config(**values)


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory) -> Run:
    return run(config(tiny, tmp_path_factory.mktemp("runs")))


def content(folder: Path, pattern: str) -> dict[str, str]:
    found = {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.glob(pattern))
        if p.is_file()
    }
    assert found
    return found


def timeless(done: Run) -> list[dict[str, Any]]:
    """The metrics without what a clock measured."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if k != "seconds"}
        return [clean(v) for v in value] if isinstance(value, list) else value

    return clean(done.metrics)


def test_run_folder_has_its_fixed_shape(finished: Run) -> None:
    names = {p.name for p in finished.folder.iterdir() if not p.name.startswith(".")}
    assert {"config.yaml", "env.json", "metrics.jsonl", "checkpoints", "adapter"} <= names
    assert [line["round"] for line in finished.metrics] == [1, 2, 3]
    line = finished.metrics[-1]
    assert {"round", "validation", "eval", "train_loss", "clients", "energy", "seconds"} <= set(line)
    assert set(line["seconds"]) == {"train", "aggregate", "distribute", "eval", "other"}
    assert {"id", "ranks", "examples", "loss", "seconds", "bytes_up", "bytes_down"} <= set(line["clients"][0])
    assert 0 <= line["eval"]["rougeL"] <= 1
    assert set(line["eval"]["loss_by_rank"]) == {"2", "3+4+5", "8"}
    assert set(line["energy"]) == {"2", "3+4+5", "8"}
    assert (finished.checkpoints / "round-0003" / "state.safetensors").is_file()


def test_what_is_sent_has_the_assigned_size(finished: Run, tiny) -> None:
    shapes = load_model(str(tiny[0])).shapes
    sizes = {"2": {"*": 2}, "3+4+5": {"q_proj": 3, "down_proj": 5, "*": 4}, "8": {"*": 8}}
    for line in finished.metrics:
        for client in line["clients"]:
            rank = sizes[client["ranks"]]
            floats = sum((m + n) * rank.get(name.rsplit(".", 1)[-1], rank["*"]) for name, (m, n) in shapes.items())
            # a safetensors message is its floats and a header of names
            assert 0 < client["bytes_up"] - 4 * floats < 400 * len(shapes)


def test_training_learns(finished: Run) -> None:
    assert finished.metrics[-1]["validation"]["loss"] < finished.base["validation"]["loss"] - 0.05


def test_the_adapter_loads_in_plain_peft_with_the_same_logits(finished: Run, tiny) -> None:
    from peft import PeftModel

    opened = open_trained(str(finished.folder))
    ids = torch.tensor([[5, 80, 33, 200, 41, 7]])
    with torch.no_grad():
        ours = opened.model.network(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(tiny[0])
        bare = base(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(base, finished.adapter)(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert float((ours - bare).abs().max()) > 1e-2
    ranks = {m.rsplit(".", 1)[-1]: x.A.shape[0] for m, x in opened.adapter.items()}
    assert set(ranks.values()) == {8}


def test_base_weights_stay(finished: Run, tiny) -> None:
    """A run in this process leaves the model that it trained on as it was."""
    model = load_model(str(tiny[0]))
    before = {n: p.clone() for n, p in model.network.named_parameters()}
    opened = open_trained(str(finished.folder))
    score(opened, records_of(tiny[1], "global"))
    opened.model.detach()
    after = dict(opened.model.network.named_parameters())
    assert all(torch.equal(p, after[n]) for n, p in before.items())


def test_python_and_command_line_give_the_same(command, finished: Run, tiny, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(finished.config.dump()))
    done = command("run", str(path), "--output_dir", str(tmp_path), "--name", "cli")
    assert done.code == 0, done.error
    assert "next: flexlora generate" in done.said
    other = Run(tmp_path / "cli")
    assert content(other.folder, "adapter/adapter_model*") == content(finished.folder, "adapter/adapter_model*")
    assert timeless(other) == timeless(finished)


@pytest.mark.parametrize(("baseline", "method"), [("fedit", "flexlora"), ("fedavg", "fedavg"), ("slora", "auto")])
def test_interrupted_and_resumed_equals_left_alone(tiny, tmp_path: Path, baseline: str, method: str) -> None:
    keys: dict[str, Any] = {"baseline": baseline, "method": method, "sparse_rounds": 2}
    if method == "fedavg":
        keys |= {"ranks": "homo", "lora_r": 3}
    alone = run(config(tiny, tmp_path / "alone", **keys))

    class StopError(Exception):
        pass

    def stop_in_round_3(event: str, facts: Any) -> None:
        if event == "client" and facts["round"] == 3:
            raise StopError

    with pytest.raises(StopError):
        run(config(tiny, tmp_path / "cut", **keys), stop_in_round_3)
    assert len(Run(tmp_path / "cut" / "r").metrics) == 2
    resumed = resume(tmp_path / "cut" / "r")
    assert content(alone.folder, "adapter/*") == content(resumed.folder, "adapter/*")
    assert content(alone.folder, "checkpoints/*/*.safetensors") == content(
        resumed.folder, "checkpoints/*/*.safetensors"
    )
    assert timeless(alone) == timeless(resumed)


def test_resume_epoch_goes_on_from_that_round(tiny, tmp_path: Path) -> None:
    run(config(tiny, tmp_path, rounds=2, eval_every=0))
    grown = run(config(tiny, tmp_path, rounds=3, eval_every=0, resume_epoch=2))
    assert [line["round"] for line in grown.metrics] == [1, 2, 3]
    with pytest.raises(FlexLoraError, match="resume_from: round 9 has no checkpoint"):
        run(config(tiny, tmp_path, rounds=3, eval_every=0, resume_epoch=9))


def test_from_the_start_a_run_is_the_run_that_it_was(tiny, tmp_path: Path) -> None:
    data = tiny_federation(tmp_path / "data", 6)
    done = run(config((tiny[0], data), tmp_path, rounds=2, eval_every=0))
    before = content(done.folder, "**/*")
    with pytest.raises(FlexLoraError, match="method is 'hetlora' now and was 'auto'"):
        run(config((tiny[0], data), tmp_path, rounds=2, eval_every=0, method="hetlora", resume_from=0))
    name = data / "6" / "global_test.json"
    kept = name.read_text()
    name.write_text(kept.replace("word", "term"))
    with pytest.raises(FlexLoraError, match=r"global_test\.json: changed since the run began"):
        run(config((tiny[0], data), tmp_path, rounds=2, eval_every=0, resume_from=0))
    assert content(done.folder, "**/*") == before
    name.write_text(kept)
    again = run(config((tiny[0], data), tmp_path, rounds=2, eval_every=0, resume_from=0))
    states = content(again.folder, "checkpoints/*/*.safetensors")
    assert len(states) == 2
    assert states.items() <= before.items()


def test_other_weights_and_another_template_under_the_same_name_are_refused(tiny, tmp_path: Path) -> None:
    model, template = tiny_model(tmp_path / "model"), tmp_path / "mine.json"
    texts = {"prompt_input": "{instruction} {input} A:", "prompt_no_input": "{instruction} A:", "response_split": "A:"}
    template.write_text(json.dumps(texts))
    run(config((model, tiny[1]), tmp_path, rounds=1, eval_every=0, prompt_template=str(template)))
    template.write_text(json.dumps({**texts, "prompt_input": "{input} {instruction} A:"}))
    with pytest.raises(FlexLoraError, match=r"the template .*mine\.json changed since the run began"):
        resume(tmp_path / "r", rounds=2)
    template.write_text(json.dumps({**texts, "description": "the same texts"}))
    tiny_model(model, seed=1)
    with pytest.raises(FlexLoraError, match=r"the weights of .*model changed since the run began"):
        resume(tmp_path / "r", rounds=2)
    tiny_model(model)
    assert len(resume(tmp_path / "r", rounds=2).metrics) == 2
    run(config((model, tiny[1]), tmp_path, rounds=1, eval_every=0, name="chat", prompt_template="chat"))
    chat = model / "chat_template.jinja"
    chat.write_text("Well: " + chat.read_text())
    with pytest.raises(FlexLoraError, match="the template chat changed since the run began"):
        resume(tmp_path / "chat", rounds=2)


def test_rounds_can_only_grow_and_are_not_less_than_the_round_gone_on_from(finished: Run, tiny, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "r")
    before = content(tmp_path / "r", "**/*")
    for rounds in (2, 0, -1):
        with pytest.raises(FlexLoraError, match=rf"rounds: .* has 3 rounds, and {rounds} are fewer; --rounds can only"):
            resume(tmp_path / "r", rounds=rounds)
    with pytest.raises(FlexLoraError, match="rounds: 2 are fewer than resume_from 3; raise --rounds"):
        run(config(tiny, tmp_path, rounds=2, resume_from=3))
    assert content(tmp_path / "r", "**/*") == before


def test_a_run_that_grew_and_was_cut_off_goes_on_to_its_new_end(tiny, tmp_path: Path, command) -> None:
    run(config(tiny, tmp_path, rounds=1, eval_every=0))
    folder = tmp_path / "r"

    def cut_off(event: str, facts: Any) -> None:
        if event == "saved" and facts["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resume(folder, rounds=3, notify=cut_off)
    assert len(Run(folder).metrics) == 2
    code, _, _ = command("resume", str(folder))
    assert code == 0
    assert len(Run(folder).metrics) == 3
    assert Run(folder).config.rounds == 3


def test_a_run_that_stopped_early_goes_on_where_it_is_given_more_rounds(tiny, tmp_path: Path) -> None:
    keys = {"early_stop": True, "patience": 1, "learning_rate": 1e-30, "lora_dropout": 0.0}
    done = run(config(tiny, tmp_path, rounds=5, eval_every=0, **keys))
    played = len(done.metrics)
    assert played < 5
    assert done.metrics[-1]["stopped"]
    assert len(resume(done.folder).metrics) == played
    assert len(resume(done.folder, rounds=6).metrics) > played


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"method": "fedsa"}, "init_adapter: method fedsa cannot start from an adapter"),
        ({"baseline": "slora"}, "method slora before flexlora cannot start from it .*and --baseline fedit"),
    ],
)
def test_a_start_that_the_method_cannot_take_leaves_no_run_behind(
    finished: Run, tiny, tmp_path: Path, keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(FlexLoraError, match=words):
        run(config(tiny, tmp_path, init_adapter=finished.adapter, **keys))
    assert not list(tmp_path.iterdir())


def test_a_template_that_the_model_does_not_have_leaves_no_run_behind(tiny, tmp_path: Path) -> None:
    model = shutil.copytree(tiny[0], tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    with pytest.raises(FlexLoraError, match="template"):
        run(config((model, tiny[1]), tmp_path / "runs", prompt_template="chat"))
    assert not list((tmp_path / "runs").glob("*/config.yaml"))


def test_a_run_taken_back_has_the_adapter_of_its_best_round(tiny, tmp_path: Path) -> None:
    long = run(config(tiny, tmp_path / "long", rounds=3, eval_every=0))
    short = run(config(tiny, tmp_path / "short", rounds=2, eval_every=0))
    assert (long.best_round, short.best_round) == (3, 2)
    back = run(config(tiny, tmp_path / "long", rounds=2, eval_every=0, resume_from=2))
    assert content(back.folder, "adapter/*") == content(short.folder, "adapter/*")
    assert back.config.rounds == 2


def test_evaluate_gives_the_number_of_the_log(command, finished: Run, tiny, tmp_path: Path) -> None:
    best = finished.metrics[-1]
    assert finished.best_round == 3
    scores = score(open_trained(str(finished.folder)), records_of(tiny[1], "global"))
    assert scores.rougeL == best["eval"]["rougeL"]
    assert scores.loss == pytest.approx(best["eval"]["loss"], abs=1e-6)
    done = command("evaluate", str(finished.folder), "--data", str(tiny[1]), "--predictions", str(tmp_path / "p.jsonl"))
    assert done.code == 0, done.error
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(lines) == best["eval"]["examples"]
    assert sum(line["rougeL"] for line in lines) / len(lines) == pytest.approx(best["eval"]["rougeL"])


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_export_at_any_rank_is_the_best_approximation(command, finished: Run, tmp_path: Path, rank: int) -> None:
    done = command("export", str(finished.folder), "--rank", str(rank), "--out", str(tmp_path / "e"))
    assert done.code == 0, done.error
    whole = open_trained(str(finished.folder)).adapter
    small = open_trained(str(tmp_path / "e"), {"model": finished.config.model}).adapter
    for module, x in whole.items():
        W = x.B.double() @ x.A.double()
        optimum = float(torch.linalg.svdvals(W)[rank:].square().sum().sqrt())
        got = float((W - small[module].B.double() @ small[module].A.double()).norm())
        assert small[module].A.shape[0] == rank
        assert got <= optimum + 1e-5 * float(W.norm())


def test_export_of_a_client_has_its_ranks(command, finished: Run, tmp_path: Path) -> None:
    done = command("export", str(finished.folder), "--client", "3", "--out", str(tmp_path / "e"))
    assert done.code == 0, done.error
    adapter = open_trained(str(tmp_path / "e")).adapter
    assert {m.rsplit(".", 1)[-1]: x.A.shape[0] for m, x in adapter.items()}["q_proj"] == 3


def test_export_merged_answers_like_the_adapter(command, finished: Run, tmp_path: Path) -> None:
    done = command("export", str(finished.folder), "--rank", "999", "--out", str(tmp_path / "all"))
    assert (
        "at rank 999 in every module, or at the largest that its shape allows."
        in (tmp_path / "all" / "README.md").read_text()
    )
    done = command("export", str(finished.folder), "--merge", "--out", str(tmp_path / "m"))
    assert "model shards" not in done.error
    assert done.code == 0, done.error
    ids = torch.tensor([[5, 80, 33, 200, 41, 7]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")(input_ids=ids).logits
        ours = open_trained(str(finished.folder)).model.network(input_ids=ids).logits
    torch.testing.assert_close(merged, ours, rtol=1e-4, atol=1e-4)


def test_generate_streams_an_answer(command, finished: Run) -> None:
    done = command("generate", str(finished.folder), "--prompt", "Say a word.", "--max_new_tokens", "3")
    assert done.code == 0, done.error


def test_init_adapter_starts_there(finished: Run, tiny, tmp_path: Path) -> None:
    warm = run(config(tiny, tmp_path, init_adapter=finished.adapter, rounds=1, learning_rate=1e-8, eval_every=0))
    assert warm.metrics[0]["validation"]["loss"] == pytest.approx(finished.metrics[-1]["validation"]["loss"], abs=0.02)


ORIGINAL_LINES = {
    "1": "run --model M --baseline fedavg --aggregation homo --data_path D",
    "2": "run --model M --baseline fedavg --aggregation normal --data_path D",
    "3": "run --model M --baseline slora --aggregation normal --data_path D",
    "4": "run --method hetlora --model M --baseline fedavg --aggregation normal --data_path D",
}


@pytest.mark.parametrize("line", ORIGINAL_LINES)
def test_the_original_command_lines(command, tiny, tmp_path: Path, line: str) -> None:
    words = ORIGINAL_LINES[line].replace(" M ", f" {tiny[0]} ").replace(" D", f" {tiny[1]}").split()
    small = [
        "--num_communication_rounds",
        "2",
        "--client_selection_frac",
        "1",
        "--session_name",
        "s",
        "--eval_every",
        "0",
    ]
    more = ["--local_learning_rate", "0.001", "--R_1", "1", "--early_stop", "false", "--validation_examples", "4"]
    done = command(*words, *small, *more, "--output_dir", str(tmp_path))
    assert done.code == 0, done.error
    found = Run(tmp_path / "s")
    assert len(found.metrics) == 2
    assert found.config.early_stop is False
    assert found.config.method_name == {"1": "fedavg", "4": "hetlora"}.get(line, "flexlora")
    # In the first round: later hetlora's clients may have pruned.
    trained = {c["id"]: c["ranks"] for c in found.metrics[0]["clients"]}
    plan = ranks.read_plan("homo" if line == "1" else "normal", lora_r=8, hidden_size=32)
    shapes = load_model(str(tiny[0]), targets=found.config.lora_target_modules).shapes
    drawn = {i: ranks.resolve(plan.types[plan.type_of(i, found.config.seed)], shapes)[0] for i in range(6)}
    assert trained == {i: ranks.label(mine) for i, mine in drawn.items()}
    assert len(set(trained.values())) == (1 if line == "1" else 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run --data D --rounds x", "rounds: input should be a valid integer"),
        ("run --data D --rouns 3", "Unknown option"),
        ("run --data nowhere", "nowhere: no such folder"),
        ("run --rounds 2", "data: no folder given"),
        ("run --data D --method flexlorra", "did you mean flexlora?"),
        ("run --data D --method fedavg --ranks random", "needs equal ranks"),
        ("run --data D --ranks hevy", "neither a file nor one of homo"),
        ("run --data D --prompt_template alpacca", "did you mean alpaca"),
        ("run --data D --num_clients 9", "clients"),
        ("run --data D --model M --lora_target_modules w_proj", "w_proj"),
        ("run no.yaml", "no.yaml: no such file"),
        ("resume D", "is no run folder"),
        ("evaluate M --data nowhere", "nowhere"),
        ("export D --rank 4 --out E", "is no run folder"),
        ("run --data D --model M --init_adapter nowhere", "nowhere"),
        ("run --data D --method ffa --method_options eta=1", "has no option 'eta'"),
        ("run --data D --method slora --method_options then=5", "method 5 does not exist"),
        ("run --data D --method_options name=x", "method 'flexlora' has no option 'name'"),
        ("run --data D --client_memory 0=2GB", "client_memory: is for --ranks auto; add that, or leave it out"),
        ("run --data D --ranks auto --client_memory 7=2GB default=1GB", "client_memory: names client 7"),
        ("run --data D --ranks auto --client_memory defualt=1GB", "client_memory: names client defualt"),
        ("ranks homo --lora_r -8", "lora_r: input should be greater than or equal to 1"),
        ("ranks --model M --cutoff_len -1", "cutoff_len: input should be greater than or equal to 8"),
        ("ranks --model M --micro_batch_size 0", "micro_batch_size: input should be greater than or equal to 1"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tiny, tmp_path: Path, capsys, monkeypatch, words: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    line = [str({"M": tiny[0], "D": tiny[1]}.get(word, word)) for word in words.split()]
    with pytest.raises(SystemExit) as caught:
        cli.main(line)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_prompts_that_are_cut_are_counted_and_told(tiny, tmp_path: Path, command) -> None:
    words = ["run", "--model", str(tiny[0]), "--data", str(tiny[1]), "--rounds", "2", "--participation", "1"]
    more = [
        "--cutoff_len",
        "40",
        "--eval_every",
        "0",
        "--validation_examples",
        "2",
        "--output_dir",
        str(tmp_path),
        "--name",
        "r",
    ]
    done = command(*words, *more)
    assert done.code == 0, done.error
    clients = Run(tmp_path / "r").metrics[0]["clients"]
    assert all(0 < c["cut_examples"] <= c["examples"] and c["cut"] >= c["cut_examples"] for c in clients)
    assert done.said.count("prompts were cut to fit cutoff_len") == len(clients)


def test_auto_gives_each_client_the_largest_type_that_its_memory_affords(tiny, tmp_path: Path) -> None:
    from flexlora.memory import Workload, type_memories
    from flexlora.modeling import empty_model
    from flexlora.ranks import SMALL_TYPES, RankPlan

    needed = type_memories(empty_model(str(tiny[0])), RankPlan(SMALL_TYPES), Workload(2, 64, "adamw", 0.1))
    budgets = sorted(m.total for m in needed.values())
    memory = {"0": budgets[0], "1": budgets[1] - 1, "2": str(budgets[1]), "default": "1TB"}
    keys = {
        "ranks": "auto",
        "client_memory": memory,
        "cutoff_len": 64,
        "rounds": 1,
        "participation": 1.0,
        "eval_every": 0,
    }
    done = run(config(tiny, tmp_path, **keys))
    got = {c["id"]: c["ranks"] for c in done.metrics[0]["clients"]}
    assert (got[0], got[1], got[2]) == ("4", "4", "16")
    assert {got[3], got[4], got[5]} == {"32+16"}
    # flora sends a term for the base as well, up to full rank: matrices of 32 x 32, 32 x 16 and 32 x 48, held twice in float32
    beside = 2 * 4 * 2 * (2 * 32 * (32 + 32) + 2 * 16 * (32 + 16) + 3 * 32 * (32 + 48))
    memory = {"0": budgets[1] + beside - 1, "default": budgets[1] + beside}
    done = run(config(tiny, tmp_path, **{**keys, "client_memory": memory, "name": "flora", "method": "flora"}))
    assert [c["ranks"] for c in done.metrics[0]["clients"]] == ["4", *["16"] * 5]
    for stated, line in (
        ({"0": "1GB"}, "client 1 has stated none"),
        ({"default": "1MB"}, "cannot train even the smallest"),
    ):
        with pytest.raises(FlexLoraError, match=line):
            run(config(tiny, tmp_path, **{**keys, "client_memory": stated, "name": "bad"}))
    assert not (tmp_path / "bad" / "config.yaml").exists()


def test_ranks_of_a_client_that_there_is_not_are_refused(tiny, tmp_path: Path) -> None:
    ranks = {"types": {"small": 2, "large": 8}, "shares": {"small": 1.0}, "clients": {6: "large"}}
    for method in ("flexlora", "fedavg"):
        with pytest.raises(FlexLoraError) as caught:
            run(config(tiny, tmp_path, ranks=ranks, method=method))
        assert str(caught.value) == "ranks: names client 6, and the clients are 0 to 5; mend that, or leave it out"
    assert not list(tmp_path.iterdir())


def test_one_client_a_round_is_told_unless_it_was_asked_for(tiny, tmp_path: Path) -> None:
    notes: list[str] = []

    def note(event: str, facts: Any) -> None:
        if event == "note":
            notes.append(facts["text"])

    stated = config(tiny, tmp_path, rounds=1, eval_every=0, participation=0.2)
    run(stated, note)
    assert not [text for text in notes if "participation" in text]
    unsaid = {k: v for k, v in stated.dump().items() if k in stated.model_fields_set and k != "participation"}
    run(Config(**{**unsaid, "name": "unsaid"}), note)
    assert [text for text in notes if "participation" in text] == [
        "participation 0.05 draws one of 6 clients a round, so that nothing is averaged; raise --participation"
    ]


def test_what_bfloat16_would_spare_is_told_where_it_does(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = tiny_model(tmp_path / "large", hidden_size=256, num_hidden_layers=1)
    told: list[tuple[str, str, str]] = []

    def note(event: str, facts: Any) -> None:
        if event == "note" and "precision bfloat16" in facts["text"]:
            told.append((processor, size, precision))

    for processor, flags in {"native": "fma avx512_bf16 amx_tile", "amx": "amx_bf16", "none": "avx2 fma"}.items():
        monkeypatch.setattr("flexlora.processor._described", lambda flags=flags: f"flags : {flags}\n")
        for size, folder in {"tiny": tiny[0], "large": large}.items():
            for precision in ("auto", "float32", "bfloat16"):
                keys = {"rounds": 1, "eval_every": 0, "validation_examples": 1, "precision": precision}
                name = f"{processor}-{size}-{precision}"
                run(config((folder, tiny[1]), tmp_path, name=name, participation=0.2, **keys), note)
    assert told == [("native", "large", "auto"), ("amx", "large", "auto")]
    monkeypatch.setattr("flexlora.processor._described", lambda: "amx_bf16")
    assert load_model(str(large)).faster_in_bfloat16
    assert not load_model(str(large), precision="bfloat16").faster_in_bfloat16


def test_the_next_step_of_personal_models_is_one_that_they_can_take(tiny, tmp_path: Path, command) -> None:
    words = ["--data", str(tiny[1]), "--participation", "0.5", "--rounds", "1", "--method", "fedsa"]
    folder = tmp_path / "personal"
    done = command(
        "run", "--model", str(tiny[0]), *words, "--output_dir", str(tmp_path), "--name", "personal", "--eval_every", "0"
    )
    assert f"next: flexlora evaluate {folder} --client 0 --data …\n      flexlora report {folder}\n" in done.said
    done = command(
        "evaluate", str(folder), "--client", "0", "--data", str(tiny[1]), "--examples", "1", "--max_new_tokens", "2"
    )
    assert done.code == 0, done.error


def test_a_taken_name_is_refused(finished: Run, tiny) -> None:
    with pytest.raises(FlexLoraError, match="a run stands there already"):
        run(finished.config)


def test_data_that_changed_is_refused(tiny, tmp_path: Path) -> None:
    data = tiny_federation(tmp_path / "data", 6)
    run(config((tiny[0], data), tmp_path, rounds=1, eval_every=0))
    federation = open_federation(data)
    path = federation.folder / "local_training_0.json"
    for name in federation.folder.glob("local_training_*.json"):
        records = json.loads(name.read_text())
        records[0]["output"] = "changed"
        name.write_text(json.dumps(records))
    with pytest.raises(FlexLoraError, match=r"local_training_\d\.json: changed since the run began"):
        resume(tmp_path / "r", rounds=2)
    assert path.is_file()


Q = "model.layers.0.self_attn.q_proj"


def cut_off_in_round_1(tiny: tuple[Path, Path], folder: Path, **keys: Any) -> Path:
    """The folder of a run that has no checkpoint yet."""

    class StopError(Exception):
        pass

    def stop(event: str, facts: Any) -> None:
        if event == "client":
            raise StopError

    with pytest.raises(StopError):
        run(config(tiny, folder, rounds=1, eval_every=0, **keys), stop)
    return folder / "r"


@pytest.mark.parametrize("what", ["data", "base", "ranks", "start"])
def test_contents_that_changed_before_the_first_checkpoint_are_refused(tiny, tmp_path: Path, what: str) -> None:
    model, data = Path(shutil.copytree(tiny[0], tmp_path / "model")), tiny_federation(tmp_path / "data", 6)
    plan, keys = tmp_path / "ranks.yaml", {}
    plan.write_text("types: {a: 2}\nshares: {a: 1.0}\n")
    if what == "start":
        keys["init_adapter"] = tmp_path / "start"
        save_adapter(tmp_path / "start", {Q: LowRank(torch.ones(32, 2), torch.ones(2, 32))}, base_model="m")
    folder = cut_off_in_round_1((model, data), tmp_path, ranks=str(plan), **keys)
    if what == "data":
        for name in open_federation(data).folder.glob("local_eval_*.json"):
            name.write_text(name.read_text().replace('"output": "', '"output": "other '))
    elif what == "base":
        tiny_model(tmp_path / "model", seed=5)
    elif what == "ranks":
        plan.write_text("types: {a: 3}\nshares: {a: 1.0}\n")
    else:
        save_adapter(tmp_path / "start", {Q: LowRank(torch.ones(32, 2), torch.zeros(2, 32))}, base_model="m")
    for at in (None, 0):
        with pytest.raises(FlexLoraError, match="changed since the run began"):
            resume(folder, at=at)


def test_a_run_whose_checkpoints_are_gone_is_left_as_it_is(tiny, tmp_path: Path) -> None:
    made = run(config(tiny, tmp_path, rounds=2, eval_every=0))
    shutil.rmtree(made.checkpoints)
    before = content(made.folder, "**/*.*")
    with pytest.raises(FlexLoraError, match="checkpoints: no checkpoint is left of 2 rounds; put them back"):
        resume(made.folder)
    assert content(made.folder, "**/*.*") == before
    assert resume(made.folder, at=0).metrics[-1]["round"] == 2  # who says so plays it again


def test_client_starts_from_the_best_approximation_with_mixed_alphas() -> None:
    """Σ p_i (α_i/r_i) B_i A_i with the fold as `Model.read` makes it, for clients of different rank and alpha."""
    from flexlora.methods import get_method
    from flexlora.modeling import scaling
    from flexlora.types import ClientUpdate

    g = torch.Generator().manual_seed(3)
    shapes, clients = {"m": (20, 30)}, [(3, 16.0, 5.0), (8, 4.0, 1.0), (1, 32.0, 2.0)]
    updates, W = [], torch.zeros(20, 30, dtype=torch.float64)
    for number, (r, alpha, weight) in enumerate(clients):
        lora_B, lora_A = torch.randn(20, r, generator=g), torch.randn(r, 30, generator=g)
        s = scaling(alpha, r, "alpha_over_r")
        assert s == alpha / r
        updates.append(ClientUpdate(number, weight, {"m": LowRank(s * lora_B, lora_A)}))
        W += weight / 8.0 * (alpha / r) * lora_B.double() @ lora_A.double()
    method = get_method("flexlora")
    state = method.aggregate(method.init(shapes, 1), updates)
    for rank in (1, 3, 8, 12):
        sent = method.distribute(state, {"m": rank}).adapter["m"]
        assert isinstance(sent, LowRank)
        U, S, Vt = torch.linalg.svd(W)
        best = U[:, :rank] @ torch.diag(S[:rank]) @ Vt[:rank]
        assert float((sent.B.double() @ sent.A.double() - best).norm()) <= 1e-5 * float(W.norm())


def test_resume_epoch_without_a_name_takes_the_newest_run_of_these_settings(tiny, tmp_path: Path) -> None:
    keys = {"name": None, "eval_every": 0, "method": "flexlora"}
    for _ in range(2):
        run(config(tiny, tmp_path, rounds=1, **keys))
    grown = run(config(tiny, tmp_path, rounds=2, resume_epoch=1, **keys))
    assert grown.folder == tmp_path / "flexlora-map-42-2"
    assert len(grown.metrics) == 2
    (tmp_path / "flexlora-map-42-10").mkdir()  # no run
    assert sorted(p.name for p in tmp_path.iterdir() if (p / "config.yaml").exists()) == [
        "flexlora-map-42", "flexlora-map-42-2"
    ]  # fmt: skip
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FlexLoraError) as caught:
            run(config(tiny, folder, resume_epoch=1, seed=7, **keys))
        assert str(caught.value) == f"resume_from: no run of these settings is in {folder}; name it with --name"


def test_options_win_over_a_file_that_uses_old_names(tiny, tmp_path: Path, command) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump({"data_path": "none", "global_model": str(tiny[0]), "num_communication_rounds": 9}))
    words = ("--data", str(tiny[1]), "--rounds", "1", "--eval_every", "0", "--output_dir", str(tmp_path), "--name", "o")
    code, _, complaint = command("run", str(path), *words, "--participation", "0.2", "--quiet")
    assert (code, complaint) == (0, "")
    done = Run(tmp_path / "o")
    assert (done.config.data, done.config.model, len(done.metrics)) == (tiny[1], str(tiny[0]), 1)
    path.write_text("data_path: a\ndata: b\n")
    code, _, complaint = command("run", str(path), "--rounds", "1")
    assert (code, complaint) == (
        2,
        f"flexlora: {path}: data is given twice (once under its old name): keep one of them\n",
    )
