"""What the README shows a newcomer works as it stands."""

from __future__ import annotations

import re

import pytest
from readme_tables import benchmark_table, filled, results_table
from sources import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    shorter = example.replace("iterations=200", "iterations=2").replace("n_episodes=400", "n_episodes=4")
    shorter = shorter.replace("Strokes.load()", "Strokes.load(n_alphabets=6, characters_per_alphabet=5)")
    assert shorter.count("=2)") and "n_episodes=4)" in shorter
    exec(compile(shorter, "README.md", "exec"), {})
    assert "%" in capsys.readouterr().out


def test_every_command_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    assert targets
    assert targets <= set(re.findall(r"^(\w+):", makefile, re.MULTILINE))


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^metatutor (\w+(?: download)?)", README, re.MULTILINE))))
def test_every_subcommand_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    from metatutor.cli import main

    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    assert "usage" in capsys.readouterr().out.lower()


@pytest.mark.parametrize("region", ["results", "benchmarks"])
def test_the_regions_to_fill_are_marked(region: str) -> None:
    assert len(re.findall(f"<!-- {region} -->.*?<!-- /{region} -->", README, re.DOTALL)) == 1


def test_the_tables_show_what_results_holds() -> None:
    tables = {"results": results_table(ROOT / "results"), "benchmarks": benchmark_table(ROOT / "results")}
    assert filled(README, tables) == README, "run `make tables`"
    assert filled(README, {"results": "other"}) != README
