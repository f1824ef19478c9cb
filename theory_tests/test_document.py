"""ufm/THEORY.md names only what exists, and the docstrings cite only sections that it has."""

from __future__ import annotations

import pkgutil
import re

from theory_tests.mutants import MUTANTS, ROOT

TEXT = (ROOT / "ufm" / "THEORY.md").read_text(encoding="utf-8")
GUARDS = TEXT[TEXT.index("\n## 9.") :]
PACKAGES = ("ufm", "theory_tests", "reports")


def test_every_test_and_mutant_named_exists_and_no_mutant_is_missing():
    folders = (ROOT / "ufm" / "tests", ROOT / "theory_tests")
    sources = [path.read_text(encoding="utf-8") for f in folders for path in f.rglob("test_*.py")]
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(sources), re.MULTILINE))
    assert set(re.findall(r"`(test_\w+)`", TEXT)) <= defined
    listed = re.findall(r"^- `(.+)`$", GUARDS, re.MULTILINE)
    assert sorted(listed) == sorted(mutant.name for mutant in MUTANTS)


def test_every_place_in_the_code_exists():
    places = re.findall(r"`(\w+)\.((?!py`)[\w.]+)`", GUARDS)
    assert len(places) > 30
    for module, name in places:
        pkgutil.resolve_name(f"ufm.{module}.{name}")


def test_citations_name_a_section():
    sections = set(re.findall(r"^## (\d+)\.", TEXT, re.MULTILINE))
    cited = 0
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            for after in re.findall(r"THEORY\.md,\s+(?:#\s+)?sections?\s+([\d and]+)", source):
                cited += 1
                assert set(re.findall(r"\d+", after)) <= sections, path
    assert cited > 10
