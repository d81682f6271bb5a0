"""The benchmark of the MAML step compares like with like. Nothing here looks at times."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from benchmarks import maml_step
from benchmarks.maml_step import Config, Setting, check, chosen, main, plain_loop

SMALL = Config(settings=("strided-1q-1s",), peers=("plain loop",), rounds=1, tasks=2, filters=8)


def test_all_that_are_installed_give_the_same_gradient() -> None:
    names, _ = chosen(Config())
    differences = check(Setting("pooled-1q-5s", tasks=2, filters=8, device="cpu"), names)
    assert {"metatutor", "plain loop"} <= set(differences)


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


def test_unknown_names() -> None:
    with pytest.raises(SystemExit, match="no such peer: nobody"):
        chosen(Config(peers=("nobody",)))
    with pytest.raises(SystemExit, match="no such variant: faster"):
        chosen(Config(variants=("faster",)))
    with pytest.raises(SystemExit, match="no such setting: wide-1q-1s"):
        Setting("wide-1q-1s", tasks=2, filters=8, device="cpu").build()
