"""Tasks: exactly n-way, disjoint, rightly labelled, reproducible; rotations are classes without pixels of their own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from metatutor.episodes import ClassificationSampler, ClassImages, Episode, EpisodeSampler, EpisodeSpec

FIELDS = ("support_images", "support_labels", "query_images", "query_labels")


def numbered(n_classes: int, drawings: int, *, rotations: bool = False) -> ClassImages:
    """Images that say what they are: the corners are 0, class, drawing, 255 (clockwise from the upper left)."""
    images = torch.zeros(n_classes, drawings, 1, 3, 3, dtype=torch.uint8)
    images[..., 0, 2] = torch.arange(n_classes, dtype=torch.uint8)[:, None, None]
    images[..., 2, 2] = torch.arange(drawings, dtype=torch.uint8)[None, :, None]
    images[..., 2, 0] = 255
    return ClassImages(images, [f"class{i}" for i in range(n_classes)], rotations)


def read(image: Tensor, rotations: bool) -> tuple[int, int]:
    """Class and drawing of one `numbered` image, `[1, 3, 3]`."""
    pixels = (image[0] * 255).round().int()
    for turns in range(4):
        upright = pixels.rot90(-turns)
        if upright[2, 0] == 255 and upright[0, 0] == 0:
            drawn = int(upright[0, 2])
            return (4 * drawn + turns if rotations else drawn), int(upright[2, 2])
    raise AssertionError(f"not a numbered image: {pixels}")


@dataclass(frozen=True)
class Request:
    """A possible request for tasks."""

    n_classes: int
    rotations: bool
    n_way: int
    k_shot: int
    n_query: int
    spare_drawings: int
    seed: int

    def sampler(self) -> EpisodeSampler:
        drawings = self.k_shot + self.n_query + self.spare_drawings
        classes = numbered(self.n_classes, drawings, rotations=self.rotations)
        return EpisodeSampler(classes, EpisodeSpec(self.n_way, self.k_shot, self.n_query), seed=self.seed)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    n_classes, rotations = draw(st.integers(1, 12)), draw(st.booleans())
    n_way = draw(st.integers(1, n_classes))
    k_shot, n_query, spare = (draw(st.integers(least, most)) for least, most in ((1, 4), (1, 5), (0, 6)))
    return Request(n_classes, rotations, n_way, k_shot, n_query, spare, seed=draw(st.integers(0, 2**63 - 1)))


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def same(one: Episode, other: Episode) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


def joined(episodes: list[Episode]) -> Episode:
    fields = (torch.cat([getattr(episode, name) for episode in episodes]) for name in FIELDS)
    return Episode(*fields, n_way=episodes[0].n_way)


# --- what a task is --------------------------------------------------------------------------------------------


@given(requests(), st.integers(1, 5))
def test_a_task_is_exactly_n_way_k_shot_with_disjoint_drawings_and_right_labels(ask: Request, n_tasks: int):
    sampler = ask.sampler()
    spec = sampler.spec
    episode, classes = sampler.sample_with_classes(n_tasks)
    assert len(episode) == n_tasks
    assert episode.n_way == spec.n_way
    for task in range(n_tasks):
        named = classes[task].tolist()
        turns = 4 if sampler.classes.rotations else 1
        assert len({c // turns for c in named}) == spec.n_way  # nor one class turned two ways
        drawings = {label: [] for label in range(spec.n_way)}
        for images, labels, shots in (
            (episode.support_images, episode.support_labels, spec.k_shot),
            (episode.query_images, episode.query_labels, spec.n_query),
        ):
            assert Counter(labels[task].tolist()) == dict.fromkeys(range(spec.n_way), shots)
            for image, label in zip(images[task], labels[task].tolist(), strict=True):
                of_class, drawing = read(image, sampler.classes.rotations)
                assert of_class == named[label]
                drawings[label].append(drawing)
        assert all(len(set(used)) == spec.k_shot + spec.n_query for used in drawings.values())


def test_pixels_are_between_0_and_1():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1, 1)
    episode = EpisodeSampler(ClassImages(images, ["one"]), EpisodeSpec(1, 1, 2)).sample(1)
    pixels = torch.cat([episode.support_images, episode.query_images], dim=1).flatten()
    assert pixels.dtype == torch.float32
    assert torch.allclose(pixels.sort().values, torch.tensor([0.0, 0.2, 1.0]))


@pytest.mark.parametrize("rotations", [False, True])
def test_every_class_and_every_drawing_is_drawn_equally_often(rotations: bool):
    n_classes, n_tasks = 28 if rotations else 7, 3000
    sampler = EpisodeSampler(numbered(7, 5, rotations=rotations), EpisodeSpec(3, 1, 1), seed=1)
    episode, classes = sampler.sample_with_classes(n_tasks)

    def as_expected(counts: Tensor, chance: float) -> bool:
        return bool(((counts - n_tasks * chance).abs() < 5 * (n_tasks * chance * (1 - chance)) ** 0.5).all())

    assert as_expected(classes.flatten().bincount(minlength=n_classes), 3 / n_classes)
    for images in (episode.support_images, episode.query_images):
        drawings = torch.tensor([read(image, rotations)[1] for image in images[:, 0]])
        assert as_expected(drawings.bincount(minlength=5), 1 / 5)


def test_which_class_gets_which_label_is_random():
    _, classes = EpisodeSampler(numbered(9, 2), EpisodeSpec(3, 1, 1), seed=0).sample_with_classes(3000)
    orders = Counter(tuple(order) for order in classes.argsort(dim=1).tolist())
    assert orders.keys() == set(permutations(range(3)))
    assert all(abs(count - 500) < 5 * (3000 * 1 / 6 * 5 / 6) ** 0.5 for count in orders.values())


def test_classes_are_drawn_independently_of_each_other():
    """Every pair of classes meets in a task equally often."""
    _, classes = EpisodeSampler(numbered(6, 2), EpisodeSpec(2, 1, 1), seed=0).sample_with_classes(3000)
    pairs = Counter(tuple(sorted(pair)) for pair in classes.tolist())
    assert len(pairs) == 15
    assert all(abs(count - 200) < 5 * (3000 * 1 / 15 * 14 / 15) ** 0.5 for count in pairs.values())


# --- seeds -----------------------------------------------------------------------------------------------------


def test_same_seed_same_episodes_whatever_the_global_generator():
    def draw(seed: int) -> list[Episode]:
        sampler = EpisodeSampler(numbered(9, 8, rotations=True), EpisodeSpec(5, 2, 3), seed=seed)
        return [sampler.sample(2), sampler.sample(2)]

    torch.manual_seed(1)
    first = draw(7)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again = draw(7)
    assert same(first[0], again[0])
    assert same(first[1], again[1])
    assert not same(first[0], first[1])
    assert not same(first[0], draw(8)[0])
    torch.manual_seed(1)
    draw(7)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator was not touched


@given(requests(), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_a_stream_of_tasks_is_the_same_however_many_are_drawn_at_once(ask: Request, sizes: list[int]):
    in_pieces = ask.sampler()
    pieces = joined([in_pieces.sample(size) for size in sizes])
    assert same(ask.sampler().sample(sum(sizes)), pieces)


def test_seed_0_stays_what_recorded_runs_were_made_with():
    """Also on every platform: the numbers below are not computed by the test."""
    sampler = EpisodeSampler(numbered(50, 20, rotations=True), EpisodeSpec(5, 1, 2), seed=0)
    episode, classes = sampler.sample_with_classes(2)
    assert classes.tolist() == [[195, 1, 12, 143, 199], [46, 125, 72, 171, 13]]

    def drawings(images: Tensor) -> list[list[int]]:
        return [[read(image, True)[1] for image in of_task] for of_task in images]

    by_class = episode.support_images[torch.arange(2)[:, None], episode.support_labels.argsort(1)]
    assert drawings(by_class) == [[8, 17, 6, 10, 16], [9, 16, 15, 6, 0]]
    assert episode.support_labels.tolist() == [[2, 4, 1, 3, 0], [1, 4, 2, 3, 0]]
    assert drawings(episode.query_images) == [
        [12, 14, 16, 19, 12, 10, 8, 18, 17, 6],
        [2, 16, 4, 1, 14, 16, 0, 16, 3, 9],
    ]
    assert torch.rand((), generator=sampler.generator, dtype=torch.float64).item() == 0.1493736765775825


# --- support images in random order ----------------------------------------------------------------------------


def test_the_support_images_of_a_stream_come_in_every_order_equally_often():
    """Two classes, two images each: 24 orders of the images, whatever their classes."""
    sampler = EpisodeSampler(numbered(5, 3), EpisodeSpec(2, 2, 1), seed=0)
    episode, classes = sampler.sample_with_classes(3000)
    assert Counter(tuple(labels) for labels in episode.support_labels.tolist()).keys() == {
        (0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 0), (1, 0, 0, 1), (1, 0, 1, 0), (1, 1, 0, 0)
    }  # fmt: skip
    orders = Counter()
    images = (episode.support_images[:, :, 0] * 255).round().int()
    drawn = 3 * images[..., 0, 2] + images[..., 2, 2]  # [task, support]: class and drawing in one number
    orders.update(tuple(order) for order in drawn.argsort(1).tolist())
    assert len(orders) == 24
    assert all(abs(count - 125) < 5 * (3000 * 1 / 24 * 23 / 24) ** 0.5 for count in orders.values())
    assert not torch.equal(classes.sort(1).values, classes)  # and classes are not numbered in their order


def test_the_order_of_a_stream_says_nothing_of_its_classes():
    """The first image is of every class equally often, and of every label."""
    episode, classes = EpisodeSampler(numbered(6, 2), EpisodeSpec(3, 1, 1), seed=2).sample_with_classes(3000)
    first = episode.support_labels[:, 0]
    for counts, n in ((first.bincount(), 3), (classes[torch.arange(3000), first].bincount(), 6)):
        assert len(counts) == n
        assert ((counts - 3000 / n).abs() < 5 * (3000 / n * (1 - 1 / n)) ** 0.5).all()


def test_the_order_has_a_generator_of_its_own():
    """So that tasks are what they were when recorded runs were made, and one image a class is no special case."""
    sampler = EpisodeSampler(numbered(9, 8), EpisodeSpec(5, 2, 3), seed=3)
    before = sampler.generator.get_state()
    assert torch.equal(sampler.order.get_state(), before)
    sampler.sample(3)
    drawn = torch.Generator().manual_seed(3)
    torch.rand(3, 9 + 5 + 5 * 8, dtype=torch.float64, generator=drawn)
    assert torch.equal(sampler.generator.get_state(), drawn.get_state())


@pytest.mark.parametrize("draw", ["sampler", "mini_batches"])
def test_a_sampler_goes_on_where_its_state_was_taken(draw: str):
    def sampler(seed: int) -> EpisodeSampler | ClassificationSampler:
        return getattr(numbered(9, 8), draw)(EpisodeSpec(5, 2, 3), seed=seed)

    one, other = sampler(0), sampler(1)
    one.sample(2)
    other.load_state_dict(one.state_dict())
    assert same(one.sample(3), other.sample(3))


# --- classes of unlike numbers of images -------------------------------------------------------------------------


def test_images_beyond_a_classs_own_are_never_drawn():
    counts = torch.tensor([3, 5, 4, 8])
    classes = ClassImages(numbered(4, 8).images, list("abcd"), counts=counts)
    episode = EpisodeSampler(classes, EpisodeSpec(3, 1, 2)).sample(500)
    images = torch.cat([episode.support_images, episode.query_images], dim=1)
    drawn = Counter(read(image, False) for image in images.flatten(0, 1))
    assert drawn.keys() == {(c, d) for c in range(4) for d in range(int(counts[c]))}
    batch = classes.mini_batches(EpisodeSpec(3, 1, 2)).sample(300).query_images
    assert {read(image, False) for image in batch.flatten(0, 1)} == drawn.keys()
    with pytest.raises(
        ValueError, match=exactly("k_shot + n_query = 4 exceeds the 3 drawings of class 'a'; lower n_query")
    ):
        EpisodeSampler(classes, EpisodeSpec(3, 1, 3))


@pytest.mark.usefixtures("unchecked_types")
def test_as_many_counts_as_classes():
    with pytest.raises(ValueError, match=exactly("4 classes but 2 counts; give one per class")):
        ClassImages(numbered(4, 8).images, list("abcd"), counts=torch.tensor([3, 5]))


# --- rotations -------------------------------------------------------------------------------------------------


def test_a_turned_class_is_torch_rot90_of_the_drawn_one(class_images: Callable[..., ClassImages]):
    classes = class_images(n_classes=5, drawings=4, size=6, rotations=True)
    assert len(classes) == 20
    chosen, drawings = torch.arange(20).view(4, 5), torch.randint(0, 4, (4, 5, 3))
    taken = classes.take(chosen, drawings)
    for i in range(4):
        for j in range(5):
            for k in range(3):
                drawn, turns = divmod(int(chosen[i, j]), 4)
                expected = torch.rot90(classes.images[drawn, drawings[i, j, k]], turns, (-2, -1))
                assert torch.equal(taken[i, j, k], expected)


def test_rotations_are_virtual(class_images: Callable[..., ClassImages]):
    drawn = class_images(n_classes=3, drawings=2)
    turned = drawn.with_rotations()
    assert (len(drawn), len(turned)) == (3, 12)
    assert turned.images.data_ptr() == drawn.images.data_ptr()
    before = drawn.images.clone()
    turned.take(torch.arange(12), torch.zeros(12, 1, dtype=torch.int64))
    assert torch.equal(drawn.images, before)
    assert [turned.name(i) for i in (3, 4, 5)] == ["class0 (turned 270°)", "class1", "class1 (turned 90°)"]
    assert [drawn.name(i) for i in (0, 2)] == ["class0", "class2"]


def test_a_task_holds_no_class_twice_turned_otherwise():
    """A circle and a turned circle could not be told apart; MAML's code draws distinct characters too."""
    _, classes = EpisodeSampler(numbered(3, 2, rotations=True), EpisodeSpec(3, 1, 1)).sample_with_classes(200)
    assert all(sorted(c // 4 for c in named) == [0, 1, 2] for named in classes.tolist())
    assert {c % 4 for named in classes.tolist() for c in named} == {0, 1, 2, 3}


# --- episodes as batches ---------------------------------------------------------------------------------------


def test_slices_of_tasks(random_episode: Callable[..., Episode]):
    episode = random_episode(n_tasks=5)
    assert len(episode) == 5
    assert same(joined([episode.task(i) for i in range(5)]), episode)
    part = episode.tasks(slice(1, 3))
    assert len(part) == 2
    assert part.n_way == episode.n_way
    assert same(part, joined([episode.task(1), episode.task(2)]))


def test_to_moves_every_tensor(random_episode: Callable[..., Episode], class_images: Callable[..., ClassImages]):
    moved = random_episode().to("meta")
    assert {getattr(moved, name).device.type for name in FIELDS} == {"meta"}
    classes = class_images(rotations=True)
    assert classes.to("meta").images.device.type == "meta"
    assert len(classes.to("meta")) == len(classes)


# --- errors ----------------------------------------------------------------------------------------------------


def test_sizes_of_a_spec():
    assert EpisodeSpec() == EpisodeSpec(n_way=5, k_shot=1, n_query=15)
    for name in ("n_way", "k_shot", "n_query"):
        for size in (0, -1):
            with pytest.raises(ValueError, match=exactly(f"{name} must be a positive integer, got {size}")):
                EpisodeSpec(**{name: size})


def test_any_integer_is_a_size_and_nothing_else(unchecked_types: None):
    import numpy as np

    three: Any = np.int64(3)
    assert EpisodeSpec(three, np.int32(2), 4) == EpisodeSpec(3, 2, 4)  # pyright: ignore[reportArgumentType]
    assert type(EpisodeSpec(three).n_way) is int
    for size in (True, 2.0, "3"):
        with pytest.raises(ValueError, match=exactly(f"n_way must be a positive integer, got {size!r}")):
            EpisodeSpec(n_way=size)  # pyright: ignore[reportArgumentType]


IMAGES, LABELS = torch.rand(2, 3, 1, 4, 4), torch.tensor([[0, 1, 2], [2, 0, 1]])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"support_labels": LABELS + 1}, "support_labels run from 1 to 3, but labels of 3 classes run from 0 to 2"),
        ({"support_labels": LABELS.clamp(min=1)}, "class 0 of n_way = 3 has no support image in some task"),
        ({"query_labels": LABELS - 1}, "query_labels run from -1 to 1, but labels of 3 classes"),
        ({"support_labels": LABELS.float()}, r"targets of a regression must be [task, point, 3], got [2, 3]"),
        ({"support_labels": LABELS[:, :2]}, "support_labels must be [task, image], here [2, 3], got [2, 2]"),
        ({"support_labels": LABELS[0]}, "a batch of one task has a task axis too, as in labels[None]"),
        ({"support_images": IMAGES[0, 0, 0]}, "one task needs images[None]"),
        ({"support_images": (255 * IMAGES).byte()}, "must be floats, 0 (paper) to 1 (ink), got torch.uint8"),
        ({"query_images": IMAGES[:1], "query_labels": None}, "2 tasks of support images but 1 of query images"),
    ],
)
def test_an_episode_says_what_is_wrong(unchecked_types: None, changed: dict[str, Tensor], message: str):
    fields = {"support_images": IMAGES, "support_labels": LABELS, "query_images": IMAGES, "query_labels": LABELS}
    with pytest.raises(ValueError, match=re.escape(message)):
        Episode(**(fields | changed), n_way=3)


def test_an_episode_needs_no_query_labels_and_counts_its_ways():
    episode = Episode(IMAGES, LABELS.int(), IMAGES)  # pyright: ignore[reportArgumentType]
    assert (episode.n_way, episode.query_labels, episode.support_labels.dtype) == (3, None, torch.int64)
    assert episode.task(1).query_labels is None
    points = torch.rand(2, 3, 4)
    assert Episode(points, points[..., :2], points, points[..., :2]).n_way == 2


def test_another_dtype_is_for_pixels_and_targets_not_for_labels():
    episode = Episode(IMAGES, LABELS, IMAGES, LABELS).to(torch.float64)
    assert {episode.support_images.dtype, episode.query_images.dtype} == {torch.float64}
    assert {episode.support_labels.dtype, episode.query_labels.dtype} == {torch.int64}
    moved = episode.to("cpu", torch.float32)
    assert (moved.query_images.dtype, moved.query_labels.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 2, 1, 4, 4), "images must be uint8, 0 (paper) to 255 (ink), got torch.float32"),
        (
            torch.zeros(3, 2, 8, 8, 3, dtype=torch.uint8),
            "images are channels-last, [3, 2, 8, 8, 3]; give images.movedim",
        ),
        (
            torch.zeros(3, 8, 8, dtype=torch.uint8),
            "images must be [class, drawing, channel, height, width], got [3, 8, 8]",
        ),
    ],
)
def test_images_of_classes_are_bytes_channels_first(unchecked_types: None, images: Tensor, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        ClassImages(images, list("abc"))


def test_impossible_requests_say_what_to_do(class_images: Callable[..., ClassImages]):
    classes = class_images(n_classes=3, drawings=4)
    for spec, message in (
        (EpisodeSpec(4, 1, 1), "n_way = 4 exceeds the 3 classes of this split; lower n_way"),
        (EpisodeSpec(2, 2, 3), "k_shot + n_query = 5 exceeds the 4 drawings of class 'class0'; lower n_query"),
        (EpisodeSpec(2, 4, 1), "k_shot + n_query = 5 exceeds the 4 drawings of class 'class0'; lower k_shot"),
    ):
        with pytest.raises(ValueError, match=exactly(message)):
            EpisodeSampler(classes, spec)
    EpisodeSampler(classes.with_rotations(), EpisodeSpec(3, 2, 2)).sample(1)  # just possible
    with pytest.raises(ValueError, match=exactly("n_way = 4 exceeds the 3 classes of this split; lower n_way")):
        EpisodeSampler(classes.with_rotations(), EpisodeSpec(4, 1, 1))
    for n_tasks in (0, -1):
        with pytest.raises(ValueError, match=exactly(f"n_tasks must be positive, got {n_tasks}")):
            EpisodeSampler(classes, EpisodeSpec(2, 1, 1)).sample(n_tasks)
    with pytest.raises(ValueError, match=exactly("3 classes of images but 2 names; give one name per class")):
        ClassImages(classes.images, ["a", "b"])
    with pytest.raises(
        ValueError, match=exactly("rotations need square images, got 8×7; resize them or drop rotations")
    ):
        ClassImages(classes.images[..., :7], classes.names, rotations=True)


def test_no_such_task(random_episode: Callable[..., Episode]):
    episode = random_episode(n_tasks=2)
    for index in (-1, 2):
        with pytest.raises(ValueError, match=exactly(f"no task {index} in an episode of 2 tasks; count from 0")):
            episode.task(index)


# --- classes that belong together ---


def grouped(sizes: dict[str, int], **more: Any) -> ClassImages:
    """Classes named `group/number`, whose every pixel is the class's number."""
    names = [f"{group}/{i}" for group, size in sizes.items() for i in range(size)]
    images = torch.arange(len(names), dtype=torch.uint8)[:, None, None, None, None].expand(-1, 4, 1, 2, 2)
    return ClassImages(images, names, **more)


@pytest.mark.parametrize("rotations", [False, True])
def test_a_share_of_the_tasks_has_classes_that_belong_together(rotations: bool):
    classes = grouped({"a": 6, "b": 9, "small": 3}, rotations=rotations, together=0.5)
    sampler = EpisodeSampler(classes, EpisodeSpec(5, 1, 1), seed=0)
    _, drawn = sampler.sample_with_classes(600)
    characters, turns = (drawn // 4, drawn % 4) if rotations else (drawn, torch.zeros_like(drawn))
    assert all(len(set(task)) == 5 for task in characters.tolist())
    groups = [{str(classes.names[i]).partition("/")[0] for i in task} for task in characters.tolist()]
    together = torch.tensor([len(g) == 1 for g in groups])
    by_chance = 0.03  # six or nine of eighteen, five times
    assert 0.44 < together.double().mean() < 0.56 + by_chance
    assert {g for group in groups if len(group) == 1 for g in group} == {"a", "b"}
    if rotations:
        assert (turns[together] == turns[together][:, :1]).all(1).double().mean() > 0.9
        assert len(set(turns[together][:, 0].tolist())) == 4


def test_together_changes_nothing_where_it_is_zero_and_resumes_where_it_is_not():
    spec = EpisodeSpec(4, 1, 1)
    plain, never = (EpisodeSampler(grouped({"a": 6, "b": 6}, **of), spec, seed=3) for of in ({}, {"together": 0.0}))
    assert torch.equal(plain.sample_with_classes(20)[1], never.sample_with_classes(20)[1])
    one, other = (EpisodeSampler(grouped({"a": 6, "b": 6}, together=0.5), spec, seed=3) for _ in range(2))
    one.sample(7)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.sample_with_classes(20)[1], other.sample_with_classes(20)[1])


def test_too_many_ways_for_what_belongs_together_are_told():
    with pytest.raises(ValueError, match="n_way = 5 exceeds the 4 classes of the largest group"):
        EpisodeSampler(grouped({"a": 4, "b": 3}, together=0.1), EpisodeSpec(5, 1, 1))
    for share in (-0.1, 1.5):
        with pytest.raises(ValueError, match="together is a share of tasks, from 0 to 1"):
            grouped({"a": 4}, together=share)
