"""What all tests share: one thread, reproducible hypotheses, small classes of images and small tasks in float64.

Shapes and dtypes are checked at run time by jaxtyping's pytest plugin (`--jaxtyping-packages` in `pyproject.toml`);
`test_house.py` asserts that it is at work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jaxtyping
import pytest
import torch
from hypothesis import settings

from metatutor.episodes import ClassImages, Episode

torch.set_num_threads(1)  # the tensors here are too small to share; and sums come out the same on every machine
settings.register_profile("metatutor", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("metatutor")


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """The package as its readers run it: ill-typed arguments meet our own errors, not jaxtyping's."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def class_images() -> Callable[..., ClassImages]:
    """Makes classes of random pixels: drawings of a class are its prototype under noise."""

    def make(
        n_classes: int = 8, drawings: int = 6, size: int = 8, *, rotations: bool = False, seed: int = 0
    ) -> ClassImages:
        generator = torch.Generator().manual_seed(seed)
        prototypes = torch.randint(0, 200, (n_classes, 1, 1, size, size), generator=generator)
        noise = torch.randint(0, 56, (n_classes, drawings, 1, size, size), generator=generator)
        return ClassImages((prototypes + noise).to(torch.uint8), [f"class{i}" for i in range(n_classes)], rotations)

    return make


@pytest.fixture
def random_episode() -> Callable[..., Episode]:
    """Makes tasks of random float64 pixels; labels come in random order, not sorted."""

    def make(
        n_tasks: int = 3, n_way: int = 3, k_shot: int = 2, n_query: int = 2, size: int = 8, *, seed: int = 0
    ) -> Episode:
        generator = torch.Generator().manual_seed(seed)

        def images_and_labels(shots: int) -> tuple[torch.Tensor, torch.Tensor]:
            images = torch.rand(n_tasks, n_way * shots, 1, size, size, dtype=torch.float64, generator=generator)
            labels = torch.arange(n_way).repeat_interleave(shots)
            orders = [torch.randperm(n_way * shots, generator=generator) for _ in range(n_tasks)]
            return images, torch.stack([labels[order] for order in orders])

        return Episode(*images_and_labels(k_shot), *images_and_labels(n_query), n_way)

    return make
