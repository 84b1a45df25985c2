"""The layout of docs/design.md holds: a file imports only from its own row or rows above, and special packages stay where they belong."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "flexlora"


def rows() -> dict[str, int]:
    """Module (or package) -> number of its row in the table of docs/design.md."""
    table = (ROOT / "docs" / "design.md").read_text().split("## Layout")[1].split("\n## ")[0]
    lines = [line.split("|") for line in table.splitlines() if line.startswith("| ") and "`" in line]
    return {name.rstrip("/"): i for i, cells in enumerate(lines) for name in re.findall(r"`([\w/]+)`", cells[2])}


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
        for path in SOURCE.rglob("*.py")
        if path.name not in ("__main__.py",)
    }


def place(module: str) -> str:
    return module.split(".")[0]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "flexlora" else {node.module}
            )
    return found


def test_every_file_has_a_row() -> None:
    known = rows()
    missing = {place(m) for m in modules()} - set(known) - {"__init__"}
    assert not missing, f"docs/design.md gives no row to {sorted(missing)}"
    gone = set(known) - {place(m) for m in modules()}
    assert not gone, f"docs/design.md names {sorted(gone)}, which do not exist"


def test_nothing_imports_downwards() -> None:
    known = rows()
    bad = []
    for module, path in modules().items():
        if place(module) not in known:
            continue
        for name in imports(path):
            if name.startswith("flexlora."):
                target = place(name.removeprefix("flexlora."))
                if target in known and known[target] > known[place(module)]:
                    bad.append(f"{module} imports {name}")
    assert not bad, "\n".join(bad)


def test_special_packages_stay_in_their_files() -> None:
    allowed = {
        "flwr": {"runners.flower"},
        "ray": {"runners.ray"},
        "peft": set(),
        "transformers": {"modeling", "gguf", "attention", "blocks", "decoding"},
        "bitsandbytes": {"nf4"},
        "dp_accounting": {"privacy"},
        "plotly": {"report"},
    }
    found: dict[str, set[str]] = {package: set() for package in allowed}
    for module, path in modules().items():
        for package in {name.split(".")[0] for name in imports(path)} & set(allowed):
            found[package].add(module)
    assert found == allowed


def test_nothing_is_unpickled() -> None:
    words = re.compile(r"\bpickle\b|torch\.load\(|\bjoblib\b|\bshelve\b|(?<![.\w] )(?<![.\w])(eval|exec)\(")
    bad = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in modules().values()
        for line in path.read_text().splitlines()
        if words.search(line) and not line.strip().startswith("def ")
    ]
    assert not bad, "\n".join(bad)
