"""What adaptation moves, over many tasks: each layer of several learners, and whether tasks of one alphabet move alike.

    python studies/moved.py

For each learner: by how much each layer's parameters change, and how alike its outputs for the query images are before
and after (linear CKA), mean and interval over tasks. For MAML also the change of the convolutions in tasks whose
characters are all of one alphabet: the first two principal components of it, and the mean cosine between the changes
of two tasks, of the same alphabet and of two.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import tyro
from common import write
from torch import Tensor

from metatutor.analysis import what_moved
from metatutor.baselines import PretrainedFinetuned
from metatutor.data import Omniglot
from metatutor.episodes import ClassImages, Episode, EpisodeSpec
from metatutor.evaluation import confidence95
from metatutor.functional import Parameters, flatten_tasks
from metatutor.runs import load_run

RUNS = ("maml-5w1s", "anil-5w1s", "boil-5w1s", "protomaml-20w1s", "pretrained-finetuned-5w1s")
ALPHABETS, TASKS_OF_EACH = 8, 25


class Finetuning:
    """Fine-tuning as a path of two: the pretrained network with a last layer of zeros, and what came of it."""

    def __init__(self, learner: PretrainedFinetuned) -> None:
        self.learner, self.network = learner, learner.network

    def adaptation_path(self, episode: Episode, inner_steps: int | None = None) -> list[Parameters]:
        """Before the first step and after the last."""
        return [self.learner.with_arguments(steps=0).adapt(episode), self.learner.adapt(episode)]


def layers_moved(name: str, learner: Any, episode: Episode) -> dict[str, Any]:
    """Mean and interval of both measures for each layer; a last layer that begins as zeros has no relative change."""
    moved = what_moved(Finetuning(learner) if isinstance(learner, PretrainedFinetuned) else learner, episode)

    def of_layers(measured: dict[str, Tensor]) -> dict[str, list[float]]:
        finite = {layer: values for layer, values in measured.items() if bool(values.isfinite().all())}
        return {layer: [values.mean().item(), confidence95(values)] for layer, values in finite.items()}

    return {"run": name, "change": of_layers(moved.change), "similarity": of_layers(moved.similarity)}


def tasks_of_alphabets(classes: ClassImages) -> tuple[Episode, list[str]]:
    """Tasks whose characters are all of one alphabet, and which one; of the alphabets with most characters."""
    members = defaultdict(list)
    for i, name in enumerate(classes.names):
        members[name.partition("/")[0]].append(i)
    largest = sorted(members, key=lambda alphabet: (-len(members[alphabet]), alphabet))[:ALPHABETS]
    parts = []
    for alphabet in largest:
        own = members[alphabet]
        of_alphabet = ClassImages(classes.images[own], [str(classes.names[i]) for i in own])
        parts.append(of_alphabet.sampler(EpisodeSpec(5, 1, 15), seed=0).sample(TASKS_OF_EACH))
    fields = ("support_images", "support_labels", "query_images", "query_labels")
    joined = [torch.cat([getattr(part, name) for part in parts]) for name in fields]
    return Episode(*joined, n_way=5), [alphabet for alphabet in largest for _ in range(TASKS_OF_EACH)]


def map_of_changes(learner: Any, classes: ClassImages) -> dict[str, Any]:
    """Two principal components of the convolutions' change in each task, and cosines within and between alphabets."""
    episode, alphabets = tasks_of_alphabets(classes)
    before, after = learner.adaptation_path(episode)[:: len(learner.adaptation_path(episode)) - 1]
    convolutions = [name for name in before if name.startswith("blocks.")]
    changes = flatten_tasks(after[name] - before[name] for name in convolutions)
    centred = changes - changes.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    directions = torch.nn.functional.normalize(centred, dim=1)
    cosines, of_task = directions @ directions.T, torch.tensor([sorted(set(alphabets)).index(a) for a in alphabets])
    same = of_task[:, None] == of_task
    apart = ~torch.eye(len(alphabets), dtype=torch.bool)
    # one number an alphabet, since its pairs of tasks are not independent of each other
    within = torch.stack([cosines[i][:, i][apart[i][:, i]].mean() for i in (of_task == a for a in of_task.unique())])
    between = torch.stack([cosines[i][:, ~i].mean() for i in (of_task == a for a in of_task.unique())])
    shuffled = of_task[torch.randperm(len(of_task), generator=torch.Generator().manual_seed(0))]
    by_chance = cosines[(shuffled[:, None] == shuffled) & apart].mean().item()
    return {
        "alphabets": alphabets,
        "components": (u[:, :2] * s[:2]).tolist(),
        "explained": (s[:2].square() / s.square().sum()).tolist(),
        "cosine_within": [within.mean().item(), confidence95(within)],
        "cosine_between": [between.mean().item(), confidence95(between)],
        "cosine_shuffled": by_chance,
        "n_same": int((same & apart).sum()),
    }


@torch.no_grad()
def main(data: Path | None = None, tasks: int = 200) -> None:
    """Adapt every learner to the same tasks, and write `results/studies/moved.json`.

    Args:
        data: where Omniglot lies.
        tasks: 5-way 1-shot tasks of test characters.
    """
    torch.set_num_threads(1)
    characters = Omniglot.load(data)
    classes = characters.split().test
    episode = classes.sampler(EpisodeSpec(5, 1, 15), seed=2).sample(tasks)
    rows = []
    for name in RUNS:
        rows.append(layers_moved(name, load_run(f"omniglot-{name}").learner(), episode))
        print(name, rows[-1]["change"], flush=True)
    rows.append(map_of_changes(load_run("omniglot-maml-5w1s").learner(), characters.split(rotations=False).test))
    write("moved", rows)


if __name__ == "__main__":
    tyro.cli(main)
