"""Tasks: what one looks like (`EpisodeSpec`), its data (`Episode`), and where they come from (`EpisodeSampler`).

Images reach an episode from a `ClassImages`: one uint8 tensor of drawings, grouped by class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor


@dataclass(frozen=True)
class EpisodeSpec:
    """The shape of a task: `n_way` classes, `k_shot` support and `n_query` query images of each.

    Args:
        n_way: classes in a task, at least 1.
        k_shot: labelled (support) images of each class, at least 1.
        n_query: images of each class to classify (query), at least 1.

    Raises:
        ValueError: if a size is not a positive integer.

    Example:
        >>> EpisodeSpec(n_way=5, k_shot=1, n_query=15)
        EpisodeSpec(n_way=5, k_shot=1, n_query=15)

    Reference:
        Vinyals et al. (2016), Matching Networks for One Shot Learning, section 4.1.
    """

    n_way: int = 5
    k_shot: int = 1
    n_query: int = 15

    def __post_init__(self) -> None:
        for name in ("n_way", "k_shot", "n_query"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")


@dataclass(frozen=True, eq=False)
class ClassImages:
    """Images by class: `images[c, d]` is drawing `d` of class `c`, pixels 0 (paper) to 255 (ink).

    With `rotations`, every class counts four times: as drawn, and turned by 90, 180 and 270 degrees.
    The turned classes are virtual: class `4 * c + r` is class `c` turned `r` times; no pixel is copied.

    Args:
        images: `[class, drawing, channel, height, width]`, uint8.
        names: one name a class, such as `"Greek/character03"`.
        rotations: whether the three turned copies of each class count as classes.

    Raises:
        ValueError: if names and images differ in number, or rotations are asked of images that are not square.

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

    def __post_init__(self) -> None:
        if len(self.names) != len(self.images):
            raise ValueError(f"{len(self.images)} classes of images but {len(self.names)} names; give one name a class")
        if self.rotations and self.images.shape[-1] != self.images.shape[-2]:
            height, width = self.images.shape[-2:]
            raise ValueError(f"rotations need square images, got {height}×{width}; resize them or drop rotations")

    def __len__(self) -> int:
        return len(self.images) * (4 if self.rotations else 1)

    def name(self, index: int) -> str:
        """The name of class `index`, with its rotation if it is turned."""
        if not self.rotations:
            return self.names[index]
        turned = f" (turned {90 * (index % 4)}°)" if index % 4 else ""
        return self.names[index // 4] + turned

    def with_rotations(self) -> ClassImages:
        """The same drawings with every class counted four times, once for each quarter turn."""
        return replace(self, rotations=True)

    def sampler(self, spec: EpisodeSpec, *, seed: int = 0) -> EpisodeSampler:
        """What draws tasks of these classes."""
        return EpisodeSampler(self, spec, seed=seed)

    def to(self, device: torch.device | str) -> ClassImages:
        """The same classes with their pixels on `device`."""
        return replace(self, images=self.images.to(device))

    def take(
        self, classes: Int64[Tensor, "*batch"], drawings: Int64[Tensor, "*batch n"]
    ) -> UInt8[Tensor, "*batch n channel height width"]:
        """The named drawings of the named classes, turned where the class is a turned one."""
        n_drawings, size, device = self.images.shape[1], self.images.shape[2:], self.images.device
        drawn, turns = (classes // 4, classes.flatten() % 4) if self.rotations else (classes, None)
        rows = (drawn.unsqueeze(-1) * n_drawings + drawings).view(classes.numel(), -1)
        every_drawing = self.images.flatten(0, 1)
        if turns is None:
            return every_drawing.index_select(0, rows.flatten().to(device)).view(*drawings.shape, *size)
        order = turns.argsort()  # equal turns side by side: turning is then four slices, not four masks
        taken = every_drawing.index_select(0, rows[order].flatten().to(device)).view(*rows.shape, *size)
        parts = taken.split(turns.bincount(minlength=4).tolist())
        turned = torch.cat([part.rot90(quarter, (-2, -1)) for quarter, part in enumerate(parts)])
        return turned.index_select(0, order.argsort().to(device)).view(*drawings.shape, *size)


@dataclass(frozen=True, eq=False)
class Episode:
    """A batch of tasks: what a learner may learn from (support) and what it must answer (query).

    Labels run from 0 to `n_way - 1` and mean nothing outside their task. In a regression task `images` are vectors,
    `labels` the real-valued targets, `[task, support, output]`, and `n_way` says how many numbers a target has.

    Args:
        support_images: pixels from 0 (paper) to 1 (ink).
        support_labels: one label a support image.
        query_images: pixels from 0 (paper) to 1 (ink).
        query_labels: one label a query image; a learner's `forward` never reads them.
        n_way: classes in each task.

    Example:
        >>> images, labels = torch.zeros(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> episode = Episode(images, labels, images, labels, n_way=5)
        >>> len(episode), len(episode.task(0))
        (2, 1)

    Reference:
        Vinyals et al. (2016), section 4.1.
    """

    support_images: Float[Tensor, "task support *image"]
    support_labels: Int64[Tensor, "task support"] | Float[Tensor, "task support way"]
    query_images: Float[Tensor, "task query *image"]
    query_labels: Int64[Tensor, "task query"] | Float[Tensor, "task query way"]
    n_way: int

    def __len__(self) -> int:
        return len(self.support_images)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Episode:
        return Episode(
            change(self.support_images),
            change(self.support_labels),
            change(self.query_images),
            change(self.query_labels),
            self.n_way,
        )

    def to(self, device: torch.device | str) -> Episode:
        """The same tasks on `device`."""
        return self._map(lambda tensor: tensor.to(device))

    def tasks(self, which: slice) -> Episode:
        """The tasks of a slice, still as a batch."""
        return self._map(lambda tensor: tensor[which])

    def task(self, index: int) -> Episode:
        """Task `index` alone, as a batch of one.

        Raises:
            ValueError: if there is no such task.
        """
        if not 0 <= index < len(self):
            raise ValueError(f"no task {index} in an episode of {len(self)} tasks; count from 0")
        return self.tasks(slice(index, index + 1))


class EpisodeSampler:
    """Draws tasks: `n_way` distinct classes each, support and query drawings disjoint.

    Every draw comes from one CPU `torch.Generator`, so the same seed gives the same tasks on every
    platform and device, however many are drawn at once. Which class gets which label is part of the draw. Where
    turned classes count, a task holds no class twice, turned otherwise: a circle and a turned circle are one.

    Args:
        classes: where the images come from.
        spec: the shape of the tasks.
        seed: where the stream of tasks begins.

    Raises:
        ValueError: if there are fewer classes (turned ones not counted) than `n_way`, or fewer drawings of a class
            than `k_shot + n_query`.

    Example:
        >>> classes = ClassImages(torch.zeros(8, 20, 1, 28, 28, dtype=torch.uint8), list("abcdefgh"))
        >>> EpisodeSampler(classes, EpisodeSpec(5, 1, 15), seed=0).sample(4).query_images.shape
        torch.Size([4, 75, 1, 28, 28])

    Reference:
        Vinyals et al. (2016), section 4.1.
    """

    in_random_order = False

    def __init__(self, classes: ClassImages, spec: EpisodeSpec, *, seed: int = 0) -> None:
        drawings = classes.images.shape[1]
        if spec.n_way > len(classes.names):
            raise ValueError(
                f"n_way = {spec.n_way} exceeds the {len(classes.names)} classes of this split; lower n_way"
            )
        if spec.k_shot + spec.n_query > drawings:
            raise ValueError(
                f"k_shot + n_query = {spec.k_shot + spec.n_query} exceeds the {drawings} drawings "
                f"of class '{classes.names[0]}'; lower n_query"
            )
        self.classes, self.spec = classes, spec
        self.generator = torch.Generator().manual_seed(seed)

    def sample(self, n_tasks: int) -> Episode:
        """Draw the next `n_tasks` tasks.

        Raises:
            ValueError: if `n_tasks` is not positive.
        """
        return self.sample_with_classes(n_tasks)[0]

    def sample_with_classes(self, n_tasks: int) -> tuple[Episode, Int64[Tensor, "task way"]]:
        """Draw the next `n_tasks` tasks; also tell which class each label stands for."""
        if n_tasks < 1:
            raise ValueError(f"n_tasks must be positive, got {n_tasks}")
        n_way, k_shot, n_query = self.spec.n_way, self.spec.k_shot, self.spec.n_query
        classes, drawings, order = self._draw(n_tasks)
        pixels = self.classes.take(classes, drawings)  # [task, way, shot, channel, height, width]
        support, query = (part.flatten(1, 2).float().div_(255) for part in pixels.split([k_shot, n_query], dim=2))
        labels = torch.arange(n_way, device=pixels.device)
        support_labels = labels.repeat_interleave(k_shot).repeat(n_tasks, 1)
        if order is not None:
            tasks, order = torch.arange(n_tasks, device=pixels.device)[:, None], order.to(pixels.device)
            support, support_labels = support[tasks, order], support_labels[tasks, order]
        query_labels = labels.repeat_interleave(n_query).repeat(n_tasks, 1)
        return Episode(support, support_labels, query, query_labels, n_way), classes

    def _draw(
        self, n_tasks: int
    ) -> tuple[Int64[Tensor, "task way"], Int64[Tensor, "task way shot"], Int64[Tensor, "task support"] | None]:
        """Distinct classes of each task, distinct drawings of each class, in random order; the order of the support."""
        n_drawn, n_drawings = self.classes.images.shape[:2]
        n_way, n_shots = self.spec.n_way, self.spec.k_shot + self.spec.n_query
        n_order = n_way * self.spec.k_shot if self.in_random_order else 0
        # one row of random keys a task, so that a task does not depend on how many are drawn at once
        sizes = [n_drawn, n_way, n_way * n_drawings, n_order]
        keys = torch.rand(n_tasks, sum(sizes), dtype=torch.float64, generator=self.generator).split(sizes, dim=1)
        classes = keys[0].topk(n_way).indices
        if self.classes.rotations:
            classes = classes * 4 + (keys[1] * 4).long()
        drawings = keys[2].unflatten(1, (n_way, n_drawings)).topk(n_shots).indices
        return classes, drawings, keys[3].argsort() if n_order else None


class StreamSampler(EpisodeSampler):
    """Draws the same tasks with their support images in random order, for methods that read them one after another.

    A stream that comes sorted by class gives its labels away: after one image of class 0 the next is of class 0 too.

    Args:
        classes: where the images come from.
        spec: the shape of the tasks; the stream has `n_way * k_shot` images.
        seed: where the stream of tasks begins.

    Raises:
        ValueError: as `EpisodeSampler`.

    Example:
        >>> classes = ClassImages(torch.zeros(8, 20, 1, 28, 28, dtype=torch.uint8), list("abcdefgh"))
        >>> StreamSampler(classes, EpisodeSpec(5, 10, 1), seed=0).sample(16).support_images.shape
        torch.Size([16, 50, 1, 28, 28])

    Reference:
        Santoro et al. (2016), section 2.2.
    """

    in_random_order = True
