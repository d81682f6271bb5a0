"""Few-shot generation: models trained on the background alphabets, asked about characters of the evaluation alphabets.

    python studies/generation.py --work FOLDER --judge FOLDER/model.safetensors

Three models are trained, an hour on one core in all: one that looks at a support set, the same without, and the latter
with a decoder that MAML adapts, by learned step sizes, one for each layer and step. The judge is a Prototypical Network
that never saw the evaluation alphabets, such as `studies/lake.py --train` leaves. The weights of the first model go to
`results/studies/`, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from common import write
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from metatutor import MAML, ConvNet, EpisodeSpec, Prototypical, TrainConfig, train
from metatutor.applications.generation import (
    Adaptable,
    ConditionalVAE,
    Drawings,
    drawing_task,
    ink,
    minus_bound,
    spread_of_places,
)
from metatutor.data import Omniglot
from metatutor.data.warp import warp
from metatutor.episodes import ClassImages, Episode, EpisodeSampler
from metatutor.evaluation import confidence95
from metatutor.runs import results_folder

Row = dict[str, Any]
SHOTS = (1, 2, 5, 10)
HEATS = (0.25, 0.5, 0.75, 1.0)
PER_CLASS = 20  # drawings of a character, ten of which are support, the others query
WITH_SUPPORT = TrainConfig(5000, 1, outer_lr=2e-3, warmup=100, checkpoint_every=500, log_every=500)
AGAIN = TrainConfig(3500, 1, outer_lr=1.5e-3, warmup=100, checkpoint_every=500, log_every=500, seed=1)
WITHOUT = TrainConfig(2500, 1, outer_lr=2e-3, warmup=100, checkpoint_every=500, log_every=500)
ADAPTED = TrainConfig(1000, 4, outer_lr=3e-4, warmup=20, checkpoint_every=50, log_every=50)


# --- training ---


class Redrawn:
    """Characters as tasks of drawing them again, for learners that adapt by gradients."""

    def __init__(self, classes: ClassImages) -> None:
        self.classes = classes

    def sampler(self, spec: EpisodeSpec, *, seed: int = 0) -> RedrawnSampler:
        """What draws such tasks."""
        return RedrawnSampler(self.classes, spec, seed=seed)


class RedrawnSampler(EpisodeSampler):
    """Draws characters as tasks of drawing them again."""

    def sample(self, n_tasks: int) -> Episode:
        """Draw the next `n_tasks` tasks."""
        episode = super().sample(n_tasks)
        return drawing_task(episode.support_images, episode.query_images)


def trained(learner: Any, classes: Any, spec: EpisodeSpec, config: TrainConfig, folder: Path) -> float:
    """Train, or go on where a training stopped; how long it took, in seconds."""
    history = train(learner, classes, spec, config, device="cpu", folder=folder, progress_bar=False)
    learner.eval()
    return history[-1]["seconds"]


def models(classes: ClassImages, work: Path) -> tuple[dict[str, Any], list[Row]]:
    """The three models, and how long each was trained."""
    torch.manual_seed(0)
    with_support, without = ConditionalVAE(), ConditionalVAE(max_shots=0)
    first = trained(with_support, classes, EpisodeSpec(16, 10, 10), WITH_SUPPORT, work / "with")
    again = trained(with_support, classes, EpisodeSpec(16, 10, 10), AGAIN, work / "again")  # the rate rises once more
    seconds = [first + again, trained(without, classes, EpisodeSpec(16, 1, 10), WITHOUT, work / "without")]
    start = ConditionalVAE(max_shots=0)
    start.load_state_dict(without.state_dict())
    adapted = MAML(Adaptable(start), inner_lr=1e-4, inner_steps=3, learned_lr="layer", loss=minus_bound)
    torch.manual_seed(0)
    seconds.append(trained(adapted, Redrawn(classes), EpisodeSpec(1, 3, 10), ADAPTED, work / "adapted"))
    with_support.places.copy_(spread_of_places(drawings_of(replace(classes, rotations=False))))
    found = {"with support": with_support, "without": without, "adapted": adapted}
    names = zip(found, seconds, strict=True)
    return found, [{"what": "training", "model": name, "seconds": time} for name, time in names]


# --- how probable ---


def drawings_of(classes: ClassImages) -> Float[Tensor, "class drawing 1 28 28"]:
    """All drawings of every class, in a random order: the first ten are support, the others query."""
    order = torch.Generator().manual_seed(0)
    places = torch.stack([torch.randperm(PER_CLASS, generator=order) for _ in range(len(classes))])
    return classes.take(torch.arange(len(classes)), places).float() / 255


def bounds(found: dict[str, Any], drawings: Float[Tensor, "class drawing 1 28 28"]) -> Iterator[Row]:
    """The bound on unseen characters, in nats a drawing, against shots; the interval is over characters."""
    chance = torch.Generator().manual_seed(0)
    for name, model in (("without", found["without"]), ("with support", found["with support"])):
        for shots in (0,) if name == "without" else SHOTS:
            with torch.no_grad():
                of_classes = torch.stack(
                    [model.bound(own[10:], model.context(own[:shots]), chance).mean() for own in drawings]
                )
            yield {"what": "bound", "model": name, "shots": shots} | _mean(of_classes)
    torch.manual_seed(0)
    adapted = found["adapted"]
    for shots in SHOTS:
        task = drawing_task(drawings[:, :shots], drawings[:, 10:])
        outputs = torch.cat([adapted(task.tasks(slice(i, i + 8))).detach() for i in range(0, len(drawings), 8)])
        pairs = zip(outputs, task.query_labels, strict=True)
        yield {"what": "bound", "model": "adapted", "shots": shots} | _mean(
            torch.stack([-minus_bound(*p) for p in pairs])
        )


def weighted(found: dict[str, Any], drawings: Float[Tensor, "class drawing 1 28 28"]) -> Iterator[Row]:
    """The bound by several samples of `z`, on one drawing of every third character."""
    chance = torch.Generator().manual_seed(0)
    for name, shots in (("without", 0), ("with support", 1), ("with support", 5)):
        model, chosen = found[name], drawings[::3]
        with torch.no_grad():
            contexts = torch.cat([model.context(own[:shots]) for own in chosen])
        for samples in (1, 50, 500):
            each = model.log_likelihood(chosen[:, 10], contexts, chance, samples=samples)
            yield {"what": "weighted", "model": name, "shots": shots, "samples": samples} | _mean(each)


# --- recognisable, copied? ---


def judged(
    judge: Prototypical, known: Float[Tensor, "way shot 1 28 28"], asked: Float[Tensor, "way n 1 28 28"]
) -> Float[Tensor, ""]:
    """How many of the drawings asked the judge names rightly, given some real ones of each character."""
    support, query = (
        judge.network.embed(ink(images.flatten(0, 1))).unflatten(0, images.shape[:2]) for images in (known, asked)
    )
    squares = torch.cdist(query.flatten(0, 1), support.mean(1))
    return (squares.argmin(1) == torch.arange(len(known)).repeat_interleave(asked.shape[1])).double().mean()


def overlap(drawn: Drawings, others: Drawings) -> Float[Tensor, " n"]:
    """Of each drawing, the ink that it shares with the most similar of the others, over the ink in either."""
    one, other = ink(drawn).flatten(1), ink(others).flatten(1)
    shared = one @ other.T
    return (shared / (one.sum(1)[:, None] + other.sum(1) - shared)).amax(1)


@torch.no_grad()
def looked_at(
    found: dict[str, Any], judge: Prototypical, drawings: Float[Tensor, "class drawing 1 28 28"], n_tasks: int = 60
) -> Iterator[Row]:
    """Accuracy of the judge among 20 characters, and overlap with the support set, of samples and of real drawings.

    `unseen` is the overlap of samples with as many drawings of their character that the model was not shown.
    """
    chance = torch.Generator().manual_seed(0)
    tasks = [torch.randperm(len(drawings), generator=chance)[:20] for _ in range(n_tasks)]
    real = [drawings[task] for task in tasks]
    accuracy = torch.stack([judged(judge, own[:, 10:15], own[:, 15:]) for own in real])
    yield {"what": "judge", "model": "real drawings"} | _mean(accuracy)
    for shots in SHOTS:
        copied = torch.stack([overlap(own[10:], own[:shots]).mean() for task in real for own in task])
        yield {"what": "overlap", "model": "real drawings", "shots": shots} | _mean(copied)
    settings = [("without", 0, 1.0)] + [("with support", shots, heat) for shots in SHOTS for heat in HEATS]
    for name, shots, heat in settings:
        accuracies, copied, unseen = [], [], []
        for own in real:
            drawn = torch.stack([found[name].draw(one[:shots], 5, chance, temperature=heat) for one in own])
            accuracies.append(judged(judge, own[:, 10:15], drawn))
            copied += [overlap(*pair).mean() for pair in zip(drawn, own[:, :shots], strict=True) if shots]
            unseen += [overlap(*pair).mean() for pair in zip(drawn, own[:, 10 : 10 + shots], strict=True) if shots]
        row: Row = {"model": name, "shots": shots, "temperature": heat}
        yield {"what": "judge"} | row | _mean(torch.stack(accuracies))
        if shots:
            yield {"what": "overlap"} | row | _mean(torch.stack(copied)) | {"unseen": torch.stack(unseen).mean().item()}


# --- useful? ---


def classifier(images: Drawings, labels: Tensor, *, warped: bool, seed: int, steps: int = 60) -> ConvNet:
    """A small network for 20 characters, trained from nothing on some drawings, warped at random or not."""
    torch.manual_seed(seed)
    network = ConvNet(20, filters=32)
    descent = torch.optim.Adam(network.parameters(), lr=3e-3)
    chance = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(images), (60,), generator=chance)
        batch = images[chosen][None]
        if warped:
            zeros = torch.zeros(1, len(chosen), dtype=torch.long)  # whatever they show
            batch = warp(Episode(batch, zeros, batch[:, :1])).support_images
        loss = F.cross_entropy(network(batch[0]), labels[chosen])
        descent.zero_grad()
        loss.backward()
        descent.step()
    return network


def useful(found: dict[str, Any], drawings: Float[Tensor, "class drawing 1 28 28"], n_tasks: int = 12) -> Iterator[Row]:
    """Accuracy among 20 unseen characters of a classifier from nothing, with samples as additional training images."""
    chance, model = torch.Generator().manual_seed(1), found["with support"]
    tasks = [torch.randperm(len(drawings), generator=chance)[:20] for _ in range(n_tasks)]
    for shots in SHOTS:
        accuracies: dict[str, list[Tensor]] = {"nothing": [], "warps": [], "samples": [], "both": []}
        for seed, task in enumerate(tasks):
            own, labels = drawings[task], torch.arange(20)
            real = own[:, :shots]
            drawn = torch.stack([model.draw(one, 20, chance, temperature=0.5) for one in real])
            more = torch.cat([real.repeat(1, 20 // shots, 1, 1, 1), drawn], dim=1)  # half real, half drawn
            for name, made in {"nothing": real, "warps": real, "samples": more, "both": more}.items():
                of_images = labels.repeat_interleave(made.shape[1])
                network = classifier(made.flatten(0, 1), of_images, warped=name in ("warps", "both"), seed=seed)
                with torch.no_grad():
                    answers = network(own[:, 10:].flatten(0, 1)).argmax(1)
                accuracies[name].append((answers == labels.repeat_interleave(10)).double().mean())
        plain = torch.stack(accuracies["warps"])
        for name, values in accuracies.items():
            of_tasks = torch.stack(values)
            ahead = {"ahead": (of_tasks - plain).mean().item(), "ahead_ci95": confidence95(of_tasks - plain)}
            yield {"what": "augmentation", "with": name, "shots": shots} | _mean(of_tasks) | ahead


def _mean(values: Float[Tensor, " n"]) -> Row:
    return {"mean": values.mean().item(), "ci95": confidence95(values)}


def main(work: Path, judge: Path, data: Path | None = None) -> None:
    """Train, measure, and write `results/studies/generation.json` and weights.

    Args:
        work: a folder for checkpoints; trainings that were cut off go on.
        judge: weights of a Prototypical Network that was trained on the background alphabets.
        data: where Omniglot lies.
    """
    torch.set_num_threads(1)
    splits = Omniglot.load(data).split("lake")
    found, rows = models(splits.train, work)
    looking = Prototypical(ConvNet(pooling="max", normalization="group"))
    looking.load_state_dict(load_file(judge))
    looking.eval()
    halves = {key: value.half().contiguous() for key, value in found["with support"].state_dict().items()}
    save_file(halves, results_folder() / "studies/generation.safetensors")
    drawings = drawings_of(Omniglot.load(data).split("lake", rotations=False).test)
    measured = bounds(found, drawings), weighted(found, drawings), looked_at(found, looking, drawings)
    for part in (*measured, useful(found, drawings)):
        for row in part:
            rows.append(row)
            print(row, flush=True)
            write("generation", rows)


if __name__ == "__main__":
    tyro.cli(main)
