"""What the README shows a newcomer works as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from readme_tables import benchmark_table, by_instance, filled, results_table
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


STREAM = {
    "accuracy_by_instance": [0.25, 0.896, 0.93, 0.95, 0.963, 0.97, 0.97, 0.97, 0.97, 0.974],
    "ci95_by_instance": [0.006, 0.0031, 0.003, 0.003, 0.002, 0.002, 0.002, 0.002, 0.002, 0.0019],
}


def test_a_stream_is_shown_by_instance(tmp_path: Path) -> None:
    about = {"n_way": 5, "k_shot": 10, "train_seconds": 600.0, "device": "cpu, 1 thread", "parameters": 1234}
    (tmp_path / "omniglot-mann-5w-stream").mkdir()
    (tmp_path / "omniglot-mann-5w-stream" / "evaluation.json").write_text(json.dumps(STREAM | about))
    [*_, row] = results_table(tmp_path).splitlines()
    assert row == (
        "| `omniglot-mann-5w-stream` | 5-way stream, 10 images a class "
        "| 2nd 89.6 ± 0.3%, 5th 96.3 ± 0.2%, 10th 97.4 ± 0.2% | 10 min, cpu, 1 thread | 1,234 |"
    )


@pytest.mark.parametrize(
    ("k_shot", "shown"),
    [(1, ["1st"]), (2, ["2nd"]), (3, ["2nd", "3rd"]), (5, ["2nd", "5th"]), (7, ["2nd", "5th", "7th"])],
)
def test_the_instances_shown_are_the_second_the_fifth_and_the_last(k_shot: int, shown: list[str]) -> None:
    found = by_instance({name: values[:k_shot] for name, values in STREAM.items()})
    assert re.findall(r"\d+(?:st|nd|rd|th)", found) == shown
