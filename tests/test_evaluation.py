"""The mean and its interval, by hand; and that nothing but the seed and the tasks decides them."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metatutor.backbones import MLP, ConvNet, Pixels
from metatutor.data import Sinusoids
from metatutor.episodes import ClassImages, Episode, EpisodeSampler, EpisodeSpec
from metatutor.evaluation import Evaluation, confidence95, evaluate, is_transductive, ordinal, scores
from metatutor.functional import Parameters
from metatutor.learner import Learner
from metatutor.memory import MANN, FeedForward
from metatutor.memory.stream import instances
from metatutor.metric import Prototypical
from metatutor.optimization import MAML, ImplicitMAML, MetaLSTM, Reptile
from metatutor.optimization.base import AdaptingLearner

SPEC = EpisodeSpec(n_way=3, k_shot=1, n_query=4)
Classes = Callable[..., ClassImages]


class Scripted(Learner):
    """Answers so many of a task's queries rightly, as a script says, the others wrongly; for tests, it may cheat."""

    def __init__(self, script: list[int]) -> None:
        super().__init__()
        self.left = list(script)
        self.seen: list[tuple[bool, bool]] = []  # training mode, gradient mode

    def forward(self, episode: Episode) -> Tensor:
        self.seen.append((self.training, torch.is_grad_enabled()))
        answers = episode.query_labels.clone()
        for task in range(len(episode)):
            right = self.left.pop(0) if self.left else 0
            answers[task, right:] = (answers[task, right:] + 1) % episode.n_way
        return nn.functional.one_hot(answers, episode.n_way).float()


class Guessing(Learner):
    """Answers that depend on the pixels, in no useful way."""

    def forward(self, episode: Episode) -> Tensor:
        noise = (episode.query_images.double().sum((-1, -2, -3)) * 1e4).frac()  # [task, query]
        answers = (noise * episode.n_way).long()
        return nn.functional.one_hot(answers, episode.n_way).float()


class NearestSupport(Learner):
    """The class of the nearest support image, pixel by pixel."""

    def forward(self, episode: Episode) -> Tensor:
        nearness = -torch.cdist(episode.query_images.flatten(2), episode.support_images.flatten(2))
        places = episode.support_labels.argsort(1)[:, None].expand_as(nearness)  # one shot: of class 0, 1, 2
        return nearness.gather(2, places)


class Broken(Learner):
    def forward(self, episode: Episode) -> Tensor:
        raise RuntimeError("broken")


def test_mean_and_interval_by_hand(class_images: Classes):
    """Of 12 queries a task, the script answers so many rightly. The interval is of the mean: not s, not 1.96 s."""
    script = [12, 9, 6, 12, 3, 0, 11, 10, 7, 5, 12, 1]
    result = evaluate(Scripted(script), class_images(), SPEC, n_episodes=12, tasks_per_batch=5)
    fractions = np.array(script) / 12
    assert result.accuracy == pytest.approx(fractions.mean(), abs=1e-12)
    assert result.ci95 == pytest.approx(1.96 * fractions.std(ddof=1) / np.sqrt(12), abs=1e-12)
    # two tasks, even simpler: fractions 1/4 and 3/4, s = sqrt(1/8), s / sqrt(2) = 1/4
    result = evaluate(Scripted([3, 9]), class_images(), SPEC, n_episodes=2)
    assert (result.accuracy, result.ci95) == (pytest.approx(0.5), pytest.approx(1.96 / 4))


def test_the_interval_covers_the_truth_in_19_of_20_cases():
    generator = torch.Generator().manual_seed(0)
    trials = (torch.rand(2000, 100, 15, dtype=torch.float64, generator=generator) < 0.8).double().mean(-1)
    covered = [abs(trial.mean().item() - 0.8) <= confidence95(trial) for trial in trials]
    assert 0.93 < np.mean(covered) < 0.965


def test_accuracies_are_of_tasks_in_their_order(class_images: Classes):
    found = scores(Scripted([12, 0, 6, 3]), EpisodeSampler(class_images(), SPEC), 4, tasks_per_batch=3)
    assert found.tolist() == [1.0, 0.0, 0.5, 0.25]


def test_a_perfect_and_a_guessing_learner(class_images: Classes):
    perfect = evaluate(Scripted([12] * 50), class_images(), SPEC, n_episodes=50)
    assert (perfect.accuracy, perfect.ci95) == (1.0, 0.0)
    guessing = evaluate(Guessing(), class_images(20), SPEC, n_episodes=600)
    assert abs(guessing.accuracy - 1 / 3) < 4 * guessing.ci95 / 1.96
    assert 0 < guessing.ci95 < 0.02


def test_same_seed_same_result(class_images: Classes):
    torch.manual_seed(1)
    one = evaluate(Guessing(), class_images(), SPEC, n_episodes=40, seed=3)
    torch.manual_seed(2)
    assert evaluate(Guessing(), class_images(), SPEC, n_episodes=40, seed=3) == one
    assert evaluate(Guessing(), class_images(), SPEC, n_episodes=40, seed=4).accuracy != one.accuracy


def test_the_result_does_not_depend_on_how_many_tasks_are_answered_at_once(class_images: Classes):
    results = [
        evaluate(Guessing(), class_images(), SPEC, n_episodes=20, tasks_per_batch=tasks) for tasks in (1, 3, 20, 32)
    ]
    assert results == [results[0]] * 4
    assert results[0].ci95 > 0


def test_more_episodes_begin_with_the_same_ones(class_images: Classes):
    few, more = (scores(Guessing(), EpisodeSampler(class_images(), SPEC, seed=1), n) for n in (10, 40))
    assert torch.equal(more[:10], few)


@pytest.mark.parametrize("training", [True, False])
def test_evaluates_in_evaluation_mode_without_gradients_and_restores_the_mode(class_images: Classes, training: bool):
    learner = Scripted([12] * 6).train(training)
    evaluate(learner, class_images(), SPEC, n_episodes=6, tasks_per_batch=4)
    assert learner.seen == [(False, False)] * 4  # two batches, and two questions about one task
    assert learner.training is training
    assert torch.is_grad_enabled()
    broken = Broken().train(training)
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(broken, class_images(), SPEC, n_episodes=2)
    assert broken.training is training


def test_maml_takes_its_test_steps(class_images: Classes):
    network = ConvNet(3, filters=4, n_blocks=2, image_size=8)
    results = [
        evaluate(MAML(network, inner_lr=0.1, inner_steps=1, test_inner_steps=steps), class_images(), SPEC, n_episodes=9)
        for steps in (None, 1, 20)
    ]
    assert results[0] == results[1] != results[2]


def test_a_learner_that_should_be_right_is(class_images: Classes):
    """Drawings of a class are its prototype under noise, so the nearest support image tells the class."""
    result = evaluate(NearestSupport(), class_images(size=6), SPEC, n_episodes=30)
    assert result.accuracy == 1.0


def test_what_is_recorded(class_images: Classes):
    classes = class_images(rotations=True)
    network = ConvNet(3, filters=4, n_blocks=2, image_size=8, normalization="support")
    result = evaluate(MAML(network), classes, SPEC, n_episodes=2, seed=7, split="strokes-0/test")
    expected = {"n_way": 3, "k_shot": 1, "n_query": 4, "n_episodes": 2, "seed": 7, "split": "strokes-0/test"}
    expected |= {"normalization": "support", "transductive": False}
    assert result.record() == expected | {"accuracy": result.accuracy, "ci95": result.ci95}
    assert Evaluation.from_record(result.record() | {"name": "another key"}) == result
    assert torch.equal(result.values, scores(MAML(network), classes.sampler(SPEC, seed=7), 2))
    network.normalization = "batch"
    assert evaluate(MAML(network), classes, SPEC, n_episodes=2).transductive
    result = evaluate(Scripted([12, 12]), classes, SPEC, n_episodes=2)
    assert (result.normalization, result.transductive) == ("none", False)


@pytest.mark.parametrize(
    ("accuracy", "ci95", "cell"),
    [(0.9871, 0.0023, "98.7 ± 0.2%"), (1.0, 0.0, "100.0 ± 0.0%"), (0.2, 0.01251, "20.0 ± 1.3%")],
)
def test_prints_as_a_cell_of_a_papers_table(accuracy: float, ci95: float, cell: str):
    assert str(Evaluation("accuracy", accuracy, ci95, 1000, 5, 1, 15, "random-0/test", 0, "batch", True)) == cell


def test_at_least_one_task_at_once(class_images: Classes):
    with pytest.raises(ValueError, match="^tasks_per_batch must be a positive integer, got 0$"):
        evaluate(Scripted([12]), class_images(), SPEC, n_episodes=2, tasks_per_batch=0)


@pytest.mark.parametrize("n_episodes", [1, 0, -3])
def test_no_interval_of_fewer_than_two(class_images: Classes, n_episodes: int):
    message = f"n_episodes must be at least 2 for an interval, got {n_episodes}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        evaluate(Scripted([12]), class_images(), SPEC, n_episodes=n_episodes)


# --- streams ---------------------------------------------------------------------------------------------------


STREAM = EpisodeSpec(n_way=3, k_shot=4, n_query=1)


def hits(image: Tensor) -> bool:
    """Whether `Hitting` answers an image rightly: its pixels decide, rightly in two of three cases."""
    return bool((image.double().sum() * 1e4).frac() < 2 / 3)


class Hitting(FeedForward):
    """Answers some images of a stream rightly, some with -1, a string that nobody has; for tests, it cheats."""

    def __init__(self) -> None:
        super().__init__(Pixels(1), n_way=3, hidden_size=1)
        self.seen: list[tuple[bool, bool, int]] = []  # training mode, gradient mode, streams

    def stream_answers(self, episode: Episode) -> Tensor:
        self.seen.append((self.training, torch.is_grad_enabled(), len(episode)))
        right = torch.tensor([[hits(image) for image in images] for images in episode.support_images])
        return torch.where(right, episode.support_labels, -1)


class BrokenStream(Hitting):
    def stream_answers(self, episode: Episode) -> Tensor:
        raise RuntimeError("broken")


def accuracies_by_a_loop(classes: ClassImages, seed: int, n_episodes: int) -> np.ndarray:
    """`[task, instance]`: how many of the three classes were answered rightly when they came so often before."""
    episode = EpisodeSampler(classes, STREAM, seed=seed).sample(n_episodes)
    found = np.zeros((n_episodes, STREAM.k_shot))
    for task, images in enumerate(episode.support_images):
        came = [0, 0, 0]
        for image, label in zip(images, episode.support_labels[task].tolist(), strict=True):
            found[task, came[label]] += hits(image) / 3
            came[label] += 1
    return found


def test_instances_by_a_loop():
    labels = torch.randint(0, 4, (5, 20), generator=torch.Generator().manual_seed(0))
    for of_task, found in zip(labels.tolist(), instances(labels, 4).tolist(), strict=True):
        assert found == [of_task[:time].count(label) for time, label in enumerate(of_task)]


def test_accuracies_by_instance_by_a_loop(class_images: Classes):
    sampler = EpisodeSampler(class_images(), STREAM, seed=3)
    found = scores(Hitting(), sampler, 7, stream=True, tasks_per_batch=3)
    assert found.shape == (7, 4) and found.dtype == torch.float64
    assert np.allclose(found.numpy(), accuracies_by_a_loop(class_images(), 3, 7), atol=1e-12)
    assert 0.4 < found.mean() < 0.9


def test_means_and_intervals_by_instance_by_hand(class_images: Classes):
    result = evaluate(Hitting(), class_images(), STREAM, stream=True, n_episodes=30, seed=5, split="strokes-0/test")
    of_tasks = accuracies_by_a_loop(class_images(), 5, 30)
    assert result.mean == pytest.approx(of_tasks.mean(0).tolist(), abs=1e-12)
    assert result.ci95 == pytest.approx((1.96 * of_tasks.std(0, ddof=1) / 30**0.5).tolist(), abs=1e-12)
    expected = {"n_episodes": 30, "n_way": 3, "k_shot": 4, "n_query": 1, "split": "strokes-0/test", "seed": 5}
    expected |= {"normalization": "none", "transductive": False}
    assert result.record() == expected | {"accuracy_by_instance": result.mean, "ci95_by_instance": result.ci95}
    assert Evaluation.from_record(result.record()) == result


def test_what_is_recorded_of_a_stream(class_images: Classes):
    network = ConvNet(filters=4, n_blocks=2, image_size=8, normalization="group")
    result = evaluate(MANN(network, n_way=3), class_images(), STREAM, stream=True, n_episodes=2)
    assert (result.normalization, result.transductive) == ("group", False)


def test_streams_are_the_same_however_many_are_answered_at_once(class_images: Classes):
    learner = MANN(Pixels(4), n_way=3, hidden_size=8, slots=6, width=4, heads=2)
    generator = torch.Generator().manual_seed(0)
    for parameter in learner.parameters():  # large, so that the answers are not always the same
        parameter.data = torch.randn(parameter.shape, generator=generator)
    results = [
        evaluate(learner, class_images(), STREAM, stream=True, n_episodes=20, tasks_per_batch=tasks)
        for tasks in (1, 7, 32)
    ]
    assert results == [results[0]] * 3
    few, more = (scores(learner, EpisodeSampler(class_images(), STREAM), n, stream=True) for n in (10, 40))
    assert torch.equal(more[:10], few)
    other = evaluate(learner, class_images(), STREAM, stream=True, n_episodes=20, seed=1)
    assert other.mean != results[0].mean


@pytest.mark.parametrize("training", [True, False])
def test_streams_are_answered_in_evaluation_mode_without_gradients(class_images: Classes, training: bool):
    learner = Hitting().train(training)
    evaluate(learner, class_images(), STREAM, stream=True, n_episodes=6, tasks_per_batch=4)
    assert learner.seen == [(False, False, 4), (False, False, 2)]
    assert learner.training is training
    assert torch.is_grad_enabled()
    broken = BrokenStream().train(training)
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(broken, class_images(), STREAM, stream=True, n_episodes=2)
    assert broken.training is training


@pytest.mark.parametrize(
    ("k_shot", "sentence"),
    [
        (1, "1st 10.0 ± 1.0%"),
        (2, "1st 10.0 ± 1.0%, 2nd 20.0 ± 2.0%"),
        (4, "1st 10.0 ± 1.0%, 2nd 20.0 ± 2.0%, 4th 40.0 ± 4.0%"),
        (5, "1st 10.0 ± 1.0%, 2nd 20.0 ± 2.0%, 5th 50.0 ± 5.0%"),
        (9, "1st 10.0 ± 1.0%, 2nd 20.0 ± 2.0%, 5th 50.0 ± 5.0%, 9th 90.0 ± 9.0%"),
    ],
)
def test_prints_the_instances_of_a_papers_table(k_shot: int, sentence: str):
    tenths, hundredths = ([i / of for i in range(1, k_shot + 1)] for of in (10, 100))
    spec = (5, k_shot, 1)
    result = Evaluation("accuracy_by_instance", tenths, hundredths, 100, *spec, "random-0/test", 0, "none", False)
    assert str(result) == sentence
    assert result.cell(k_shot) == f"{10 * k_shot}.0 ± {k_shot}.0%"


def test_ordinals():
    assert [ordinal(i) for i in (1, 2, 3, 4, 10)] == ["1st", "2nd", "3rd", "4th", "10th"]
    assert [ordinal(i) for i in (11, 12, 13, 20)] == ["11th", "12th", "13th", "20th"]


@pytest.mark.parametrize("n_episodes", [1, 0, -3])
def test_no_interval_of_fewer_than_two_streams(class_images: Classes, n_episodes: int):
    message = f"n_episodes must be at least 2 for an interval, got {n_episodes}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        evaluate(Hitting(), class_images(), STREAM, stream=True, n_episodes=n_episodes)


# --- regression ------------------------------------------------------------------------------------------------


WAVES = EpisodeSpec(n_way=1, k_shot=4, n_query=6)


class Approaching(AdaptingLearner):
    """Knows each task's waves from its support set: after every step, half of the way from 0 is left."""

    def __init__(self, steps: int = 1) -> None:
        super().__init__(MLP(1, 1, hidden=()), inner_steps=1, test_inner_steps=steps)
        for parameter in self.network.parameters():
            nn.init.zeros_(parameter)

    def inner_step(self, parameters: Parameters, state: object, episode: Episode, step: int) -> tuple[Parameters, int]:
        means = episode.support_labels.mean(1)  # [task, 1]
        return parameters | {"head.bias": (1 - 0.5 ** (step + 1)) * means}, step


def test_squared_errors_by_hand():
    """The answer to every query is 0, then 1/2, then 3/4 of the mean support target of its own task."""
    found = scores(Approaching(2), Sinusoids().sampler(WAVES, seed=3), 7)
    episode = Sinusoids().sampler(WAVES, seed=3).sample(7)
    for task in range(7):
        mean = np.mean(episode.support_labels[task].numpy().astype(float))
        targets = episode.query_labels[task].numpy().astype(float)
        expected = [np.mean((part * mean - targets) ** 2) for part in (0, 0.5, 0.75)]
        assert found[task].tolist() == pytest.approx(expected, rel=1e-5)
    assert found.dtype == torch.float64


@pytest.mark.parametrize("method", [MAML, Reptile, ImplicitMAML, MetaLSTM])
def test_squared_errors_are_those_of_the_adapted_learner(method: Callable[..., AdaptingLearner]):
    """After each step as if it were the last one; as many as the learner takes at the test."""
    # in training mode it would take others
    options = {} if method is MetaLSTM else {"inner_lr": 0.01}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        learner = method(MLP(hidden=(5,)), test_inner_steps=3, **options)
    found = scores(learner, Sinusoids().sampler(WAVES, seed=3), 5)
    episode = Sinusoids().sampler(WAVES, seed=3).sample(5)
    assert found.shape == (5, 4)
    learner.eval()
    for step in range(4):
        outputs = learner.query_logits(episode, learner.adapt(episode, step))
        expected = (outputs - episode.query_labels).pow(2).mean((1, 2)).double()
        assert torch.allclose(found[:, step], expected, rtol=1e-5)
    assert (found[:, 1:] != found[:, :-1]).all()


def test_regression_mean_and_interval_by_hand():
    result = evaluate(Approaching(2), Sinusoids(), WAVES, n_episodes=9, seed=3)
    of_tasks = scores(Approaching(2), Sinusoids().sampler(WAVES, seed=3), 9).numpy()
    assert result.mean == pytest.approx(of_tasks.mean(0).tolist(), rel=1e-12)
    assert result.ci95 == pytest.approx((1.96 * of_tasks.std(0, ddof=1) / 3).tolist(), rel=1e-12)
    expected = {"n_episodes": 9, "n_way": 1, "k_shot": 4, "n_query": 6, "seed": 3, "split": ""}
    expected |= {"normalization": "none", "transductive": False}
    medians = np.median(of_tasks, axis=0).tolist()
    expected |= {"mse_by_step": result.mean, "ci95_by_step": result.ci95}
    expected |= {"median_by_step": pytest.approx(medians, rel=1e-12)}
    assert result.record() == expected and Evaluation.from_record(result.record()) == result
    assert str(result).endswith(f"(median {medians[-1]:.2f}) after {len(medians) - 1} steps")
    with pytest.raises(ValueError, match="^this evaluation has the mse_by_step, see its mean$"):
        _ = result.accuracy
    assert len(evaluate(Approaching(0), Sinusoids(), WAVES, n_episodes=2).mean) == 1


def test_the_error_of_zero_is_what_the_waves_say():
    """The mean of `(a sin u)^2` over amplitudes from 1 to 2 and half a period of phases: half the mean of `a^2`."""
    result = evaluate(Approaching(0), Sinusoids((1.0, 2.0)), WAVES, n_episodes=2000)
    assert abs(result.mean[0] - (2**3 - 1) / 3 / 2) < 2 * result.ci95[0]
    assert 0 < result.ci95[0] < 0.05


def test_same_seed_same_regression():
    results = []
    for seed, n_episodes in ((3, 20), (3, 20), (4, 20), (3, 10)):
        torch.rand(3)  # the global generator is elsewhere each time
        results.append(evaluate(Approaching(), Sinusoids(), WAVES, n_episodes=n_episodes, seed=seed))
    assert results[0] == results[1]
    assert results[0].mean[0] != results[2].mean[0]
    few, more = (scores(Approaching(1), Sinusoids().sampler(WAVES), n) for n in (10, 40))
    assert torch.equal(more[:10], few)


@pytest.mark.parametrize("training", [True, False])
def test_regression_leaves_the_learner_as_it_was(training: bool):
    """Same parameters, same mode, no gradients; and the mode does not matter."""
    learner = MAML(MLP(hidden=(5,)), inner_lr=0.01, inner_steps=1, test_inner_steps=2).train(training)
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    result = evaluate(learner, Sinusoids(), WAVES, n_episodes=4)
    assert result == evaluate(learner.train(not training), Sinusoids(), WAVES, n_episodes=4)
    assert learner.training is not training
    assert torch.is_grad_enabled()
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state_dict().items())
    assert all(p.grad is None for p in learner.parameters())


@pytest.mark.parametrize(
    ("mse", "ci95", "sentence"),
    [
        ([3.1, 0.25], [0.2, 0.03], "MSE 0.25 ± 0.03 after 1 step"),
        ([3.1, 1.0, 0.456], [0.2, 0.1, 0.0149], "MSE 0.46 ± 0.01 after 2 steps"),
        ([3.14159], [0.2], "MSE 3.14 ± 0.20 after 0 steps"),
    ],
)
def test_prints_the_error_after_the_last_step(mse: list[float], ci95: list[float], sentence: str):
    assert str(Evaluation("mse_by_step", mse, ci95, 600, 1, 10, 100, "sinusoids/test", 0, "none", False)) == sentence


@pytest.mark.parametrize("n_episodes", [1, 0, -3])
def test_no_interval_of_fewer_than_two_regressions(n_episodes: int):
    message = f"n_episodes must be at least 2 for an interval, got {n_episodes}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        evaluate(Approaching(), Sinusoids(), WAVES, n_episodes=n_episodes)


# --- transduction is measured ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("running", "transductive"), [(False, True), (True, False)])
def test_transduction_of_a_network_of_ones_own_is_measured(class_images: Classes, running: bool, transductive: bool):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=running), nn.Flatten())
    learner = Prototypical(network)
    assert evaluate(learner, class_images(), SPEC, n_episodes=2).transductive is transductive
    learner = MAML(nn.Sequential(*network, nn.Linear(144, 3)))
    assert evaluate(learner, class_images(), SPEC, n_episodes=2).transductive is transductive


class Declaring(Guessing):
    """Declares what is not true."""

    transductive = True


def test_what_is_declared_does_not_count(class_images: Classes):
    assert not evaluate(Declaring(), class_images(), SPEC, n_episodes=2).transductive
    assert not is_transductive(Declaring(), class_images().sampler(SPEC).sample(2))


def test_a_stream_is_not_asked_of_a_learner_that_reads_none(class_images: Classes):
    with pytest.raises(ValueError, match="^Guessing answers no streams; leave stream out$"):
        evaluate(Guessing(), class_images(), STREAM, stream=True)
