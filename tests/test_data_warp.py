"""Warped images stay what they were, a little moved; each on its own, and the same for the same random numbers."""

from __future__ import annotations

import torch

from metatutor import ConvNet, Episode, EpisodeSpec, Prototypical, Strokes, TrainConfig, train
from metatutor.data.warp import warp


def episode(n_images: int = 64) -> Episode:
    images, labels = torch.zeros(2, n_images, 1, 28, 28), torch.arange(n_images).repeat(2, 1)
    images[..., 9:19, 12:16] = 1  # an upright bar in the middle
    return Episode(images, labels, images, labels)


def test_every_image_is_moved_on_its_own_and_none_far() -> None:
    torch.manual_seed(0)
    before = episode()
    after = warp(before)
    assert torch.equal(after.support_labels, before.support_labels)
    for images in (after.support_images, after.query_images):
        assert images.shape == before.support_images.shape and images.min() >= 0 and images.max() <= 1
        assert len({image.numpy().tobytes() for image in images.flatten(0, 1)}) == 128
        ink = images.sum((2, 3, 4)) / before.support_images.sum((2, 3, 4))
        assert ink.min() > 0.7 and ink.max() < 1.45  # stretched by 0.85 to 1.15 either way
        across = torch.arange(28.0) - 13.5
        centre = (images.sum((2, 3)) * across).sum(-1) / images.sum((2, 3, 4))
        assert 0.5 < centre.abs().max() < 2.5 and abs(centre.mean()) < 0.3  # pixels
    assert not torch.equal(after.support_images, after.query_images)


def test_the_same_random_numbers_warp_alike() -> None:
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(warp(episode(3)).support_images)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_training_that_warps_goes_on_bit_for_bit(tmp_path) -> None:
    classes, spec = Strokes.load(n_alphabets=3, characters_per_alphabet=8).split().train, EpisodeSpec(3, 1, 2)
    weights = []
    for lengths in ([6], [3, 6]):
        torch.manual_seed(0)
        learner = Prototypical(ConvNet(filters=4, normalization="group"))
        for iterations in lengths:
            config = TrainConfig(
                iterations=iterations, tasks_per_step=2, warmup=0, schedule="constant", checkpoint_every=3
            )
            folder = tmp_path / str(len(lengths))
            train(learner, classes, spec, config, folder=folder, transform=warp, device="cpu", progress_bar=False)
        weights.append(torch.cat([p.detach().flatten() for p in learner.parameters()]))
    assert torch.equal(*weights)


def test_a_task_without_a_support_set_is_warped_too() -> None:
    """Mini-batches of all classes, from which a classifier is pretrained, have none."""
    some = episode(3)
    nothing = Episode(some.support_images[:, :0], some.support_labels[:, :0], some.query_images, some.query_labels, 3)
    after = warp(nothing)
    assert after.support_images.shape == (2, 0, 1, 28, 28) and not after.query_images.equal(some.query_images)
