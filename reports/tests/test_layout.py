"""The plan of the house, read from its imports: arrows point down, none in a circle."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What each room may import, beside itself.
BELOW = {
    "run_store": set[str](),
    "frequency_bins": set[str](),
    "ufm": {"run_store"},  # for its command line and the runs of its sweeps alone
    "llm_experiments": {"run_store", "frequency_bins"},
    "vision_appendix": {"run_store", "frequency_bins"},
    "reports": {"run_store", "frequency_bins", "ufm", "llm_experiments", "vision_appendix"},
    "theory_tests": {"ufm", "frequency_bins"},
}
BELOW["benchmarks"] = {*BELOW}
MOST_LINES = 450
NO_SUBJECT = {"utils", "util", "helpers", "helper", "common", "misc"}


def sources(folder: Path) -> dict[str, Path]:
    """The source files of all rooms, tests left out, by the names of their modules."""
    found = {}
    for path in sorted(path for room in BELOW for path in (folder / room).rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if "tests" not in parts:
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(path: Path, modules: dict[str, Path]) -> set[str]:
    """Those of `modules` that a file imports: inside functions too, but not for its types alone."""
    names: set[str] = set()
    for node in _at_run_time(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name for name in inner if name in modules} or {str(node.module)}
    return names & modules.keys()


def _at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
            yield child
            yield from _at_run_time(child)


def faults(folder: Path) -> list[str]:
    """What does not fit the plan."""
    modules = sources(folder)
    arrows = {name: imported(path, modules) - {name} for name, path in modules.items()}
    said = [
        f"{name} imports {other}"
        for name, others in arrows.items()
        for other in sorted(others)
        if (room := name.split(".")[0]) != (to := other.split(".")[0])
        and (to not in BELOW[room] or (room == "ufm" and not _runs_sweeps(name)))
    ]
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        said.append(f"a circle: {' -> '.join(error.args[1])}")
    for name, path in modules.items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        said += [f"{name} has {lines} lines"] if lines > MOST_LINES else []
        said += [f"{name} names no subject"] if NO_SUBJECT & set(name.split(".")) else []
    return said


def _runs_sweeps(name: str) -> bool:
    return name == "ufm.__main__" or name.startswith("ufm.phase_diagram.")


def test_arrows_point_down_and_files_have_one_subject() -> None:
    assert len(sources(ROOT)) > 100
    assert faults(ROOT) == []


@pytest.mark.parametrize(
    ("room", "line", "fault"),
    [
        ("frequency_bins", "import reports.page", "frequency_bins.new imports reports.page"),
        ("run_store", "def f():\n    from ufm import law", "run_store.new imports ufm.law"),
        ("ufm", "from run_store.runs import Run", "ufm.new imports run_store.runs"),
        ("reports", "from reports import page", "a circle"),
        ("reports", "\n" * 451, "reports.new has 451 lines"),
    ],
)
def test_what_does_not_fit_is_named(room: str, line: str, fault: str, tmp_path: Path) -> None:
    for name in BELOW:
        (tmp_path / name).mkdir()
    (tmp_path / "reports" / "page.py").write_text("from reports.new import x\n")
    (tmp_path / "ufm" / "law.py").touch()
    (tmp_path / "run_store" / "runs.py").touch()
    for name in BELOW:
        (tmp_path / name / "new.py").write_text(line if name == room else "")
    assert any(fault in said for said in faults(tmp_path))
