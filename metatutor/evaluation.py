"""What a learner is worth: means over many tasks, with the confidence intervals of these means."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from metatutor.checks import check_sizes
from metatutor.episodes import Episode, EpisodeSpec
from metatutor.learner import Learner, computing, evaluating

Metric = Literal["accuracy", "accuracy_by_instance", "mse_by_step"]
_NOT_RECORDED = ("metric", "mean", "ci95", "median_by_step", "values")  # under these names, or not always
_INTERVAL = {"accuracy": "ci95", "accuracy_by_instance": "ci95_by_instance", "mse_by_step": "ci95_by_step"}


@dataclass(frozen=True)
class Evaluation:
    """Means over episodes with their 95% confidence intervals, and how they were measured.

    Args:
        metric: `"accuracy"`: the fraction of query images answered correctly, 0 to 1; `"accuracy_by_instance"`: that of
            the first, second, … image of each class in a stream; `"mse_by_step"`: the squared error of a regression
            before the first inner step and after each.
        mean: the mean over episodes: a float, or a list with one per instance or step.
        ci95: half the width of the 95% confidence interval of each mean: `1.96 * s / sqrt(n_episodes)`, where `s` is
            the standard deviation over episodes.
        n_episodes: tasks evaluated.
        n_way, k_shot, n_query: the shape of the tasks.
        split: which classes they were drawn from.
        seed: seed of the stream of tasks.
        normalization: the network's normalisation policy, or `"none"`.
        transductive: whether an answer depended on the other queries of its task, as measured.
        median_by_step: the median squared error over episodes, of a regression: a few tasks that diverge can carry the
            mean; None for accuracies.
        values: those of every episode, `[episode]` or `[episode, instance or step]`, for paired comparisons; not
            recorded.

    Example:
        >>> print(Evaluation("accuracy", 0.9871, 0.0023, 1000, 5, 1, 15, "random-0/test", 0, "batch", True))
        98.7 ± 0.2%

    Reference:
        The interval is the one the papers report, e.g. Snell et al. (2017), table 1; accuracy by instance: Santoro et
        al. (2016), table 1.
    """

    metric: Metric
    mean: Any
    ci95: Any
    n_episodes: int
    n_way: int
    k_shot: int
    n_query: int
    split: str
    seed: int
    normalization: str
    transductive: bool
    median_by_step: Any = None
    values: Any = field(default=None, compare=False, repr=False)

    @property
    def accuracy(self) -> float:
        """The mean accuracy over all query images; a ValueError if something else was measured."""
        if self.metric != "accuracy" or not isinstance(self.mean, float):
            raise ValueError(f"this evaluation has the {self.metric}, see its mean")
        return self.mean

    def __str__(self) -> str:
        if self.metric == "accuracy":
            return self.cell()
        n = np.size(self.mean)
        if self.metric == "mse_by_step":
            median = "" if self.median_by_step is None else f" (median {self.median_by_step[-1]:.2f})"
            return f"MSE {self.cell(n - 1)}{median} after {n - 1} step{'s' * (n != 2)}"
        return ", ".join(f"{ordinal(i)} {self.cell(i)}" for i in sorted({1, 2, 5, n} & set(range(1, n + 1))))

    def cell(self, at: int = 1) -> str:
        """A mean with its interval: that of an instance, counted from 1, or of a step, counted from 0."""
        means, widths = np.atleast_1d(self.mean, self.ci95)
        if self.metric == "mse_by_step":
            return f"{means[at]:.2f} ± {widths[at]:.2f}"
        return f"{100 * means[at - 1]:.1f} ± {100 * widths[at - 1]:.1f}%"

    def record(self) -> dict[str, Any]:
        """What is written to `evaluations.json`: the means under the name of the metric."""
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_RECORDED}
        medians = {} if self.median_by_step is None else {"median_by_step": self.median_by_step}
        return {self.metric: self.mean, _INTERVAL[self.metric]: self.ci95} | medians | rest

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Evaluation:
        """The evaluation that `record` wrote; a ValueError if a key is missing; unknown keys are ignored."""
        metric: Any = next((name for name in _INTERVAL if name in record), "accuracy")
        try:
            rest = {f.name: record[f.name] for f in fields(cls) if f.name not in _NOT_RECORDED}
            rest |= {"mean": record[metric], "ci95": record[_INTERVAL[metric]]}
            return cls(metric=metric, median_by_step=record.get("median_by_step"), **rest)
        except KeyError as missing:
            raise ValueError(f"an evaluation lacks {missing}; repeat it with `metatutor evaluate`") from None


def scores(
    learner: Learner, sampler: Any, n_episodes: int, *, stream: bool = False, tasks_per_batch: int = 32
) -> Float[Tensor, "episode ..."]:
    """What a learner scores on each of a sampler's next tasks, in evaluation mode and on the device of the learner.

    Accuracies from 0 to 1, one per episode, or `[episode, instance]` for streams; squared errors `[episode, step]` for
    regressions. `tasks_per_batch` tasks are answered side by side, which does not change the result, except for
    rounding. Learners that embed each image alone do not embed one again that comes again (`learner.remembering`).
    """
    check_sizes(tasks_per_batch=tasks_per_batch)
    if stream and not learner.reads_streams:
        raise ValueError(f"{type(learner).__name__} answers no streams; leave stream out")
    sizes = [min(tasks_per_batch, n_episodes - start) for start in range(0, n_episodes, tasks_per_batch)]
    with evaluating(learner), learner.remembering():
        episodes = (learner.taken(sampler.sample(size)) for size in sizes)
        return torch.cat([learner.measure(episode, stream=stream).cpu().double() for episode in episodes])


def evaluate(
    learner: Learner,
    classes: Any,
    spec: EpisodeSpec,
    *,
    n_episodes: int = 1000,
    seed: int = 0,
    split: str = "",
    stream: bool = False,
    tasks_per_batch: int = 32,
) -> Evaluation:
    """Evaluate a learner on tasks drawn from classes, normally meta-test classes.

    Args:
        learner: in any mode; it is evaluated in evaluation mode and its mode restored.
        classes: where the tasks are drawn from: `ClassImages`, or anything that has a `sampler(spec, seed=…)`.
        spec: their shape.
        n_episodes: how many; at least 2.
        seed: seed of the stream of tasks.
        split: a name for the classes, for the record.
        stream: whether support sets are streams, where every image is classified before its label is revealed.
        tasks_per_batch: tasks answered side by side.

    Raises:
        ValueError: if there are fewer than 2 episodes, too few classes for the spec, or the learner was made for other
            tasks.

    Example:
        >>> from metatutor import NearestPixels, Strokes
        >>> classes = Strokes.load(n_alphabets=3, characters_per_alphabet=8).split().test
        >>> evaluate(NearestPixels(), classes, EpisodeSpec(5, 1, 5), n_episodes=10).n_episodes
        10
    """
    if n_episodes < 2:
        raise ValueError(f"n_episodes must be at least 2 for an interval, got {n_episodes}")
    sampler = classes.sampler(spec, seed=seed)
    with computing(learner):
        values = scores(learner, sampler, n_episodes, stream=stream, tasks_per_batch=tasks_per_batch)
        transductive = is_transductive(learner, classes.sampler(spec, seed=seed).sample(1))
    metric = "accuracy_by_instance" if stream else "mse_by_step" if values.dim() > 1 else "accuracy"
    return Evaluation(
        metric=metric,
        mean=values.mean(0).tolist(),
        ci95=confidence95(values),
        n_episodes=n_episodes,
        **asdict(spec),
        split=split,
        seed=seed,
        normalization=learner.normalization,
        transductive=transductive,
        median_by_step=values.quantile(0.5, dim=0).tolist() if metric == "mse_by_step" else None,
        values=values,
    )


def is_transductive(learner: Learner, episode: Episode) -> bool:
    """Whether a learner's answers for the first query image of an episode's first task change when the others do."""
    task = learner.taken(episode.task(0))
    others = task.query_images.clone()
    others[:, 1:] = others[:, 1:].flip(1, -1) + 0.5
    with evaluating(learner):
        before, after = (learner(t)[:, 0] for t in (task, replace(task, query_images=others)))
    return bool((before - after).abs().max() > 1e-4 * (1 + before.abs().max()))


def confidence95(values: Float[Tensor, "n ..."]) -> Any:
    """Half the width of the 95% confidence interval of the mean over the first axis: `1.96 * s / sqrt(n)`."""
    return (1.96 * values.std(0, correction=1) / len(values) ** 0.5).tolist()


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, …, for numbers up to 20."""
    return str(number) + {1: "st", 2: "nd", 3: "rd"}.get(number, "th")
