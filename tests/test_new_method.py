"""A method that somebody adds is one file and one line of export: everything else takes it as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import metatutor
from metatutor import ConvNet, EpisodeSpec, Strokes, TrainConfig, evaluate, load, train
from metatutor import config as configurations
from metatutor.config import RunConfig, config_of, config_text, parse_config
from metatutor.embedding import EmbeddingLearner
from metatutor.episodes import Episode
from metatutor.functional import class_means
from metatutor.testing import check_learner

SPEC = EpisodeSpec(n_way=3, k_shot=1, n_query=2)


# --- the file ---


class NearestMean(EmbeddingLearner):
    """Answers with the class whose mean is nearest, in units that are learned.

    Args:
        network: the embedding.
        initial_scale: of the distances at first.
        power: of the distances.
    """

    def __init__(self, network: nn.Module, *, initial_scale: float = 1.0, power: int = 2) -> None:
        super().__init__(network)
        if power < 1:
            raise ValueError(f"power must be positive, got {power}")
        self.power, self.scale = power, nn.Parameter(torch.tensor(initial_scale))

    def answer(self, episode: Episode) -> Tensor:
        """Minus the scaled distances, `[task, query, way]`."""
        support, query = self.embed(episode)
        means = class_means(support, episode.support_labels, episode.n_way)
        return -self.scale * (torch.cdist(query, means) + 1e-6).pow(self.power)


# --- the line ---


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metatutor, "NearestMean", NearestMean, raising=False)
    monkeypatch.setattr(metatutor, "__all__", [*metatutor.__all__, "NearestMean"])
    caches = [configurations.known, configurations._adapter]  # what they remember is all exports
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


# --- everything else ---


def test_it_keeps_the_contract():
    torch.manual_seed(0)
    check_learner(NearestMean(ConvNet(filters=4, normalization="support")))


def test_it_trains_evaluates_predicts_and_adapts(tmp_path: Path):
    torch.manual_seed(0)
    splits = Strokes.load(n_alphabets=3, characters_per_alphabet=5, drawings=4).split()
    learner = NearestMean(ConvNet(filters=4), initial_scale=0.1)
    train(learner, splits.train, SPEC, TrainConfig(iterations=2, tasks_per_step=2), progress_bar=False)
    assert learner.scale.item() != pytest.approx(0.1)
    assert evaluate(learner, splits.test, SPEC, n_episodes=4).transductive
    pictures = splits.test.images[:3, 0]
    assert set(learner.predict(pictures, ["a", "b", "c"], pictures)) <= {"a", "b", "c"}


def test_it_is_saved_and_loaded(tmp_path: Path, exported: None):
    learner = NearestMean(ConvNet(filters=4), power=1)
    learner.save(tmp_path / "nearest-mean")
    loaded = load(tmp_path / "nearest-mean")
    assert isinstance(loaded, NearestMean) and loaded.power == 1


def test_its_arguments_are_a_configuration(exported: None):
    config = RunConfig(learner=config_of(NearestMean)(power=1))
    assert '"method": "nearest-mean"' in config_text(config)
    assert parse_config(config_text(config)) == config
    with pytest.raises(ValueError, match="power must be positive, got 0"):
        RunConfig(learner=config_of(NearestMean)(power=0))
    with pytest.raises(ValueError, match="powre"):
        parse_config(config_text(config).replace('"power"', '"powre"'))


def test_the_command_line_knows_it(exported: None, capsys: pytest.CaptureFixture[str]):
    from metatutor.cli import main

    with pytest.raises(SystemExit):
        main(["train", "demo", "learner:nearest-mean", "--help"])
    assert "of the distances at first" in capsys.readouterr().out
