"""The report: its figures against metrics.jsonl and the state, and the page as a browser shows it."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from flexlora import charts, lowrank
from flexlora.cli import main
from flexlora.config import Config
from flexlora.launch import run as launch
from flexlora.report import comparison_page, duration, page, run_page, table, write_report
from flexlora.rundir import Run, open_run
from flexlora.spectrum import advised_ranks, beyond, by_kind, place, spectra
from flexlora.trained import standing_at
from flexlora.types import FlexLoraError
from tiny import tiny_federation, tiny_model

CHROMIUM = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
OFFLINE = ("quic", "background-networking", "component-update", "sync")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom"),
    *(f"--disable-{what}" for what in OFFLINE),
    *("--enable-logging=stderr", "--virtual-time-budget=20000"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two seeds of flexlora and one of hetlora, two rounds each, scored every round."""
    folder = tmp_path_factory.mktemp("report")
    model, data = tiny_model(folder / "M"), tiny_federation(folder / "D", 4)
    made = []
    for method, seed in (("flexlora", 1), ("flexlora", 2), ("hetlora", 1)):
        config = Config(
            model=str(model), data=data, participation=0.5, rounds=2, ranks="random", method=method, seed=seed, eval_every=1,
            max_new_tokens=4, cutoff_len=128, validation_examples=4, output_dir=folder / "runs", name=f"{method}-{seed}",
        )  # fmt: skip
        made.append(launch(config))
    return made


def figures(page: str) -> list[dict[str, Any]]:
    found = re.search(r'id="figures">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def dom(path: Path, folder: Path) -> tuple[str, str]:
    """(the page after its scripts ran, what the browser wrote to its console)."""
    assert CHROMIUM
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def test_scores_start_with_the_base_model_at_round_0(runs: list[Run]) -> None:
    rouge, losses, *_ = charts.score_charts(runs[0])
    points = next(t for t in rouge.traces if t["name"] == "federated model")
    assert points["x"] == [0, 1, 2]
    expected = [runs[0].base["eval"]["rougeL"], *(m["eval"]["rougeL"] for m in runs[0].metrics)]
    assert points["y"] == expected
    held_out = next(t for t in losses.traces if t["name"] == "held-out")
    assert held_out["y"] == [runs[0].base["eval"]["loss"], *(m["eval"]["loss"] for m in runs[0].metrics)]


def test_every_client_of_every_round_is_drawn_once(runs: list[Run]) -> None:
    part = charts.client_charts(runs[0])[0]
    drawn = sorted((x, y) for t in part.traces for x, y in zip(t["x"], t["y"], strict=True))
    assert drawn == sorted((m["round"], c["id"]) for m in runs[0].metrics for c in m["clients"])


def test_where_no_round_was_scored_the_base_model_is_no_chart(runs: list[Run], tmp_path: Path) -> None:
    folder = tmp_path / "unscored"
    shutil.copytree(runs[0].folder, folder)
    lines = [m | {"eval": {}} for m in runs[0].metrics]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    run = open_run(folder)
    assert [chart.title for chart in charts.score_charts(run)] == ["Loss"]
    assert [t["name"] for t in charts.score_charts(run)[0].traces if "held-out" in t["name"]] == []
    assert "Held-out loss" not in [chart.title for chart in charts.comparison_charts({"g": [run]})]
    assert "No held-out scores" in run_page(run)


@pytest.mark.parametrize(("low", "labels"), [(0.02, "D2"), (1e-6, None)])
def test_a_log_axis_of_few_powers_has_whole_numbers_at_its_ticks(low: float, labels: str | None) -> None:
    layout = charts.axes("rank", "share", yaxis_type="log", yaxis_exponentformat="power")
    (chart,) = charts.drawn([charts.Chart("t", "n", [charts.line("a", [0, 1, 2], [1.0, low, None])], layout)])
    assert chart.layout["yaxis"].get("dtick") == labels
    assert (chart.layout["yaxis"]["exponentformat"] == "power") == (labels is None)


def test_spectra_are_the_singular_values_of_the_dense_delta_weight(runs: list[Run]) -> None:
    method, standing, _ = standing_at(runs[0])
    found = spectra(runs[0])
    for module, x in method.delta(standing.state).items():
        dense = torch.linalg.svdvals(x.B.double() @ x.A.double())
        k = min(len(dense), len(found[module]))
        torch.testing.assert_close(found[module][:k], dense[:k], rtol=1e-4, atol=1e-6 * float(dense[0]))


def test_energy_beyond_the_cut_is_what_metrics_say(runs: list[Run]) -> None:
    """The tail of all modules cut at one rank, against the engine's figure for clients of that rank everywhere."""
    last = runs[0].metrics[-1]
    assert runs[0].best_round == last["round"]
    tails = beyond(list(spectra(runs[0]).values()))
    for label in (label for label in last["energy"] if label.isdigit()):
        assert tails[int(label)] == pytest.approx(last["energy"][label], rel=1e-4, abs=1e-9)


def test_advised_ranks_are_the_smallest_that_keep_the_energy(runs: list[Run]) -> None:
    method, standing, _ = standing_at(runs[0])
    delta = method.delta(standing.state)
    for module, rank in advised_ranks(spectra(runs[0]), 0.9).items():
        kept, one_less = lowrank.energy_beyond(delta[module], [rank, rank - 1])
        assert kept <= 0.1 + 1e-6
        assert one_less > 0.1


def test_a_module_of_zeros_needs_rank_1() -> None:
    assert advised_ranks({"m": torch.zeros(4)}, 0.99) == {"m": 1}
    assert beyond([]) == [0.0]


def test_place_reads_the_layer_out_of_a_name() -> None:
    assert place("model.layers.12.mlp.up_proj") == ("up_proj", 12)
    assert place("proj") == ("proj", 0)


def test_modules_of_one_name_in_a_layer_are_kinds_of_their_own() -> None:
    """GPT-BigCode has c_proj twice in each layer; what is alike in its last two parts is told by more of them."""
    names = [f"h.{i}.{x}" for i in (0, 1) for x in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")]
    names += ["h.0.a.gate.w", "h.0.b.gate.w"]
    kinds = by_kind({name: torch.tensor([float(i)]) for i, name in enumerate(names)})
    assert {kind: [int(x) for x in layers.values()] for kind, layers in kinds.items()} == {
        "c_attn": [0, 3],
        "attn.c_proj": [1, 4],
        "mlp.c_proj": [2, 5],
        "a.gate.w": [6],
        "b.gate.w": [7],
    }


def test_a_band_is_mean_and_deviation() -> None:
    mean, band = charts.banded("g", {1: [1.0, 3.0], 2: [5.0]}, 0)
    assert mean["y"] == [2.0, 5.0]
    assert band["x"] == [1, 2, 2, 1]
    assert band["y"] == pytest.approx([2 - 2**0.5, 5.0, 5.0, 2 + 2**0.5])


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_run_that_diverged_is_left_out_of_means(runs: list[Run], tmp_path: Path, loss: float) -> None:
    folder = tmp_path / "diverged"
    shutil.copytree(runs[1].folder, folder)
    lines = runs[1].metrics
    for line in lines:
        line.update(train_loss=loss, validation={**line["validation"], "loss": loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert figures(write_report([runs[0].folder, folder], tmp_path / "page.html").read_text())
    drawn = {chart.title: chart.traces for chart in charts.comparison_charts({"g": [runs[0], open_run(folder)]})}
    alone = runs[0].metrics
    assert drawn["Training loss"][0]["y"] == [m["train_loss"] for m in alone]
    assert drawn["Validation loss"][0]["y"][1:] == [m["validation"]["loss"] for m in alone]
    assert len(drawn["Training loss"]) == 1  # no band


def test_a_line_alone_in_a_comparison_is_named(runs: list[Run]) -> None:
    drawn = charts.comparison_charts({"flexlora": [runs[0]]})
    assert [t["name"] for t in drawn[0].traces] == ["flexlora"]
    assert all(chart.layout["showlegend"] for chart in drawn)  # left to itself, plotly names lines from two on


def test_long_names_fit_the_legend_unless_they_would_be_alike(runs: list[Run]) -> None:
    long, other = "flexlora random " + "rounds=3 " * 9, "fedavg homo"
    (held, *_) = charts.comparison_charts({long: [runs[0]], other: [runs[0]]})
    names = [t["name"] for t in held.traces]
    assert names == [long[:59].rstrip() + "…", other]
    (held, *_) = charts.comparison_charts({long: [runs[0]], long + "x=1": [runs[0]], other: [runs[0]]})
    assert [t["name"] for t in held.traces] == [long, long + "x=1", other]


def test_one_group_is_not_called_groups(runs: list[Run]) -> None:
    assert "<h1>2 runs in 1 group</h1>" in comparison_page([runs[0], runs[0]])


def test_the_figures_are_valid_plotly(runs: list[Run]) -> None:
    go = pytest.importorskip("plotly.graph_objects")
    for figure in figures(run_page(runs[0])):
        go.Figure(data=figure["traces"], layout=figure["layout"])


def test_the_page_is_whole_and_fetches_nothing(runs: list[Run]) -> None:
    page = run_page(runs[0])
    library = re.search(r'id="library">(.*?)</script>', page, re.DOTALL)
    assert library
    assert b"Plotly" in gzip.decompress(base64.b64decode(library[1]))
    rest = page.replace(library[1], "")
    assert not re.search(r"(src|href)=", rest)
    assert "default-src 'none'" in rest
    assert "{{" not in rest


def test_a_name_cannot_break_out_of_the_page(runs: list[Run], tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    folder = tmp_path / "evil"
    shutil.copytree(runs[0].folder, folder)
    lines = runs[0].metrics
    lines[0]["failed"] = [{"id": 9, "ranks": "4", "failed": evil}]
    lines[0]["train_loss"] = float("nan")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = run_page(open_run(folder))
    assert evil not in page
    assert html.escape(evil) in page
    assert figures(page)


def test_text_that_looks_like_a_field_of_the_page_is_left_alone() -> None:
    text = "{{title}} {{figures}} {{library}} {{body}}"
    chart = charts.Chart("t", "n", [charts.line(text, [0], [1.0])])
    made = page(text, "", "", {"s": ([chart], "")}, text)
    assert made.count(text) == 4  # title, heading, chart, end
    assert figures(made)[0]["traces"][0]["name"] == text
    library = re.search(r'id="library">(.*?)</script>', made, re.DOTALL)
    assert library
    assert b"Plotly" in gzip.decompress(base64.b64decode(library[1]))


def test_without_a_checkpoint_the_page_says_what_is_missing(runs: list[Run], tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(runs[0].folder, folder, ignore=shutil.ignore_patterns("round-*"))
    page = run_page(open_run(folder))
    assert "has no checkpoint" in page
    assert "Spectrum of the global delta weight" not in page


def test_privacy_stands_in_the_report_where_it_was_asked_for(runs: list[Run], tmp_path: Path) -> None:
    assert "Privacy spent" not in run_page(runs[0])
    folder = tmp_path / "private"
    shutil.copytree(runs[0].folder, folder)
    lines = [m | {"privacy": {"epsilon": 1.5 * m["round"], "delta": 1e-5}} for m in runs[0].metrics]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    page = run_page(open_run(folder))
    assert "ε = 3.00, δ = 1e-05" in page
    spent = next(f for f in figures(page) if f["layout"]["yaxis"]["title"]["text"] == "ε")
    assert spent["traces"][0]["y"] == [1.5, 3.0]


def test_runs_without_a_round_are_refused(runs: list[Run], tmp_path: Path) -> None:
    folder = tmp_path / "fresh"
    folder.mkdir()
    shutil.copy(runs[0].folder / "config.yaml", folder)
    with pytest.raises(FlexLoraError, match="no round is finished yet"):
        write_report([folder])


def test_durations() -> None:
    assert [duration(s) for s in (4.4, 59.9, 200, 7500)] == ["4 s", "1 min 0 s", "3 min 20 s", "2 h 5 min"]


def test_table_escapes() -> None:
    assert "<b>" not in table(("a",), [("<b>",)])


def test_command_writes_the_report_prints_the_table_and_names_the_next_step(
    runs: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["report", str(runs[0].folder)])
    said = capsys.readouterr().out
    assert (runs[0].folder / "report.html").is_file()
    assert f"next: flexlora inspect {runs[0].folder}" in said
    main(["report", *(str(run.folder) for run in runs), "--out", "several.html"])
    said = capsys.readouterr().out
    assert (tmp_path / "several.html").is_file()
    assert "hetlora random fedit" in said
    main(["inspect", str(runs[0].folder), "--energy", "0.9"])
    advised = max(advised_ranks(spectra(runs[0]), 0.9).values())
    assert f"--rank {advised} " in " ".join(capsys.readouterr().out.split())


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("several", [False, True])
def test_a_browser_draws_every_chart_without_a_console_error(runs: list[Run], several: bool, tmp_path: Path) -> None:
    path = write_report([run.folder for run in (runs if several else runs[:1])], tmp_path / "page.html")
    page, console = dom(path, tmp_path / "profile")
    assert console == ""
    drawn = page.split('class="chart')[1:]
    assert len(drawn) == len(figures(path.read_text())) > 4
    for chart in drawn:
        name = re.search(r'aria-label="([^"]*)"', chart)
        assert (
            re.search(r'class="(point|trace bars|js-line|scatterlayer mlayer)"? ?[^>]*><', chart) or "<path" in chart
        ), name
        assert re.search(r'<path class="(js-line|point)', chart) or 'class="point"' in chart, name


def test_answers_that_the_demo_scored_are_drawn(runs: list[Run], tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(runs[0].folder, folder)
    pair = {
        who: {"rougeL": x, "per_category": {"copy": {"rougeL": x / 2}}}
        for who, x in (("base", 0.2), ("federated", 0.6))
    }
    (folder / "answers.json").write_text(json.dumps({"own": pair}))
    chart = charts.score_charts(open_run(folder))[0]
    assert chart.title == "Answers: own"
    assert [(t["x"], t["y"]) for t in chart.traces] == [(["all", "copy"], [0.2, 0.1]), (["all", "copy"], [0.6, 0.3])]
