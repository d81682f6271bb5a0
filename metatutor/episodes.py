"""Tasks: what one looks like (`EpisodeSpec`), its data (`Episode`), and where they come from (`EpisodeSampler`).

Images reach an episode from a `ClassImages`: one uint8 tensor of drawings, grouped by class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float, Int, Int64, UInt8
from torch import Tensor

from metatutor.checks import check_positive


@dataclass(frozen=True)
class EpisodeSpec:
    """The shape of a task: `n_way` classes, `k_shot` support and `n_query` query images of each.

    Args:
        n_way: classes in a task, at least 1.
        k_shot: labelled (support) images of each class, at least 1.
        n_query: images of each class to classify (query), at least 1.

    Raises:
        ValueError: if a size is not a positive integer.
    """

    n_way: int = 5
    k_shot: int = 1
    n_query: int = 15

    def __post_init__(self) -> None:
        for name in ("n_way", "k_shot", "n_query"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
            object.__setattr__(self, name, int(size))


@dataclass(frozen=True, eq=False)
class ClassImages:
    """Images by class: `images[c, d]` is drawing `d` of class `c`, pixels 0 (paper) to 255 (ink).

    With `rotations`, every class counts as four: as drawn, and rotated by 90, 180 and 270 degrees. The rotated classes
    are virtual: class `4 * c + r` is class `c` after `r` quarter turns; no pixel is copied.

    Args:
        images: `[class, drawing, channel, height, width]`, uint8.
        names: one name per class, such as `"Greek/character03"`.
        rotations: whether the three rotated copies of each class count as classes.
        together: the share of tasks whose classes all belong together, such as characters of one alphabet, and so are
            harder to tell apart. Classes belong together if their names are the same up to `/`.
        counts: how many images each class has, if not all have the same number. Its images come first; whatever follows
            them in `images` is never drawn. See `metatutor.data.images` for folders, datasets and arrays.

    Raises:
        ValueError: if images are not uint8 or are channels-last, names or counts do not match them, or rotations are
            requested for images that are not square.

    Example:
        >>> classes = ClassImages(torch.zeros(3, 20, 1, 28, 28, dtype=torch.uint8), ("a", "b", "c"), rotations=True)
        >>> len(classes), classes.name(6)
        (12, 'b (turned 180°)')

    Reference:
        Rotated classes: Santoro et al. (2016), section 4.1.
    """

    images: UInt8[Tensor, "drawn_class drawing channel height width"]
    names: Sequence[str]
    rotations: bool = False
    counts: Int64[Tensor, " drawn_class"] | None = None
    together: float = 0.0

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if self.images.dim() != 5:
            raise ValueError(f"images must be [class, drawing, channel, height, width], got {list(shape)}")
        if self.images.dtype != torch.uint8:
            raise ValueError(
                f"images must be uint8, 0 (paper) to 255 (ink), got {self.images.dtype}; for floats from 0 to 1 give "
                "(255 * images).round().to(torch.uint8)"
            )
        if shape[-1] in (1, 3, 4) and shape[2] not in (1, 3, 4):
            raise ValueError(f"images are channels-last, {list(shape)}; give images.movedim(-1, 2)")
        if not 0 <= self.together <= 1:
            raise ValueError(f"together is a share of tasks, from 0 to 1, got {self.together}")
        if len(self.names) != len(self.images):
            raise ValueError(
                f"{len(self.images)} classes of images but {len(self.names)} names; give one name per class"
            )
        if self.rotations and shape[-1] != shape[-2]:
            raise ValueError(
                f"rotations need square images, got {shape[-2]}×{shape[-1]}; resize them or drop rotations"
            )
        if self.counts is not None and len(self.counts) != len(self.images):
            raise ValueError(f"{len(self.images)} classes but {len(self.counts)} counts; give one per class")
        if self.counts is not None and not (self.counts.min() >= 1 and self.counts.max() <= shape[1]):
            raise ValueError(
                f"counts must be from 1 to {shape[1]}, the most images that a class has room for, got {self.counts}"
            )

    def __len__(self) -> int:
        return len(self.images) * (4 if self.rotations else 1)

    def name(self, index: int) -> str:
        """The name of class `index`, with its rotation if it is a rotated class."""
        if not self.rotations:
            return self.names[index]
        turned = f" (turned {90 * (index % 4)}°)" if index % 4 else ""
        return self.names[index // 4] + turned

    def with_rotations(self) -> ClassImages:
        """The same drawings with every class counted four times, once for each quarter turn."""
        return replace(self, rotations=True)

    def sampler(self, spec: EpisodeSpec, *, seed: int = 0) -> EpisodeSampler:
        """A sampler of tasks from these classes."""
        return EpisodeSampler(self, spec, seed=seed)

    def mini_batches(self, spec: EpisodeSpec, *, seed: int = 0) -> ClassificationSampler:
        """A sampler of ordinary mini-batches from all classes, with as many images per row as a task of this spec."""
        return ClassificationSampler(self, spec.n_way * (spec.k_shot + spec.n_query), seed=seed)

    def to(self, device: torch.device | str) -> ClassImages:
        """The same classes with their pixels on `device`."""
        return replace(self, images=self.images.to(device))

    def take(
        self, classes: Int64[Tensor, "*batch"], drawings: Int64[Tensor, "*batch n"]
    ) -> UInt8[Tensor, "*batch n channel height width"]:
        """The given drawings of the given classes, rotated where the class is a rotated one."""
        n_drawings, size, device = self.images.shape[1], self.images.shape[2:], self.images.device
        drawn, turns = (classes // 4, classes.flatten() % 4) if self.rotations else (classes, None)
        rows = (drawn.unsqueeze(-1) * n_drawings + drawings).view(classes.numel(), -1)
        every_drawing = self.images.flatten(0, 1)
        if turns is None:
            return every_drawing.index_select(0, rows.flatten().to(device)).view(*drawings.shape, *size)
        order = turns.argsort()  # sorted by rotation, so that rotating takes four slices, not four masks
        taken = every_drawing.index_select(0, rows[order].flatten().to(device)).view(*rows.shape, *size)
        parts = taken.split(turns.bincount(minlength=4).tolist())
        turned = torch.cat([part.rot90(quarter, (-2, -1)) for quarter, part in enumerate(parts)])
        return turned.index_select(0, order.argsort().to(device)).view(*drawings.shape, *size)


@dataclass(frozen=True, eq=False)
class Episode:
    """A batch of tasks: what a learner may learn from (support) and what it must answer (query).

    Labels run from 0 to `n_way - 1` and mean nothing outside their task; `learner.predict` takes any labels. In a
    regression task `images` are vectors, `labels` the real-valued targets, `[task, support, output]`, and `n_way` is
    how many numbers a target has.

    Args:
        support_images: `[task, support, channel, height, width]`, pixels from 0 (paper) to 1 (ink).
        support_labels: one label per support image; every class has at least one.
        query_images: `[task, query, channel, height, width]`.
        query_labels: one label per query image, if they are known; a learner's `forward` never reads them.
        n_way: classes in each task; default: inferred from the support labels.

    Raises:
        ValueError: if shapes do not match, pixels are not floating-point numbers, or labels are not those of `n_way`
            classes. `learner.predict` takes any labels, and images in other forms too.

    Example:
        >>> images, labels = torch.zeros(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> episode = Episode(images, labels, images, labels, n_way=5)
        >>> len(episode), len(episode.task(0))
        (2, 1)

    Reference:
        Vinyals et al. (2016), Matching Networks for One Shot Learning, section 4.1.
    """

    support_images: Float[Tensor, "task support *image"]
    support_labels: Int[Tensor, "task support"] | Float[Tensor, "task support way"]
    query_images: Float[Tensor, "task query *image"]
    query_labels: Any = None  # like support_labels, if they are known
    n_way: int = 0

    def __post_init__(self) -> None:
        if not self.n_way:
            object.__setattr__(self, "n_way", _count_ways(self.support_labels))
        for part in ("support", "query"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            if images.dim() < 3:
                raise ValueError(
                    f"{part}_images must be [task, image, ...], got {list(images.shape)}; one task needs images[None]"
                )
            if not images.is_floating_point():
                raise ValueError(
                    f"{part}_images must be floats, 0 (paper) to 1 (ink), got {images.dtype}; divide by 255 first"
                )
            if labels is not None:
                object.__setattr__(self, f"{part}_labels", _checked_labels(labels, images, self.n_way, part))
        if len(self.query_images) != len(self.support_images):
            raise ValueError(
                f"{len(self.support_images)} tasks of support images but {len(self.query_images)} of query images"
            )
        support, query = self.support_images.shape[2:], self.query_images.shape[2:]
        if support != query:
            raise ValueError(
                f"support images are {list(support)} but query images {list(query)}; give both in one size"
            )

    @classmethod
    def unchecked(cls, *tensors: Tensor, n_way: int) -> Episode:
        """An episode of tensors `[task, ...]` that are known to be valid: while tracing, values cannot be checked."""
        made = object.__new__(cls)
        names = ("support_images", "support_labels", "query_images", "query_labels")
        vars(made).update(zip(names, tensors, strict=True), n_way=n_way)
        return made

    def __len__(self) -> int:
        return len(self.support_images)

    def __iter__(self) -> Iterator[Episode]:
        return (self.task(i) for i in range(len(self)))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Episode:
        changed = copy(self)  # which does not check the labels again
        vars(changed).update({name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)})
        return changed

    def chance(self) -> torch.Generator:
        """A generator seeded by the episode itself, for methods that need random numbers to answer."""
        return torch.Generator().manual_seed(int(self.query_images.double().sum().item() * 2**30) % 2**63)

    def to(self, *where: Any) -> Episode:
        """The same tasks on a device, or with pixels (and real-valued targets) of another dtype."""
        device = self.query_images[:0].to(*where).device  # class labels keep their dtype
        return self._map(lambda tensor: tensor.to(*where) if tensor.is_floating_point() else tensor.to(device))

    def tasks(self, which: slice) -> Episode:
        """The tasks of a slice, still as a batch."""
        return self._map(lambda tensor: tensor[which])

    def task(self, index: int) -> Episode:
        """Task `index`, counted from 0, as a batch of one; a ValueError if there is no such task."""
        if not 0 <= index < len(self):
            raise ValueError(f"no task {index} in an episode of {len(self)} tasks; count from 0")
        return self.tasks(slice(index, index + 1))


class EpisodeSampler:
    """Draws tasks: `n_way` distinct classes each, support and query drawings disjoint.

    Every draw comes from CPU generators, so the same seed gives the same tasks on every platform and device, however
    many are drawn at once. Which class gets which label is part of the draw, and the support images come in random
    order. Where rotated classes count, no task has the same class in two rotations: a circle and a rotated circle are
    one.

    Args:
        classes: where the images come from.
        spec: the shape of the tasks.
        seed: selects the stream of tasks.

    Raises:
        ValueError: if there are fewer classes (not counting rotated ones) than `n_way`, or fewer drawings of a class
            than `k_shot + n_query`.

    Example:
        >>> classes = ClassImages(torch.zeros(8, 20, 1, 28, 28, dtype=torch.uint8), list("abcdefgh"))
        >>> EpisodeSampler(classes, EpisodeSpec(5, 1, 15), seed=0).sample(4).query_images.shape
        torch.Size([4, 75, 1, 28, 28])
    """

    def __init__(self, classes: ClassImages, spec: EpisodeSpec, *, seed: int = 0) -> None:
        if spec.n_way > len(classes.names):
            raise ValueError(
                f"n_way = {spec.n_way} exceeds the {len(classes.names)} classes of this split; lower n_way"
            )
        counts = [classes.images.shape[1]] * len(classes.names) if classes.counts is None else classes.counts.tolist()
        if spec.k_shot + spec.n_query > min(counts):
            lower = "n_query" if spec.k_shot < min(counts) else "k_shot"
            raise ValueError(
                f"k_shot + n_query = {spec.k_shot + spec.n_query} exceeds the {min(counts)} drawings "
                f"of class '{classes.names[counts.index(min(counts))]}'; lower {lower}"
            )
        self.classes, self.spec = classes, spec
        self.groups = _groups(classes.names, spec.n_way) if classes.together else []
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.Generator().manual_seed(seed)  # of the support set: separate, so that it changes no task

    def state_dict(self) -> dict[str, Tensor]:
        """The position in the stream of tasks."""
        return {"generator": self.generator.get_state(), "order": self.order.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from where `state_dict` was taken."""
        self.generator.set_state(state["generator"])
        self.order.set_state(state["order"])

    def sample(self, n_tasks: int) -> Episode:
        """Draw the next `n_tasks` tasks; a ValueError if that is not positive."""
        return self.sample_with_classes(n_tasks)[0]

    def sample_with_classes(self, n_tasks: int) -> tuple[Episode, Int64[Tensor, "task way"]]:
        """Draw the next `n_tasks` tasks; also return which class each label stands for."""
        check_positive(n_tasks=n_tasks)
        n_way, k_shot, n_query = self.spec.n_way, self.spec.k_shot, self.spec.n_query
        classes, drawings = self._draw(n_tasks)
        pixels = self.classes.take(classes, drawings)  # [task, way, shot, channel, height, width]
        support, query = (part.flatten(1, 2) for part in pixels.split([k_shot, n_query], dim=2))
        keys = torch.rand(n_tasks, n_way * k_shot, dtype=torch.float64, generator=self.order)
        order = keys.argsort().to(pixels.device)  # sorted by class, the support set would give its labels away
        support = support[torch.arange(n_tasks, device=pixels.device)[:, None], order]
        query_labels = torch.arange(n_way, device=pixels.device).repeat_interleave(n_query).repeat(n_tasks, 1)
        support, query = support.float().div_(255), query.float().div_(255)
        return Episode(support, order // k_shot, query, query_labels, n_way), classes

    def _draw(self, n_tasks: int) -> tuple[Int64[Tensor, "task way"], Int64[Tensor, "task way shot"]]:
        """Distinct classes of each task, distinct drawings of each class, in random order."""
        n_drawn, n_drawings = self.classes.images.shape[:2]
        n_way, n_shots = self.spec.n_way, self.spec.k_shot + self.spec.n_query
        # one row of random keys per task, so that a task does not depend on how many are drawn at once
        sizes = [n_drawn, n_way, n_way * n_drawings]
        keys = torch.rand(n_tasks, sum(sizes), dtype=torch.float64, generator=self.generator).split(sizes, dim=1)
        classes = keys[0].topk(n_way).indices
        of_drawings = keys[2].unflatten(1, (n_way, n_drawings))
        if self.classes.counts is not None:
            absent = torch.arange(n_drawings) >= self.classes.counts[classes][..., None]
            of_drawings = of_drawings.masked_fill(absent, -1.0)
        turns = (keys[1] * 4).long()
        if self.classes.together:
            self._put_together(classes, turns)
        if self.classes.rotations:
            classes = classes * 4 + turns
        return classes, of_drawings.topk(n_shots).indices

    def _put_together(self, classes: Int64[Tensor, "task way"], turns: Int64[Tensor, "task way"]) -> None:
        """Replace the classes of a share of the tasks by classes that belong together, all in the same rotation."""
        for task in range(len(classes)):
            chance, which = torch.rand(2, dtype=torch.float64, generator=self.generator).tolist()
            if chance < self.classes.together:
                members = self.groups[int(which * len(self.groups))]
                chosen = torch.randperm(len(members), generator=self.generator)[: self.spec.n_way]
                classes[task], turns[task] = members[chosen], turns[task, 0]


def _groups(names: Sequence[str], n_way: int) -> list[Int64[Tensor, " member"]]:
    """The groups of classes that belong together by name, where there are enough for a task."""
    members: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        members.setdefault(name.partition("/")[0], []).append(number)
    large = [torch.tensor(group) for group in members.values() if len(group) >= n_way]
    if not large:
        most = max(map(len, members.values()))
        raise ValueError(f"n_way = {n_way} exceeds the {most} classes of the largest group; lower n_way or together")
    return large


class SeededSampler:
    """A base class that draws a stream of tasks from one generator, all that a resumed run must restore.

    Args:
        seed: selects the stream.
    """

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def state_dict(self) -> dict[str, Tensor]:
        """The position in the stream."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from where `state_dict` was taken."""
        self.generator.set_state(state["generator"])


class ClassificationSampler(SeededSampler):
    """Draws ordinary mini-batches of labelled images, dressed up as an episode.

    A mini-batch is an episode without support: one task over all the classes at once, as for the baselines of Chen et
    al. (2019), section 3.2. The class of each image is drawn at random, with replacement. The rows of an episode split
    the mini-batch into parts, which processes can share: `n_tasks * images_per_task` images in all.

    Args:
        classes: where the images come from; label `c` is class `c`.
        images_per_task: images in a row.
        seed: selects the stream of images.
    """

    def __init__(self, classes: ClassImages, images_per_task: int, *, seed: int = 0) -> None:
        check_positive(images_per_task=images_per_task)
        self.classes, self.images_per_task = classes, images_per_task
        super().__init__(seed)

    def sample(self, n_tasks: int) -> Episode:
        """Draw the next `n_tasks` rows of images."""
        check_positive(n_tasks=n_tasks)
        shape, n_way = (n_tasks, self.images_per_task), len(self.classes)
        labels = torch.randint(n_way, shape, generator=self.generator)
        if self.classes.counts is None:
            drawings = torch.randint(self.classes.images.shape[1], shape, generator=self.generator)
        else:
            counts = self.classes.counts[labels // (4 if self.classes.rotations else 1)]
            drawings = (torch.rand(shape, dtype=torch.float64, generator=self.generator) * counts).long()
        images = self.classes.take(labels, drawings.unsqueeze(-1)).squeeze(2).float().div_(255)
        labels = labels.to(images.device)
        return Episode(images[:, :0], labels[:, :0], images, labels, n_way)


def _checked_labels(labels: Tensor, images: Tensor, n_way: int, part: str) -> Tensor:
    if labels.shape[:2] != images.shape[:2]:
        raise ValueError(
            f"{part}_labels must be [task, image], here {list(images.shape[:2])}, got {list(labels.shape)}; "
            "a batch of one task has a task axis too, as in labels[None]"
        )
    if labels.is_floating_point():
        if labels.dim() != 3 or labels.shape[2] != n_way:
            raise ValueError(
                f"{part}_labels are floats: targets of a regression must be [task, point, {n_way}], got "
                f"{list(labels.shape)}; class labels must be integers"
            )
        return labels
    if labels.dim() != 2:
        raise ValueError(f"{part}_labels of classes must be [task, image], got {list(labels.shape)}")
    labels = labels.long()
    if not labels.numel():
        return labels
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= n_way:
        raise ValueError(
            f"{part}_labels run from {low} to {high}, but labels of {n_way} classes run from 0 to {n_way - 1}; "
            "learner.predict takes labels of any kind"
        )
    if part == "support":
        present = torch.zeros(len(labels), n_way, dtype=torch.bool, device=labels.device).scatter(1, labels, True)
        if not bool(present.all()):
            missing = int((~present).any(0).nonzero()[0])
            raise ValueError(
                f"class {missing} of n_way = {n_way} has no support image in some task; number only the classes "
                "that are present, from 0 (learner.predict does)"
            )
    return labels


def _count_ways(labels: Tensor) -> int:
    return labels.shape[-1] if labels.is_floating_point() else int(labels.max()) + 1 if labels.numel() else 0
