"""The study of other libraries: what it would run, how it reads a failure, and what it recorded."""

from __future__ import annotations

import pytest
import tools
from tools import TOOLS, complaint

from metatutor.runs import study

COMPILER = """
  error: subprocess-exited-with-error
  × Building wheel did not run successfully.
      /tmp/a-b/learn/data/x.c:196:12: fatal error: longintrepr.h: No such file or directory
      error: command '/usr/bin/gcc' failed with exit code 1
ERROR: Could not build wheels
"""
TRACEBACK = """Traceback (most recent call last):
  File "/tmp/x/lib/python3.11/site-packages/a/__init__.py", line 3, in <module>
    from collections import Mapping
ImportError: cannot import name 'Mapping' from 'collections'
"""


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (COMPILER, "x.c:196:12: fatal error: longintrepr.h: No such file or directory"),
        (TRACEBACK, "ImportError: cannot import name 'Mapping' from 'collections'"),
        (
            "Collecting a\nERROR: Cannot install a because b\nERROR: ResolutionImpossible",
            "ERROR: Cannot install a because b",
        ),
        ("something\nelse", "else"),
        ("", "no message"),
    ],
)
def test_the_line_that_says_most_is_recorded(output: str, said: str) -> None:
    assert complaint(output) == said


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.package)
def test_what_is_asked_of_a_package_is_python(tool: tools.Tool) -> None:
    compile(tools.question(tool), tool.package, "exec")


def test_the_record_has_every_package_and_no_contradiction() -> None:
    rows = study("tools")
    assert [row["package"] for row in rows] == [tool.package for tool in TOOLS]
    for row in rows:
        assert row["installs"] >= row["imports"] >= row["works"]
        assert (row["error"] is None) == row["works"]


def test_an_unknown_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tools.py", "tensorflow"])
    with pytest.raises(SystemExit, match="unknown: tensorflow; known: .*higher"):
        tools.main()
