"""The documentation: generated pages are up to date, the site builds, and every command in it runs or says why not."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flexlora.cli import main
from flexlora.config import Config
from flexlora.ranks import ATTENTION, DISTRIBUTIONS, PAPER_TYPES, REST, SMALL_TYPES
from tiny import tiny_model

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md"])
FAST = {"--max_new_tokens": "4", "--validation_examples": "4", "--cutoff_len": "64"}
MOST_ROUNDS = 2
BLOCK = re.compile(
    r"(?:<!-- not run(?: by the tests| here)?: (?P<reason>[^\n]+) -->\n)?```(?P<kind>sh|bash|shell|python)\n(?P<text>.*?)```",
    re.DOTALL,
)
HIDDEN = re.compile(
    r"^(?:    |```\n)(?:flexlora|pip|git|python|make|lm_eval|vllm|ray|flwr|flower-\w+|docker) .*", re.MULTILINE
)


def blocks(page: Path) -> list[tuple[str | None, list[str]]]:
    """(why it is not run or None, what it holds) of every block of a page: shell commands, or one piece of Python."""
    found: list[tuple[str | None, list[str]]] = []
    for m in BLOCK.finditer(page.read_text(encoding="utf-8")):
        lines = [x for x in m["text"].replace("\\\n", " ").splitlines() if x.strip() and x[0] != "#"]
        found.append((m["reason"], [m["text"]] if m["kind"] == "python" else lines))
    return found


def run_python(code: str, model: Path) -> None:
    """A block of Python on the tiny model, with fewer rounds."""
    code = code.replace('"smollm2"', repr(str(model)))
    code = re.sub(r"rounds=\d+", f"rounds={MOST_ROUNDS}, max_new_tokens=4, cutoff_len=64", code)
    exec(compile(code, "block", "exec"), {})


def quick(words: list[str], model: Path) -> list[str]:
    """The same command on the tiny model, with fewer rounds and tokens."""
    words = [str(model) if word == "smollm2" else word for word in words]
    if words[0] == "run":
        words += [] if "--model" in words else ["--model", str(model)]
        # A cutoff of the page's own has to leave room for as many new tokens as its readers generate.
        fast = {k: v for k, v in FAST.items() if k != "--max_new_tokens" or "--cutoff_len" not in words}
        words += [part for pair in fast.items() for part in pair if pair[0] not in words]
    if "--rounds" in words and words[0] == "run":
        at = words.index("--rounds") + 1
        words[at] = str(min(MOST_ROUNDS, int(words[at])))
    return words


def write_files(folder: Path) -> None:
    """What the pages take for granted: `dolly.jsonl`, `questions.txt`, and a federation in `data` where the page makes none."""
    kinds = {"closed_qa": "Answer", "summarization": "Sum up", "brainstorming": "Think of"}
    lines = [
        {"instruction": f"{verb} number {i}", "context": "", "response": f"It is {i}", "category": kind}
        for kind, verb in kinds.items()
        for i in range(60)
    ]
    (folder / "dolly.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "questions.txt").write_text("What is 1?\nWhat is 2?\n", encoding="utf-8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("docs") / "model")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_stand_in_blocks_that_are_run_or_say_why_not(page: Path) -> None:
    assert not HIDDEN.findall(page.read_text(encoding="utf-8")), f"{page.name}: put these into ```sh blocks"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run_in_the_order_of_the_page(
    page: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    todo = [line for reason, lines in blocks(page) if reason is None for line in lines]
    if todo:
        write_files(tmp_path)
        if not any("data partition" in line for line in todo):
            main(["data", "partition", "dolly.jsonl", "--clients", "8", "--by", "dirichlet:0.5", "--out", "data"])
    for line in todo:
        if "\n" in line:
            with contextlib.redirect_stdout(io.StringIO()):
                run_python(line, model)
            continue
        words = shlex.split(line, comments=True)
        assert words[0] == "flexlora", f"{page.name}: {line!r} is no flexlora command: say why it is not run"
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                main(quick(words[1:], model))
            except SystemExit as end:
                pytest.fail(f"{page.name}: {line!r} ends with {end.code}")
    for run in (tmp_path / "runs").glob("*/"):
        described_in_full(run)


def described_in_full(run: Path) -> None:
    """docs/run-folder.md names every file of a run, and every key of its metrics.jsonl."""
    page = (DOCS / "run-folder.md").read_text(encoding="utf-8")
    files = {f"{p.name}/" if p.is_dir() else p.name for p in run.iterdir() if not p.name.startswith(".")}
    assert not {name for name in files if not re.search(rf"^ {{6}}{re.escape(name)} ", page, re.MULTILINE)}
    for line in map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
        keys = {*line, *(key for client in line["clients"] for key in client)}
        assert not {key for key in keys if f"`{key}`" not in page}


def test_the_page_of_ranks_has_the_types_and_shares_of_the_code() -> None:
    page = (DOCS / "ranks.md").read_text(encoding="utf-8")
    found = {m[1]: m[2] for m in re.finditer(r"^\| `([\w:]+)` \| (.*) \|$", page, re.MULTILINE)}
    types = {
        name: [
            kinds[name].get(row, kinds[name][REST])
            for kinds in (PAPER_TYPES, SMALL_TYPES)
            for row in (ATTENTION[0], REST)
        ]
        for name in PAPER_TYPES
    }
    assert found == {name: " | ".join(map(str, row)) for name, row in {**types, **DISTRIBUTIONS}.items()}


def test_every_event_of_json_is_described() -> None:
    page = (DOCS / "running.md").read_text(encoding="utf-8")
    source = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "src" / "flexlora").rglob("*.py"))
    events = set(re.findall(r"notify\(\s*\"(\w+)\"", source))
    assert {m[1] for m in re.finditer(r"^\| `(\w+)` \|", page, re.MULTILINE)} == events


def test_the_pictures_are_those_that_the_code_draws() -> None:
    """But for half a pixel: another processor rounds otherwise."""
    number = re.compile(r"-?\d+\.\d+")
    for path, text in runpy.run_path(str(DOCS / "pictures.py"))["pictures"]().items():
        old = path.read_text(encoding="utf-8")
        remedy = f"{path.name} is old: run python docs/pictures.py"
        assert number.sub("", old) == number.sub("", text), remedy
        there, drawn = ([float(n) for n in number.findall(t)] for t in (old, text))
        assert there == pytest.approx(drawn, abs=0.5), remedy


def test_the_site_builds_without_a_warning_with_its_references(tmp_path: Path) -> None:
    pytest.importorskip("material")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "tutorial" / "index.html").is_file()
    pages = {p.parent.name: p.read_text(encoding="utf-8") for p in (tmp_path / "site/reference").glob("*/index.html")}
    for key in Config.model_fields:
        assert f"<code>{key}</code>" in pages["configuration"]
        assert f"--{key}" in pages["command-line"]
    for command in ("demo", "resume", "evaluate", "data partition", "flower init"):
        assert f">flexlora {command}" in pages["command-line"], command
    assert "truncate" in pages["python"]
