"""Studies: what they write, the pictures they read, the tasks they make."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path

import common
import numpy as np
import pytest
import torch
from classes import subset
from moved import tasks_of_alphabets
from PIL import Image
from ways import of_uneven, uneven

from metatutor import ConvNet, EpisodeSpec, NearestPixels, Prototypical, Strokes, runs
from metatutor.comparison import compared


def test_rows_are_written_one_a_line_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "results_folder", lambda: tmp_path)
    monkeypatch.setattr(runs, "results_folder", lambda: tmp_path)
    assert runs.study("some") == []
    rows = [{"learner": "a", "accuracy": 0.5}, {"learner": "b", "accuracy": 0.25}]
    common.write("some", rows)
    assert runs.study("some") == rows
    text = (tmp_path / "studies" / "some.json").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 4 and json.loads(text)["made"]["torch"] == torch.__version__


def test_pictures_of_an_archive_are_classes_with_a_dark_background(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.writestr("LICENSE", "free")
        for name, ink in (("a/1.png", 10), ("a/2.png", 20), ("b/1.png", 30)):
            pixels, file = np.full((40, 40), 250, np.uint8), io.BytesIO()
            pixels[10:30, 10:30] = ink
            Image.fromarray(pixels).save(file, "PNG")
            archive.writestr(name, file.getvalue())
    found = common._of_zip(tmp_path / "some.zip")
    assert found.names == ("a", "b") and found.counts is not None and found.counts.tolist() == [2, 1]
    assert found.images.shape == (2, 2, 1, 28, 28)
    assert found.images[0, 0, 0, 14, 14] == 245 and found.images[0, 0, 0, 1, 1] == 5


def test_characters_of_oracle_bones_are_forty_a_class(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(10, dtype=np.uint8), 45)
    images = np.repeat(labels, 28 * 28)
    for name, head, data in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
        (tmp_path / f"t10k-{name}-ubyte.gz").write_bytes(gzip.compress(bytes(head) + data.tobytes()))
    found = common.oracle(tmp_path)
    assert found.images.shape == (10, 40, 1, 28, 28) and found.images[7].unique().tolist() == [7]


def test_some_of_the_characters_keep_all_their_drawings() -> None:
    train = Strokes.load(n_alphabets=4, characters_per_alphabet=8).split().train
    few, again, others = (subset(train, 10, seed) for seed in (0, 0, 1))
    assert len(few) == 40 and few.images.shape[1] == train.images.shape[1]
    assert list(few.names) == list(again.names) != list(others.names)
    assert set(few.names) <= set(train.names)


def test_tasks_of_alphabets_are_of_one_alphabet_each() -> None:
    classes = Strokes.load(n_alphabets=9, characters_per_alphabet=8).split(rotations=False).train
    episode, alphabets = tasks_of_alphabets(classes)
    assert len(episode) == len(alphabets) and episode.n_way == 5
    first = classes.names[0].partition("/")[0]
    assert first in alphabets
    known = {image.numpy().tobytes() for image in classes.images[:8].flatten(0, 1).float() / 255}
    of_first = [i for i, alphabet in enumerate(alphabets) if alphabet == first]
    assert all(image.numpy().tobytes() in known for i in of_first for image in episode.support_images[i])


def test_classes_keep_so_many_of_their_support_images() -> None:
    classes = Strokes.load(n_alphabets=3, characters_per_alphabet=8).split(rotations=False).train
    episode = classes.sampler(EpisodeSpec(3, 5, 2), seed=0).sample(4)
    few = uneven(episode, [1, 2, 5])
    for labels in few.support_labels:
        assert labels.bincount().tolist() == [1, 2, 5]
    for images, kept in zip(episode.support_images, few.support_images, strict=True):
        known = {image.numpy().tobytes() for image in images}
        assert len({image.numpy().tobytes() for image in kept} & known) == 8
    found = of_uneven(NearestPixels(), few)
    assert 0 <= found["accuracy"] <= 1 and sum(found["answered"]) == pytest.approx(1)
    torch.manual_seed(0)  # some networks answer all tasks equally well
    assert of_uneven(Prototypical(ConvNet(filters=4, normalization="group")).eval(), few)["ci95"] > 0


def test_every_result_below_its_paper_was_asked_why() -> None:
    assert [row["name"] for row in runs.study("gaps")] == [row.name for row in compared() if row.below_paper]
