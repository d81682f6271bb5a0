"""What the README shows a newcomer works as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import sources
from readme_tables import filled, pages, runs_table, tools_table
from sources import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLES = pages(ROOT)


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


@pytest.mark.parametrize(("path", "tables"), TABLES.items(), ids=[sources.name(path) for path in TABLES])
def test_the_tables_are_up_to_date(path: Path, tables: dict[str, str]) -> None:
    text = path.read_text(encoding="utf-8")
    for region, table in tables.items():
        assert len(re.findall(f"<!-- {region} -->.*?<!-- /{region} -->", text, re.DOTALL)) == 1
        assert table
        assert filled(text, {region: "other"}) != text
    assert filled(text, tables) == text, "run `make tables`"


ARTICLE = ("1", "2", "3.1", "3.2", "3.3", "4", "5.1", "5.2", "5.3", "5.4", "6", "7", "8")


def test_every_section_of_the_article_has_its_page() -> None:
    rows = re.findall(r"^\| ([\d.]+) [^|]+\| ([^|]+) \|([^|]*)\|([^|]*)\|$", README, re.MULTILINE)
    assert tuple(section for section, *_ in rows) == ARTICLE
    toc = sources.toc_files((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    for _, page, *_ in rows:
        links = re.findall(r"\]\(([^)]+)\)", page)
        assert links and all(str(Path(link).with_suffix("")) in toc for link in links)


def test_every_link_to_a_file_of_ours_finds_it() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_a_row_tells_task_accuracy_and_training_and_the_next_whose_weights_it_has(tmp_path: Path) -> None:
    shared = {"n_episodes": 9, "n_query": 1, "split": "random-0/test", "seed": 0, "normalization": "none"}
    stream = {"accuracy_by_instance": [0.25, 0.896, 0.963], "ci95_by_instance": [0.006, 0.0031, 0.002], "k_shot": 3}
    records = [stream | {"name": "mann-5w-stream"}, {"accuracy": 0.9, "ci95": 0.01, "k_shot": 1, "name": "mann-5w1s"}]
    records = [shared | {"n_way": 5, "transductive": False} | record for record in records]
    about = {"train_seconds": 600.0, "device": "cpu, 1 thread", "parameters": 1234, "evaluations": records}
    (tmp_path / "mann-5w-stream").mkdir()
    (tmp_path / "mann-5w-stream" / "config.json").write_text("{}")
    (tmp_path / "mann-5w-stream" / "evaluations.json").write_text(json.dumps(about))
    [_, _, *rows] = runs_table(tmp_path).splitlines()
    assert [[cell.strip() for cell in row.strip("|").split("|")] for row in rows] == [
        [
            "`mann-5w-stream`",
            "5-way stream, 3 images a class",
            "1st 25.0, 2nd 89.6, 3rd 96.3%",
            "10 min",
            "1,234",
        ],
        ["`mann-5w1s`", "5-way 1-shot", "90.0 ± 1.0%", "as above", ""],
    ]


def test_a_row_tells_how_far_a_library_came(tmp_path: Path) -> None:
    shared = {
        "version": "1.0",
        "newest": "1.1",
        "released": "2020-01-02",
        "python": "3.11.7",
        "torch": "2.14.1",
        "date": "2026-11-26",
    }
    found = [
        {"package": "a", "installs": True, "imports": True, "works": True, "error": None},
        {"package": "b", "installs": True, "imports": False, "works": False, "error": "ImportError: no `b`"},
    ]
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies/tools.json").write_text(json.dumps({"rows": [shared | tool for tool in found]}))
    table = tools_table(tmp_path)
    found = re.findall(r"\| `(\w)` +\| ([\w ]+?) +\| 1.0 \(newest: 1.1\) \| 2020", table)
    assert found == [("a", "works"), ("b", "cannot be imported")]
    assert "Measured on 2026-11-26: Python 3.11.7, PyTorch 2.14.1." in table
    assert "- `b`: `ImportError: no 'b'`" in table
