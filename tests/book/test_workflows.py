"""What runs in public runs nobody else's code unseen: actions are pinned, credentials are not kept, data are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import sources
import yaml
from sources import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=sources.name)


def read(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


def test_there_are_workflows() -> None:
    assert {path.stem for path in WORKFLOWS} >= {"ci", "pages"}


@each_workflow
def test_every_action_is_pinned_to_a_commit_whose_version_is_said(path: Path) -> None:
    used = re.findall(r"uses: *(.*)", path.read_text(encoding="utf-8"))
    assert [line for line in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []


def test_an_action_has_one_version_everywhere() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    pins = set(re.findall(r"uses: *(\w+/[\w-]+)\S*?@(\w+ # \S+)", text))
    assert len(pins) == len({action for action, _ in pins})


@each_workflow
def test_no_checkout_keeps_its_credentials(path: Path) -> None:
    checkouts = [step for step in steps(path) if step.get("uses", "").startswith("actions/checkout@")]
    assert [step for step in checkouts if step["with"].get("persist-credentials") is not False] == []


@each_workflow
def test_a_machine_of_our_own_runs_no_pull_request(path: Path) -> None:
    workflow = read(path)
    started_by = set(workflow[True])  # YAML 1.1 reads `on` as true
    if any("self-hosted" in job["runs-on"] for job in workflow["jobs"].values()):
        assert started_by == {"workflow_dispatch"}
    assert "pull_request_target" not in started_by


@each_workflow
def test_whatever_runs_tests_or_chapters_has_the_data(path: Path) -> None:
    commands = "".join(step.get("run", "") for step in steps(path))
    if re.search(r"pytest|make (unit|test|book)|\.ci/run", commands):
        assert read(path)["env"]["METATUTOR_DATA"]
        assert "metatutor data download" in commands
