"""What a learner is worth: mean accuracy over many tasks, with the confidence interval of that mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from metatutor.data import Sinusoids, SinusoidSampler
from metatutor.episodes import ClassImages, Episode, EpisodeSampler, EpisodeSpec
from metatutor.learner import Learner
from metatutor.memory.stream import StreamLearner
from metatutor.optimization.base import AdaptingLearner


@dataclass(frozen=True)
class Evaluation:
    """Mean accuracy over episodes and its 95% confidence interval.

    Args:
        accuracy: mean over episodes of the fraction of query images answered rightly, 0 to 1.
        ci95: half the width of the 95% confidence interval of that mean: `1.96 * s / sqrt(n_episodes)`, where `s` is
            the standard deviation over episodes.
        n_episodes: tasks evaluated.
        n_way, k_shot, n_query: the shape of the tasks.
        split: which classes they were drawn from.
        seed: of the stream of tasks.
        normalization: the network's normalisation policy, or `"none"`.
        transductive: whether an answer could depend on the other queries of its task.

    Example:
        >>> print(Evaluation(0.9871, 0.0023, 1000, 5, 1, 15, "random-0/test", 0, "batch", True))
        98.7 ± 0.2%

    Reference:
        The interval is the one the papers report, e.g. Snell et al. (2017), table 1.
    """

    accuracy: float
    ci95: float
    n_episodes: int
    n_way: int
    k_shot: int
    n_query: int
    split: str
    seed: int
    normalization: str
    transductive: bool

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.1f} ± {100 * self.ci95:.1f}%"


def accuracies(
    learner: Learner, sampler: EpisodeSampler, n_episodes: int, *, tasks_per_batch: int = 32
) -> Float[Tensor, " task"]:
    """The accuracy on each of the sampler's next `n_episodes` tasks, with the learner in evaluation mode.

    Args:
        learner: its device is where the tasks go.
        sampler: draws the tasks.
        n_episodes: how many.
        tasks_per_batch: tasks answered side by side; the result does not depend on it, but for rounding.

    Returns:
        Fractions from 0 to 1, on the CPU.
    """
    return _of_tasks(
        learner,
        sampler,
        n_episodes,
        tasks_per_batch,
        lambda episode: (learner(episode).argmax(-1) == episode.query_labels).double().mean(dim=1),
    )


def _of_tasks(
    learner: Learner,
    sampler: EpisodeSampler,
    n_episodes: int,
    tasks_per_batch: int,
    measure: Callable[[Episode], Float[Tensor, "task ..."]],
) -> Float[Tensor, "n_episodes ..."]:
    """A measure of each of the sampler's next tasks, with the learner in evaluation mode, on the CPU."""
    device = next((p.device for p in learner.parameters()), sampler.classes.images.device)
    was_training = learner.training
    learner.eval()
    of_batches = []
    try:
        with torch.no_grad():
            for start in range(0, n_episodes, tasks_per_batch):
                episode = sampler.sample(min(tasks_per_batch, n_episodes - start)).to(device)
                of_batches.append(measure(episode).cpu())
    finally:
        learner.train(was_training)
    return torch.cat(of_batches)


def evaluate(
    learner: Learner,
    classes: ClassImages,
    spec: EpisodeSpec,
    *,
    n_episodes: int = 1000,
    seed: int = 0,
    split: str = "",
    tasks_per_batch: int = 32,
) -> Evaluation:
    """Evaluate a learner on tasks drawn from classes, meta-test classes as a rule.

    Args:
        learner: in any mode; it is evaluated in evaluation mode and its mode restored.
        classes: where the tasks are drawn from.
        spec: their shape.
        n_episodes: how many; at least 2.
        seed: of the stream of tasks.
        split: a name for the classes, for the record.
        tasks_per_batch: tasks answered side by side.

    Returns:
        The mean accuracy with its interval.

    Raises:
        ValueError: if there are fewer than 2 episodes, or the classes are too few for the spec.

    Example:
        >>> from metatutor import NearestPixels, Strokes
        >>> classes = Strokes.load(n_alphabets=3, characters_per_alphabet=8).split().test
        >>> evaluate(NearestPixels(), classes, EpisodeSpec(5, 1, 5), n_episodes=10).n_episodes
        10

    Reference:
        Vinyals et al. (2016), section 4.1.
    """
    if n_episodes < 2:
        raise ValueError(f"n_episodes must be at least 2 for an interval, got {n_episodes}")
    of_tasks = accuracies(
        learner, learner.test_sampler(classes, spec, seed=seed), n_episodes, tasks_per_batch=tasks_per_batch
    )
    return Evaluation(
        accuracy=of_tasks.mean().item(),
        ci95=confidence95(of_tasks),
        n_episodes=n_episodes,
        n_way=spec.n_way,
        k_shot=spec.k_shot,
        n_query=spec.n_query,
        split=split,
        seed=seed,
        normalization=learner.normalization,
        transductive=learner.transductive,
    )


@dataclass(frozen=True)
class ByInstance:
    """Mean accuracy on the first, second, … image of a class in a stream, with 95% confidence intervals.

    Args:
        accuracy_by_instance: of the images of each class that come first, second, …, 0 to 1.
        ci95_by_instance: half the widths of the intervals: as for `Evaluation`, over streams.
        n_episodes: streams evaluated.
        n_way, k_shot: classes of a stream, and images of each.
        split, seed, normalization, transductive: see `Evaluation`.

    Example:
        >>> print(ByInstance([0.36, 0.83, 0.91], [0.01, 0.02, 0.01], 100, 5, 3, "random-0/test", 0, "none", False))
        1st 36.0 ± 1.0%, 2nd 83.0 ± 2.0%, 3rd 91.0 ± 1.0%

    Reference:
        Santoro et al. (2016), table 1.
    """

    accuracy_by_instance: list[float]
    ci95_by_instance: list[float]
    n_episodes: int
    n_way: int
    k_shot: int
    split: str
    seed: int
    normalization: str
    transductive: bool

    def __str__(self) -> str:
        shown = sorted({1, 2, 5, self.k_shot} & set(range(1, self.k_shot + 1)))
        return ", ".join(f"{ordinal(i)} {self.cell(i)}" for i in shown)

    def cell(self, instance: int) -> str:
        """The accuracy on an instance, counted from 1, with its interval."""
        accuracy, ci95 = self.accuracy_by_instance[instance - 1], self.ci95_by_instance[instance - 1]
        return f"{100 * accuracy:.1f} ± {100 * ci95:.1f}%"


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, …, for numbers up to 20."""
    return str(number) + {1: "st", 2: "nd", 3: "rd"}.get(number, "th")


def instances(labels: Int[Tensor, "task time"], n_way: int) -> Int[Tensor, "task time"]:
    """How many images of the same class came before each image of a stream.

    Args:
        labels: of the stream.
        n_way: classes in a task.

    Example:
        >>> instances(torch.tensor([[1, 0, 1, 1, 0]]), n_way=2).tolist()
        [[0, 0, 1, 2, 1]]
    """
    members = F.one_hot(labels, n_way)
    return (members.cumsum(1) * members).sum(-1) - 1


def instance_accuracies(
    learner: StreamLearner, sampler: EpisodeSampler, n_episodes: int, *, tasks_per_batch: int = 32
) -> Float[Tensor, "task instance"]:
    """The accuracy on the first, second, … images of the classes, in each of the sampler's next streams.

    Args:
        learner: its device is where the streams go.
        sampler: draws them; every class has `k_shot` images in a stream.
        n_episodes: how many.
        tasks_per_batch: streams answered side by side.

    Returns:
        Means over the classes, from 0 to 1, on the CPU.
    """
    k_shot = sampler.spec.k_shot

    def by_instance(episode: Episode) -> Float[Tensor, "task instance"]:
        correct = learner.stream_answers(episode) == episode.support_labels  # [task, time]
        which = F.one_hot(instances(episode.support_labels, episode.n_way), k_shot)  # [task, time, instance]
        return (correct[..., None] * which).double().sum(1) / episode.n_way

    return _of_tasks(learner, sampler, n_episodes, tasks_per_batch, by_instance)


def evaluate_stream(
    learner: StreamLearner,
    classes: ClassImages,
    spec: EpisodeSpec,
    *,
    n_episodes: int = 1000,
    seed: int = 0,
    split: str = "",
    tasks_per_batch: int = 32,
) -> ByInstance:
    """Evaluate a learner on streams: every image is asked, then told one step later.

    Args:
        learner: in any mode; it is evaluated in evaluation mode and its mode restored.
        classes: where the streams are drawn from.
        spec: `n_way` classes of a stream with `k_shot` images each; its query images take no part.
        n_episodes: how many; at least 2.
        seed: of the sequence of streams.
        split: a name for the classes, for the record.
        tasks_per_batch: streams answered side by side.

    Returns:
        The mean accuracies by instance with their intervals.

    Raises:
        ValueError: if there are fewer than 2 episodes, or the classes are too few for the spec.

    Example:
        >>> from metatutor import Strokes
        >>> from metatutor.backbones import Pixels
        >>> from metatutor.memory import PlainLSTM
        >>> classes = Strokes.load(n_alphabets=3, characters_per_alphabet=8).split().test
        >>> learner = PlainLSTM(Pixels(20))
        >>> len(evaluate_stream(learner, classes, EpisodeSpec(5, 3, 1), n_episodes=10).accuracy_by_instance)
        3

    Reference:
        Santoro et al. (2016), section 4.1.
    """
    if n_episodes < 2:
        raise ValueError(f"n_episodes must be at least 2 for an interval, got {n_episodes}")
    found = instance_accuracies(
        learner, learner.test_sampler(classes, spec, seed=seed), n_episodes, tasks_per_batch=tasks_per_batch
    )
    return ByInstance(
        found.mean(0).tolist(),
        [confidence95(instance) for instance in found.T],
        n_episodes,
        spec.n_way,
        spec.k_shot,
        split,
        seed,
        learner.normalization,
        learner.transductive,
    )


@dataclass(frozen=True)
class Regression:
    """Mean squared error over tasks after each inner step, with the 95% confidence interval of each mean.

    Args:
        mse_by_step: before the first step and after each.
        ci95_by_step: half the widths of the intervals.
        n_episodes: tasks evaluated.
        k_shot, n_query: the shape of the tasks.
        seed: of the stream of tasks.

    Example:
        >>> print(Regression([3.1, 0.25], [0.2, 0.03], 600, 10, 100, 0))
        MSE 0.25 ± 0.03 after 1 step

    Reference:
        Finn, Abbeel & Levine (2017), figure 3 and section 5.1: 600 waves.
    """

    mse_by_step: list[float]
    ci95_by_step: list[float]
    n_episodes: int
    k_shot: int
    n_query: int
    seed: int

    def __str__(self) -> str:
        steps = len(self.mse_by_step) - 1
        return f"MSE {self.mse_by_step[-1]:.2f} ± {self.ci95_by_step[-1]:.2f} after {steps} step{'s' * (steps != 1)}"


def squared_errors(
    learner: AdaptingLearner, sampler: SinusoidSampler, n_episodes: int, *, inner_steps: int
) -> Float[Tensor, "task step"]:
    """The mean squared error on each of the sampler's next tasks, before the first inner step and after each.

    Args:
        learner: its device is where the tasks go.
        sampler: draws the tasks.
        n_episodes: how many.
        inner_steps: how many.
    """
    device = next(p.device for p in learner.parameters())
    with torch.no_grad():
        episode = sampler.sample(n_episodes).to(device)
        path = learner.adaptation_path(episode, inner_steps)
        found = [(learner.query_logits(episode, p) - episode.query_labels).double().pow(2).mean((1, 2)) for p in path]
    return torch.stack(found, dim=1).cpu()


def evaluate_regression(
    learner: AdaptingLearner,
    waves: Sinusoids,
    spec: EpisodeSpec,
    *,
    n_episodes: int = 600,
    seed: int = 0,
    inner_steps: int = 10,
) -> Regression:
    """Evaluate a learner on regression tasks.

    Args:
        learner: any that adapts by steps.
        waves: where the tasks are drawn from.
        spec: their shape.
        n_episodes: how many; at least 2.
        seed: of the stream of tasks.
        inner_steps: as far as the error is followed.

    Returns:
        The mean squared errors with their intervals.

    Raises:
        ValueError: if there are fewer than 2 episodes.

    Example:
        >>> from metatutor import MAML, MLP
        >>> from metatutor.data import Sinusoids
        >>> learner = MAML(MLP(), inner_lr=0.01)
        >>> len(evaluate_regression(learner, Sinusoids(), EpisodeSpec(1, 10, 100), inner_steps=3).mse_by_step)
        4

    Reference:
        Finn, Abbeel & Levine (2017), section 5.1.
    """
    if n_episodes < 2:
        raise ValueError(f"n_episodes must be at least 2 for an interval, got {n_episodes}")
    errors = squared_errors(learner, waves.sampler(spec, seed=seed), n_episodes, inner_steps=inner_steps)
    return Regression(
        errors.mean(0).tolist(),
        [confidence95(step) for step in errors.T],
        n_episodes,
        spec.k_shot,
        spec.n_query,
        seed,
    )


def confidence95(values: Float[Tensor, " n"]) -> float:
    """Half the width of the 95% confidence interval of the mean of independent values: `1.96 * s / sqrt(n)`."""
    return 1.96 * values.std(correction=1).item() / len(values) ** 0.5
