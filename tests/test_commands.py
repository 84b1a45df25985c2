"""Commands on a tiny run: what they print and write; trackers; model cards; the shell's completion."""

from __future__ import annotations

import errno
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml

from console import Command
from flexlora import ranks, rundir, tracking
from flexlora.cli import app, main
from flexlora.config import Config
from flexlora.data.tables import read_prompts
from flexlora.rundir import Run, open_run
from flexlora.spectrum import advised_ranks, spectra
from flexlora.trained import standing_at
from flexlora.types import FlexLoraError
from tiny import tiny_federation, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """Two rounds, played by the command with a tracker beside it."""
    model, data = tiny_model(folder / "M"), tiny_federation(folder / "D", 4)
    keys = {
        "model": model, "data": data, "participation": 0.5, "rounds": 2, "ranks": "random", "max_new_tokens": 4,
        "cutoff_len": 128, "validation_examples": 4, "output_dir": folder / "runs", "name": "tracked",
    }  # fmt: skip
    words = [part for name, value in keys.items() for part in (f"--{name}", str(value))]
    main(["run", *words, "--track", "tensorboard", "--quiet"])
    return open_run(folder / "runs" / "tracked")


@pytest.fixture(scope="module")
def several(folder: Path) -> Path:
    """A folder with federations of 2 and of 4 clients."""
    tiny_federation(folder / "S", 2, test=1)
    return tiny_federation(folder / "S", 4, test=2)


# --- trackers ----------------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_figures_of_every_round(run: Run) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(run.folder / "tensorboard"))
    found.Reload()
    expected: dict[str, list[tuple[int, float]]] = {}
    for step, line in enumerate([run.base, *run.metrics]):
        for name, value in tracking.figures(line).items():
            expected.setdefault(name, []).append((step, value))
    assert set(expected) <= set(found.Tags()["scalars"])
    for name, points in expected.items():
        assert [(e.step, e.value) for e in found.Scalars(name)] == [(s, pytest.approx(v, rel=1e-6)) for s, v in points]


def test_figures_of_a_round_are_flat_and_have_names_that_every_tracker_takes() -> None:
    client = {"bytes_up": 10, "bytes_down": 20}
    line = {"train_loss": 2.5, "validation": {"loss": 2.0}, "eval": {"rougeL": 0.5, "per_category": {}}}
    line |= {"clients": [client, client], "failed": [{}], "energy": {"16+48": 0.25}, "seconds": {"train": 3.0}}
    line |= {"eval_best": {"round": 1, "rougeL": 0.75, "per_category": {}}}
    assert tracking.figures(line) == {
        "train/loss": 2.5, "validation/loss": 2.0, "eval/rougeL": 0.5, "eval_best/round": 1, "eval_best/rougeL": 0.75,
        "energy/16_48": 0.25, "seconds/train": 3.0,
        "clients/answered": 2, "clients/failed": 1, "traffic/bytes_up": 20, "traffic/bytes_down": 40,
    }  # fmt: skip


class Broken:
    name = "broken"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, call: str) -> Any:
        def answer(*values: Any, **more: Any) -> None:
            self.calls.append(call)
            if call == "log":
                raise OSError("no\nnetwork")

        return answer


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_run_reaches_each_tracker_through_accelerate(run: Run, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages are not installed here: a stand-in says what accelerate's tracker handed to them."""
    package = MagicMock()
    package.search_experiments.return_value = []
    package.utils.validation.MAX_PARAM_VAL_LENGTH, package.utils.validation.MAX_PARAMS_TAGS_PER_BATCH = 6000, 100
    monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: object())
    notes = []
    with tracking.tracked([name], lambda event, facts: notes.append(event)) as observe:
        observe("start", {"folder": run.folder})
        observe("saved", {"line": run.metrics[0]})
    assert notes == ["start", "saved"]  # no note that the tracker broke
    expected = tracking.figures(run.metrics[0])
    if name == "mlflow":
        assert package.create_experiment.call_args.kwargs["name"] == "flexlora"
        assert package.start_run.call_args.kwargs["run_name"] == run.folder.name
        assert package.log_metrics.call_args.args[0] == expected
        assert package.log_metrics.call_args.kwargs == {"step": 1}
        package.end_run.assert_called_once()
    else:
        given = package.init.call_args.kwargs
        assert (given["project"], given["name"]) == ("flexlora", run.folder.name)
        package.init.return_value.log.assert_called_once_with(expected, step=1)
        package.init.return_value.finish.assert_called_once()


def test_a_tracker_that_breaks_is_left_out_and_the_run_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, seen = Broken(), []
    monkeypatch.setattr(tracking, "_tracker", lambda name, folder: broken)
    with tracking.tracked(["tensorboard"], lambda event, facts: seen.append((event, facts))) as notify:
        notify("start", {"folder": run.folder})
        notify("base", run.base)
        notify("saved", {"line": run.metrics[0]})
    assert broken.calls == ["start", "store_init_configuration", "log"]
    assert [event for event, _ in seen] == ["start", "base", "note", "saved"]
    assert seen[2][1]["text"] == "broken takes no more figures of this run: no network"


def test_trackers_are_checked_before_anything_is_written(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, said = command("run", "--data", "D", "--track", "notebook")
    assert (said, code) == (
        "flexlora: track: 'notebook' is no tracker; choose from tensorboard, wandb, mlflow, trackio\n", 2
    )  # fmt: skip
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    code, _, said = command("run", "--data", "D", "--track", "tensorboard,mlflow")
    assert (said, code) == ("flexlora: track: tensorboard is not installed; pip install tensorboard\n", 2)
    assert not list(tmp_path.iterdir())


# --- generate ----------------------------------------------------------------------------------------------------------


def test_answers_from_a_file_are_those_of_single_prompts(
    command: Command, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [("Say a word.", ""), ("Copy.", "cat"), ("Reverse the list.", "dog, cat")]
    table = tmp_path / "asked.jsonl"
    table.write_text("".join(json.dumps({"instruction": a, "input": b}) + "\n" for a, b in asked))
    target, most = str(run.folder), ("--max_new_tokens", "5")
    code, said, _ = command("generate", target, "--file", str(table), "--out", str(tmp_path / "a.jsonl"), *most)
    assert code == 0
    assert "3 answers" in said
    assert f"next: flexlora evaluate {target} --data" in said
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [(a["instruction"], a["input"]) for a in answers] == asked
    single = [command("generate", target, "--prompt", a, "--input", b, *most).said.strip("\n") for a, b in asked]
    assert [a["answer"] for a in answers] == single
    assert any(single)
    _, said, _ = command("generate", target, "--file", str(table), *most)
    shown = said.splitlines()
    assert [line for line in shown if line.startswith("> ")] == [
        "> Say a word.",
        "> Copy. cat",
        "> Reverse the list. dog, cat",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\nSay a word.\n\nSay a word.\n"))
    assert command("generate", target, *most).said == f"{single[0]}\n" * 2
    code, _, said = command("generate", target, "--file", str(table), "--out", str(tmp_path / "a.jsonl"))
    assert code == 2
    assert "exists already; choose another --out" in said


def test_the_end_of_input_ends_the_questions(command: Command, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-D at the prompt, as the empty line."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("Say a word.\n"))
    code, said, complaint = command("generate", str(run.folder), "--max_new_tokens", "2")
    assert (complaint, code) == ("", 0)
    assert said.count("> ") == 2


def test_files_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One?\n\n  Two?  \n")
    assert [(p.instruction, p.input) for p in read_prompts(tmp_path / "a.txt")] == [("One?", ""), ("Two?", "")]
    (tmp_path / "a.csv").write_text("instruction,context\nSum up,a text\n")
    assert [(p.instruction, p.input) for p in read_prompts(tmp_path / "a.csv")] == [("Sum up", "a text")]
    for name, text, remedy in (
        ("b.txt", "\n", "holds no instruction"),
        ("b.jsonl", '{"instruction": "x"}\n{"question": "y"}\n', "row 2 has no instruction"),
        ("b.json", "[3]", "row 1 has no instruction"),
        ("c.jsonl", '{"instruction": ["x"]}\n', "row 1 has no instruction"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(FlexLoraError, match=remedy):
            read_prompts(tmp_path / name)
    with pytest.raises(FlexLoraError, match="no such file"):
        read_prompts(tmp_path / "none.txt")


# --- export, inspect, evaluate -----------------------------------------------------------------------------------------


def test_cards_tell_method_data_scores_and_privacy(command: Command, run: Run, tmp_path: Path) -> None:
    best = next(line for line in run.metrics if line["round"] == run.best_round)
    counts = [client["examples"] for client in best["clients"]]
    for words, scored, use in (
        ((), True, "PeftModel.from_pretrained"),
        (("--rank", "2"), False, "PeftModel.from_pretrained"),
        (("--merge",), True, "AutoModelForCausalLM.from_pretrained"),
        (("--client", "0"), False, "What client 0 runs."),
    ):
        out = tmp_path / "-".join(("e", *words))
        assert command("export", str(run.folder), *words, "--out", str(out)).code == 0
        text = (out / "README.md").read_text()
        front = yaml.safe_load(text.split("---\n")[1])
        assert front["base_model"] == run.config.model
        assert front["library_name"] == ("transformers" if words == ("--merge",) else "peft")
        assert "| method | flexlora |" in text
        assert f"| training examples in this round | {sum(counts)} of {len(counts)} clients" in text
        assert "| prompt template | chat |" in text
        assert (f"| validation loss | {best['validation']['loss']:.4f}" in text) == scored
        assert "There is no differential privacy" in text
        assert use in text
    assert (run.adapter / "README.md").read_text() == (tmp_path / "e" / "README.md").read_text()


def test_advised_ranks_are_a_file_for_the_next_run(command: Command, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "enough.yaml"
    code, said, _ = command("inspect", str(run.folder), "--energy", "0.9", "--out", str(path))
    assert code == 0
    assert f"next: flexlora run --ranks {path}" in said
    plan = ranks.read_plan(str(path), lora_r=8, hidden_size=32)
    shapes = {m: tuple(shape) for m, shape in standing_at(run)[2]["shapes"].items()}
    ranks.refuse_stray(plan, shapes)
    found, _ = ranks.resolve(plan.types[plan.type_of(3, seed=1)], shapes)
    assert found == advised_ranks(spectra(run), 0.9)
    assert len(set(found.values())) > 1
    assert command("inspect", str(run.folder), "--out", str(path)).code == 2


def test_scores_as_json_are_those_of_the_predictions(command: Command, run: Run, tmp_path: Path) -> None:
    _, said, _ = command(
        "evaluate", str(run.folder), "--data", str(run.config.data), "--examples", "3", "--json",
        "--predictions", str(tmp_path / "p.jsonl"),
    )  # fmt: skip
    scores = json.loads(said)
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert scores["examples"] == len(lines) == 3
    assert scores["rougeL"] == pytest.approx(sum(line["rougeL"] for line in lines) / 3)


def test_one_of_several_federations_is_scored(command: Command, run: Run, several: Path, tmp_path: Path) -> None:
    words = ("evaluate", str(run.folder), "--data", str(several), "--split", "test", "--json", "--num_clients")
    for clients, examples in (("2", 2), ("4", 8)):
        _, said, _ = command(*words, clients, "--predictions", str(tmp_path / "p.jsonl"))
        assert json.loads(said)["examples"] == examples


def test_a_disk_that_refuses_at_the_end_is_one_line(
    command: Command, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rundir, "write_text", full)
    (tmp_path / "q.txt").write_text("What?\n")
    path = tmp_path / "x.out"
    for option, words in (
        ("predictions", ("evaluate", str(run.folder), "--data", str(run.config.data), "--examples", "1")),
        ("out", ("generate", str(run.folder), "--file", str(tmp_path / "q.txt"), "--max_new_tokens", "2")),
        ("out", ("inspect", str(run.folder))),
    ):
        code, _, complaint = command(*words, f"--{option}", str(path))
        assert code == 2
        assert complaint.endswith(
            f"flexlora: {path}: cannot be written: No space left on device; choose another --{option}\n"
        )


def test_inspecting_data_draws_only_when_asked(
    command: Command, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, said, _ = command("data", "inspect", str(run.config.data))
    assert "picture" not in said
    assert not list(tmp_path.iterdir())
    _, said, _ = command("data", "inspect", str(run.config.data), "--picture", "d.svg")
    assert "picture: d.svg" in said
    assert (tmp_path / "d.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("generate RUNS/frist --prompt x", "RUNS/frist: no such folder; give a run folder"),
        ("generate runs/frist --prompt x", "runs/frist: no such folder; give a run folder"),
        ("generate owner/model/adapter --prompt x", "owner/model/adapter: no such folder"),
        ("export RUN --rank 0 --out E", "rank: 0 is none; give a whole number from 1"),
        ("report", "requires an argument. See `flexlora report --help`."),
        ("data partition", "See `flexlora data partition --help`."),
        ("run --learning_rat 3", "Did you mean --learning_rate?"),
        ("generate RUN --prompt x --file y", "file: --prompt is given too"),
        ("generate RUN --prompt x --out y", "out: goes with --file"),
        ("completion csh", "Choose from"),
        ("evaluate no-model --data DATA --examples 0", "examples: 0 is none; give a whole number from 1"),
        ("evaluate no-model --data DATA --examples -1", "examples: -1 is none; give a whole number from 1"),
        ("flower init RUNS/F --sites 0", "sites: 0 is none; give a whole number from 1"),
        ("flower init RUNS/F --port 70000", "port: 70000 is none; give a whole number from 1 to 65535"),
        ("flower init RUNS/F --host föd.example", "host: 'föd.example' is neither a host name nor an address"),
        ("evaluate no-model --data DATA --predictions no/p.jsonl", "no/p.jsonl: cannot be written: no is no folder"),
        ("evaluate no-model --data DATA --predictions RUNS", "RUNS: cannot be written: is a folder; choose another"),
        ("generate no-model --file QUESTIONS --out no/a.jsonl", "no/a.jsonl: cannot be written: no is no folder"),
        ("inspect RUN --out no/e.yaml", "no/e.yaml: cannot be written: no is no folder"),
        (
            "evaluate no-model --data SEVERAL",
            "SEVERAL: holds federations of 2, 4 clients: choose one with --num_clients",
        ),
        (f"flower init RUNS/F --host {'a' * 65}", "is neither a host name nor an address"),
    ],
)
def test_errors_are_one_line_that_names_the_next_step(
    command: Command, run: Run, several: Path, words: str, line: str, tmp_path: Path
) -> None:
    (tmp_path / "q.txt").write_text("What?\n")
    places = {"RUNS": run.folder.parent, "RUN": run.folder, "DATA": run.config.data}
    for name, place in (places | {"SEVERAL": several, "QUESTIONS": tmp_path / "q.txt"}).items():
        place = str(place)
        words, line = words.replace(name, place), line.replace(name, place)
    before = sorted(run.folder.parent.iterdir())
    code, said, complaint = command(*words.split())
    assert (said, code) == ("", 2)
    assert line in complaint
    assert complaint.count("\n") == 1
    assert sorted(run.folder.parent.iterdir()) == before


# --- help and completion -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [(name,) for name in ("run", "resume", "watch", "sweep", "report", "inspect", "evaluate", "generate", "export")]
    + [("ranks",), ("data", "prepare"), ("data", "partition"), ("data", "inspect"), ("completion",)]
    + [("demo",), ("methods",), ("flower", "init")], ids=" ".join,
)  # fmt: skip
def test_help_has_an_example(command: Command, words: tuple[str, ...]) -> None:
    _, said, _ = command(*words, "--help")
    _, _, after = said.partition("For example:")
    examples = [line.strip() for line in after.splitlines() if line.strip().startswith("flexlora ")]
    assert any(f"{example} ".startswith(f"flexlora {' '.join(words)} ") for example in examples)
    assert words == ("run",) or len(said.splitlines()) <= 40


def test_a_sweep_takes_every_key_without_listing_it(command: Command) -> None:
    _, said, _ = command("sweep", "--help")
    assert "--learning_rate" not in said
    known = {name for argument in app["sweep"].assemble_argument_collection() for name in argument.names}
    assert {f"--{key}" for key in Config.model_fields} <= known


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_commands_options_and_choices(command: Command, tmp_path: Path) -> None:
    _, script, _ = command("completion", "bash")
    (tmp_path / "script").write_text(script)
    asked = {
        "re": {"report", "resume"},
        "run --learn": {"--learning_rate"},
        "run --baseline ''": {"fedavg", "fedit", "slora"},
        "data pa": {"partition"},
    }
    for words, expected in asked.items():
        ask = (
            f"source {tmp_path / 'script'}; COMP_WORDS=(flexlora {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1));"
            '_flexlora flexlora "${COMP_WORDS[COMP_CWORD]}"; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) == expected, words


def test_every_key_is_an_option_of_run() -> None:
    known = {name for argument in app["run"].assemble_argument_collection() for name in argument.names}
    assert {f"--{key}" for key in Config.model_fields} <= known


def test_resuming_a_finished_run_says_that_nothing_is_left(command: Command, run: Run) -> None:
    code, said, _ = command("resume", str(run.folder))
    rounds = run.config.rounds
    assert code == 0
    assert f"all {rounds} rounds are played: --rounds {rounds + 1} or more would go on" in said


def test_a_run_counts_once_in_a_report(command: Command, run: Run) -> None:
    again = run.folder / ".." / run.folder.name
    assert command("report", str(run.folder), str(again)) == (
        2,
        "",
        f"flexlora: {again}: is named twice; name each run once\n",
    )


def test_what_the_system_refuses_is_one_line(command: Command) -> None:
    code, said, error = command("report", "x" * 300)
    assert (code, said) == (2, "")
    assert error == f"flexlora: {'x' * 300}/config.yaml: File name too long; mend that, or name another place\n"


@pytest.mark.parametrize(
    ("memory", "then"),
    [
        ("8GB", "flexlora run --model {} --ranks auto --client_memory default=8GB …"),
        ("1MB", "flexlora ranks --model {} --memory 1MB --cutoff_len 32"),
    ],
)
def test_ranks_that_fit_or_do_not_lead_on(command: Command, run: Run, memory: str, then: str) -> None:
    model = run.config.model
    code, said, _ = command("ranks", "--model", model, "--memory", memory, "--cutoff_len", "64")
    assert code == 0
    assert f"next: {then.format(model)}" in said.replace("\n", "")


@pytest.mark.parametrize("file", ["base.json", "env.json", "contents.json"])
@pytest.mark.parametrize("text", ["[]", '{"a": ', "\x00"])
def test_a_damaged_file_of_a_run_is_one_line(command: Command, run: Run, tmp_path: Path, file: str, text: str) -> None:
    folder = Path(shutil.copytree(run.folder, tmp_path / "r"))
    (folder / file).write_text(text)
    words = ("resume", folder, "--rounds", "3") if file == "contents.json" else ("report", folder)
    code, _, error = command(*words)
    assert code == 2
    assert error.startswith(f"flexlora: {folder / file}: cannot be read (")
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["[]", '{"progress": []}', "[" * 5000])
def test_a_damaged_checkpoint_is_one_line(command: Command, run: Run, tmp_path: Path, text: str) -> None:
    folder = Path(shutil.copytree(run.folder, tmp_path / "r"))
    path = folder / "checkpoints" / f"round-{run.best_round:04d}"
    (path / "state.json").write_text(text)
    code, said, error = command("inspect", folder)
    assert (code, said) == (2, "")
    assert error.startswith(f"flexlora: {path}: is damaged (")
    assert error.count("\n") == 1
