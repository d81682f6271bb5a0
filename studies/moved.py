"""What adaptation moves, over many tasks: each layer of several learners, and whether tasks of one alphabet move alike.

    python studies/moved.py

For each learner: by how much each layer's parameters change, and how alike its outputs for the query images are before
and after (linear CKA), mean and interval over tasks. For MAML also the change of the convolutions in tasks whose
characters are all of one alphabet: the first two principal components of it, and the mean cosine between the changes
of two tasks, of the same alphabet and of two.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from common import write
from torch import Tensor

from metatutor.analysis import what_moved
from metatutor.baselines import PretrainedFinetuned
from metatutor.data import Omniglot
from metatutor.episodes import ClassImages, Episode, EpisodeSpec
from metatutor.evaluation import confidence95
from metatutor.functional import Parameters, flatten_tasks
from metatutor.runs import load_run, run_names

RUNS = ("maml-5w1s", "anil-5w1s", "boil-5w1s", "protomaml-20w1s", "pretrained-finetuned-5w1s")
ALPHABETS, TASKS_OF_EACH = 7, 28


class Finetuning:
    """Fine-tuning as a path of two: the pretrained network and what came of it, both with the last layer of the end."""

    def __init__(self, learner: PretrainedFinetuned) -> None:
        self.learner, self.network = learner, learner.network

    def adaptation_path(self, episode: Episode, inner_steps: int | None = None) -> list[Parameters]:
        """Before the first step, but for the last layer, which each task begins anew with zeros; and after the last."""
        before, after = self.learner.with_arguments(steps=0).adapt(episode), self.learner.adapt(episode)
        head = self.network.head_prefix or ""
        return [{n: after[n] if n.startswith(head) else p for n, p in before.items()}, after]


def layers_moved(name: str, learner: Any, episode: Episode) -> dict[str, Any]:
    """Mean and interval of both measures for each layer; not for a last layer that fine-tuning begins anew."""
    begins_anew = isinstance(learner, PretrainedFinetuned)
    moved = what_moved(Finetuning(learner) if begins_anew else learner, episode)

    def of_layers(measured: dict[str, Tensor]) -> dict[str, list[float]]:
        layers = [name for name in measured if not (begins_anew and name.startswith("linear"))]
        return {name: [measured[name].mean().item(), confidence95(measured[name])] for name in layers}

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


def changes(learner: Any, episode: Episode) -> Tensor:
    """The change of the convolutions in each task, `[task, parameter]`."""
    path = learner.adaptation_path(episode)
    return flatten_tasks(path[-1][name] - path[0][name] for name in path[0] if name.startswith("blocks."))


def map_of_changes(learner: Any, classes: ClassImages) -> dict[str, Any]:
    """Two principal components of the directions of change, and cosines between tasks with something in common."""
    episode, alphabets = tasks_of_alphabets(classes)
    own = changes(learner, episode)
    centred = own - own.mean(0)
    directions = F.normalize(centred, dim=1)  # some tasks take far longer steps than others
    u, s, _ = torch.linalg.svd(directions - directions.mean(0), full_matrices=False)
    cosines = directions @ directions.T
    kind = torch.tensor([sorted(set(alphabets)).index(alphabet) for alphabet in alphabets])
    same, apart = kind[:, None] == kind, ~torch.eye(len(kind), dtype=torch.bool)
    # one mean a task, since its pairs are not independent of each other
    within = (cosines * (same & apart)).sum(1) / (same & apart).sum(1)
    between = (cosines * ~same).sum(1) / (~same).sum(1)
    others = torch.arange(5) * 15  # the first query image of each class stands in for the support image
    drawn_anew = replace(
        episode, support_images=episode.query_images[:, others], support_labels=episode.query_labels[:, others]
    )
    renumbered = replace(
        episode, support_labels=(episode.support_labels + 1) % 5, query_labels=(episode.query_labels + 1) % 5
    )
    pairs = {
        "two alphabets": between,
        "one alphabet": within,
        "the same characters, numbered otherwise": F.cosine_similarity(
            centred, changes(learner, renumbered) - own.mean(0)
        ),
        "the same characters, other drawings": F.cosine_similarity(centred, changes(learner, drawn_anew) - own.mean(0)),
    }
    return {
        "alphabets": [alphabet.replace("_", " ") for alphabet in alphabets],
        "components": (u[:, :2] * s[:2]).tolist(),
        "explained": (s[:2].square() / s.square().sum()).tolist(),
        "cosines": {name: [values.mean().item(), confidence95(values)] for name, values in pairs.items()},
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
    for name in (name for name in RUNS if f"omniglot-{name}" in run_names()):
        rows.append(layers_moved(name, load_run(f"omniglot-{name}").learner(), episode))
        print(name, rows[-1]["change"], flush=True)
    rows.append(map_of_changes(load_run("omniglot-maml-5w1s").learner(), characters.split(rotations=False).test))
    write("moved", rows)


if __name__ == "__main__":
    tyro.cli(main)
