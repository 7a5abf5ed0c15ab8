"""The map from bug to test in README.md is complete and names tests that exist."""

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_test_of_the_folder_is_in_the_readme_and_every_name_there_is_a_test():
    source = "\n".join(file.read_text() for file in HERE.glob("test_*_bugs.py"))
    tests = set(re.findall(r"^def (test_\w+)\(", source, re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", (HERE / "README.md").read_text()))
    on_ranks = "\n".join(file.read_text() for file in (HERE.parent / "distributed").glob("test_*.py"))
    assert named - tests - set(re.findall(r"^def (test_\w+)\(", on_ranks, re.MULTILINE)) == set()
    # A test that a mistake is caught belongs to the one above it.
    assert {name for name in tests - named if not name.endswith("caught")} == set()
