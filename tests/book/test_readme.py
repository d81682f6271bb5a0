"""What the README shows a newcomer works as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

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


def test_a_row_tells_task_accuracy_and_training_and_the_next_whose_weights_it_has(tmp_path: Path) -> None:
    shared = {"n_episodes": 9, "n_query": 1, "split": "random-0/test", "seed": 0, "normalization": "none"}
    stream = {"accuracy_by_instance": [0.25, 0.896, 0.963], "ci95_by_instance": [0.006, 0.0031, 0.002], "k_shot": 3}
    records = [stream | {"name": "mann-5w-stream"}, {"accuracy": 0.9, "ci95": 0.01, "k_shot": 1, "name": "mann-5w1s"}]
    records = [shared | {"n_way": 5, "transductive": False} | record for record in records]
    about = {"train_seconds": 600.0, "device": "cpu, 1 thread", "parameters": 1234, "evaluations": records}
    (tmp_path / "mann-5w-stream").mkdir()
    (tmp_path / "mann-5w-stream" / "config.json").write_text("{}")
    (tmp_path / "mann-5w-stream" / "evaluations.json").write_text(json.dumps(about))
    [_, _, *rows] = results_table(tmp_path).splitlines()
    assert [[cell.strip() for cell in row.strip("|").split("|")] for row in rows] == [
        [
            "`mann-5w-stream`",
            "5-way stream, 3 images a class",
            "1st 25.0 ± 0.6%, 2nd 89.6 ± 0.3%, 3rd 96.3 ± 0.2%",
            "10 min, cpu, 1 thread",
            "1,234",
        ],
        ["`mann-5w1s`", "5-way 1-shot", "90.0 ± 1.0%", "as above", "1,234"],
    ]
