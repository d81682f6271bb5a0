"""The benchmarks of one step compare like with like. Nothing here looks at times."""

import json
import os
import pickle
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from timeit import timeit
from types import ModuleType

import commits
import harness
import maml_step
import mann_stream
import pytest
import threads
import torch
from maml_step import Config, Setting, check, main, plain_loop
from psutil import Process

SMALL = Config(settings=("strided-1q-1s",), peers=("plain loop",), rounds=1, tasks=2, filters=8)


def test_all_that_are_installed_give_the_same_gradient() -> None:
    names, _ = harness.chosen(Config(), maml_step.IMPLEMENTATIONS, maml_step.PACKAGES)
    differences = check(Setting("pooled-1q-5s", tasks=2, filters=8, device="cpu"), names)
    assert {"metatutor", "plain loop"} <= set(differences)


def test_peers_that_are_missing_are_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda module: None)
    names, missing = harness.chosen(Config(), maml_step.IMPLEMENTATIONS, maml_step.PACKAGES)
    assert names == ["metatutor", "plain loop"]
    assert missing == list(maml_step.PACKAGES)


def test_a_wrong_gradient_stops_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(maml_step.IMPLEMENTATIONS, "wrong", partial(plain_loop, second_order=False))
    with pytest.raises(SystemExit, match="the gradient of wrong is off by"):
        check(Setting("strided-1q-1s", tasks=2, filters=8, device="cpu"), ["metatutor", "wrong"])


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    main(replace(SMALL, json=file))
    ours, loop = json.loads(file.read_text())
    assert set(ours) == {"setting", "implementation", "milliseconds", "ratio", "peak_mib"}
    assert (ours["implementation"], loop["implementation"]) == ("metatutor", "plain loop")
    assert ours["ratio"] == 1.0
    assert loop["ratio"] == pytest.approx(loop["milliseconds"] / ours["milliseconds"])
    assert "fastest peer, plain loop" in capsys.readouterr().out


def test_recomputing_is_measured_as_the_same_gradient() -> None:
    setting = Setting("strided-1q-2s", tasks=2, filters=8, device="cpu")
    assert check(setting, ["metatutor-recompute"])["metatutor-recompute"] < 1e-10


def test_chunks_of_the_outer_loop_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours takes as many tasks at once as training would, here one: still the same gradient."""
    asked: list[int] = []
    monkeypatch.setattr(maml_step.MAML, "tasks_at_once", lambda learner, episode: asked.append(len(episode)) or 1)
    assert check(Setting("strided-1q-1s", tasks=3, filters=8, device="cpu"), ["metatutor"])["metatutor"] < 1e-10
    assert asked == [3]


def test_a_variant_takes_as_many_tasks_at_once_as_its_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    loss = maml_step.MAML.meta_loss
    monkeypatch.setattr(maml_step.MAML, "meta_loss", lambda ours, part: taken.append(len(part)) or loss(ours, part))
    name = "metatutor-2-at-once"
    assert check(Setting("strided-1q-1s", tasks=4, filters=8, device="cpu"), [name])[name] < 1e-10
    assert taken == [2, 2]


@pytest.mark.parametrize("script", [maml_step, mann_stream, threads])
def test_unknown_names(script: ModuleType) -> None:
    for config, message in (
        (script.Config(peers=("nobody",)), "no such peer: nobody"),
        (script.Config(variants=("faster",)), "no such variant: faster"),
        (script.Config(settings=("wide-1q-1s",)), "no such setting: wide-1q-1s"),
    ):
        with pytest.raises(SystemExit, match=message):
            script.main(config)


# --- the stream ----------------------------------------------------------------------------------------------------

STREAMS = mann_stream.Setting("5w-2i", tasks=2, device="cpu")


def test_ours_and_the_plain_loop_give_the_same_gradient_of_a_stream() -> None:
    differences = mann_stream.check(STREAMS, list(mann_stream.IMPLEMENTATIONS))
    assert 0 < differences["metatutor"] < harness.TOLERANCE
    assert differences["plain loop"] == 0


def test_the_plain_loop_has_the_weights_and_the_answers_of_ours() -> None:
    learner, episode = STREAMS.build(torch.float64)
    net, _ = mann_stream.plain_loop(learner, episode)
    answers = net(episode.support_images, episode.support_labels)
    torch.testing.assert_close(answers, learner.stream_logits(episode), rtol=0, atol=1e-6)
    assert (sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in learner.parameters())) == len(
        learner.enter.bias  # of the LSTMCell's two biases one is left at zero
    )


def test_a_stream_holds_every_class_equally_often() -> None:
    _, episode = STREAMS.build()
    assert episode.support_images.shape == (2, 10, 1, 28, 28)
    assert episode.support_labels.sort(1).values.tolist() == 2 * [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]]


def test_a_wrong_gradient_of_a_stream_stops_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = partial(mann_stream.plain_loop, detached=True)
    monkeypatch.setitem(mann_stream.IMPLEMENTATIONS, "wrong", wrong)
    with pytest.raises(SystemExit, match="the gradient of wrong is off by"):
        mann_stream.check(STREAMS, ["metatutor", "wrong"])
    with pytest.raises(SystemExit, match="the gradient of wrong is off by"):
        mann_stream.main(mann_stream.Config(settings=("5w-2i",), tasks=2, variants=("wrong",)))


def in_this_process(
    prepare: harness.Prepare, setting: harness.Setting, names: Sequence[str], rounds: int, threads: int | None
) -> dict[str, harness.Measurement]:
    """As `harness.measure`, which `test_rows` runs, without the seconds that new processes take to begin."""
    steps = {name: pickle.loads(pickle.dumps(prepare))(setting, name)[1] for name in names}
    taken = {name: [timeit(step, number=1) * 1000 for _ in range(rounds)] for name, step in steps.items()}
    return {name: harness.Measurement(milliseconds, 0.0) for name, milliseconds in taken.items()}


def test_rows_of_a_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "measure", in_this_process)
    file = tmp_path / "rows.json"
    config = mann_stream.Config(settings=("5w-2i",), rounds=1, tasks=2, json=file)
    mann_stream.main(replace(config, check_only=True))
    assert not file.exists() and "plain loop" in capsys.readouterr().out
    mann_stream.main(config)
    ours, loop = json.loads(file.read_text())
    assert set(ours) == {"setting", "implementation", "milliseconds", "ratio", "peak_mib"}
    assert [(row["setting"], row["implementation"]) for row in (ours, loop)] == [
        ("5w-2i", "metatutor"),
        ("5w-2i", "plain loop"),
    ]
    assert ours["ratio"] == 1.0 and loop["ratio"] == pytest.approx(loop["milliseconds"] / ours["milliseconds"])
    assert "2 streams" in capsys.readouterr().out


# --- threads -------------------------------------------------------------------------------------------------------


def test_rows_of_threads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    threads.main(threads.Config(("4-quiet",), variants=("metatutor-one-thread",), rounds=1, tasks=1, json=file))
    ours, one = json.loads(file.read_text())
    assert set(ours) == {"setting", "implementation", "milliseconds", "ratio", "peak_mib"}
    assert (ours["setting"], ours["implementation"], ours["ratio"]) == ("4-quiet", "metatutor", 1.0)
    assert one["implementation"] == "metatutor-one-thread"
    assert "CPUs may be used" in capsys.readouterr().out


def test_other_programs_run_within_and_no_longer() -> None:
    with threads.others(2):
        running = [child for child in Process().children() if "while True: pass" in child.cmdline()]
        assert len(running) == 2
    assert not any(other.is_running() for other in running)


@pytest.mark.parametrize(("name", "policy"), [("metatutor", "PASSIVE"), ("metatutor-spinning", None)])
def test_how_threads_wait_does_not_depend_on_the_user(
    monkeypatch: pytest.MonkeyPatch, name: str, policy: str | None
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with threads.waiting(name):
        assert os.environ.get("OMP_WAIT_POLICY") == policy
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


# --- commits -------------------------------------------------------------------------------------------------------

SLOW_OR_FAST = """import json, sys
from pathlib import Path
words = sys.argv[1:]
setting = words[words.index("--settings") + 1]
row = {"setting": setting, "implementation": "metatutor", "milliseconds": MS, "ratio": 1.0, "peak_mib": 2 * MS}
Path(words[words.index("--json") + 1]).write_text(json.dumps([row]))
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits: a step takes 8 ms, then 2."""
    root = tmp_path / "repository"
    (root / "benchmarks").mkdir(parents=True)
    commits.git("init", "--quiet", root=root)
    for milliseconds in ("8", "2"):
        (root / "benchmarks/maml_step.py").write_text(SLOW_OR_FAST.replace("MS", milliseconds))
        commits.git("add", ".", root=root)
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        commits.git(*who, "commit", "--quiet", "-m", milliseconds, root=root)
    return root


def test_commits_are_compared_with_the_first(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = repository.parent / "rows.json"
    commits.main(("HEAD~1", "HEAD"), ("strided-1q-1s",), turns=2, json_=file, root=repository)
    before, after = json.loads(file.read_text())
    assert (before["milliseconds"], before["ratio"], before["peak_mib"]) == (8, 1.0, 16)
    assert (after["milliseconds"], after["ratio"], after["peak_mib"]) == (2, 0.25, 4)
    assert before["implementation"] in capsys.readouterr().out
    assert len(commits.git("worktree", "list", root=repository).splitlines()) == 1, "nothing is left behind"


def test_an_unknown_commit_is_refused_in_git_s_words(repository: Path) -> None:
    with pytest.raises(SystemExit, match="Needed a single revision"):
        commits.main(("nowhere",), root=repository)
