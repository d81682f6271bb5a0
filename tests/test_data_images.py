"""A reader's own pictures become classes: folders, datasets and arrays, classes of unlike numbers of images."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metatutor import EpisodeSpec, NearestPixels, evaluate
from metatutor.data.images import from_arrays, from_dataset, from_folder

PIXELS = torch.arange(5 * 8 * 8).view(5, 8, 8) % 256 / 255


def test_arrays_are_grouped_by_label():
    classes = from_arrays(PIXELS, ["b", "a", "b", "b", "a"])
    assert (classes.names, classes.images.shape) == (("b", "a"), (2, 3, 1, 8, 8))
    assert classes.counts is not None and classes.counts.tolist() == [3, 2]
    expected = (255 * PIXELS).round().byte()
    assert torch.equal(classes.images[0, :, 0], expected[[0, 2, 3]])
    assert torch.equal(classes.images[1, :2, 0], expected[[1, 4]])
    assert evaluate(NearestPixels(), classes, EpisodeSpec(2, 1, 1), n_episodes=5).n_episodes == 5
    with pytest.raises(ValueError, match="^5 images but 3 labels; give one label per image$"):
        from_arrays(PIXELS, "abc")


def test_datasets_of_pictures_tensors_and_arrays():
    grey = np.linspace(0, 255, 100, dtype=np.uint8).reshape(10, 10)
    colour = np.stack([grey, grey.T, 255 - grey], axis=-1)
    pairs = [(Image.fromarray(colour), 1), (torch.from_numpy(grey / 255.0)[None], 1), (grey, 2)]
    for channels in (1, 3):
        classes = from_dataset(pairs, image_size=6, channels=channels)
        assert classes.images.shape == (2, 2, channels, 6, 6)
        assert classes.names == ("1", "2")
    assert (from_dataset(pairs, image_size=10).images[1, 0, 0] == torch.from_numpy(grey)).all()
    with pytest.raises(ValueError, match="^the dataset is empty$"):
        from_dataset([])
    with pytest.raises(ValueError, match="^channels must be 1 for grey levels or 3 for colours, got 4$"):
        from_dataset(pairs, channels=4)
    with pytest.raises(ValueError, match="^images have 1 to 4 channels, .*, got 5$"):
        from_dataset([(torch.zeros(5, 6, 6), "a")])


def test_labels_that_come_as_tensors_of_one_number():
    labels = torch.tensor([7, 3, 7, 7, 3])
    for given in (labels, list(labels), list(labels.numpy()), labels[:, None], list(labels[:, None])):
        assert from_arrays(PIXELS, given).names == ("7", "3")
    dataset = torch.utils.data.TensorDataset(PIXELS[:, None], labels)
    assert from_dataset(dataset, image_size=8).names == ("7", "3")
    with pytest.raises(ValueError, match=r"for one-hot labels give labels.argmax\(1\)$"):
        from_arrays(PIXELS, torch.eye(5))


def test_a_picture_is_the_same_from_a_dataset_as_from_a_folder(tmp_path: Path):
    """Of sixteen bits, of real numbers, transparent: nothing is cut off, and what is transparent is white."""
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    transparent = np.zeros((8, 8, 4), np.uint8)
    transparent[:4] = (255, 0, 0, 255)
    pictures = {
        "sixteen bits": Image.fromarray((60000 * ramp).astype(np.uint16)),
        "real": Image.fromarray(ramp.astype(np.float32)),
        "transparent": Image.fromarray(transparent),
    }
    for name, picture in pictures.items():
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "0.tiff")
    for channels in (1, 3):
        expected = from_folder(tmp_path, image_size=8, channels=channels)
        pairs = [(pictures[name], name) for name in expected.names]
        assert torch.equal(from_dataset(pairs, image_size=8, channels=channels).images, expected.images)
    assert expected.images[expected.names.index("transparent"), 0, :, ::7, 0].T.tolist() == [[255, 0, 0], [255] * 3]
    tensors = from_dataset([(torch.from_numpy(transparent).movedim(-1, 0), "a")], image_size=8, channels=3)
    assert tensors.images[0, 0, :, ::7, 0].T.tolist() == [[255, 0, 0], [255] * 3]


def test_a_folder_for_each_class(tmp_path: Path):
    for name, n in (("cups", 2), ("bars", 3)):
        (tmp_path / name).mkdir()
        for i in range(n):
            Image.new("RGB", (20 + i, 30), (10 * i, 0, 200)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "cups" / ".hidden").write_text("not a picture")
    classes = from_folder(tmp_path, image_size=12, channels=3)
    assert classes.names == ("bars", "cups")
    assert classes.counts is not None and classes.counts.tolist() == [3, 2]
    assert classes.images[0, 2, :, 0, 0].tolist() == [20, 0, 200]
    turned = from_folder(tmp_path, image_size=12, channels=3, invert=True)
    assert torch.equal(turned.images[1, :2], 255 - classes.images[1, :2])
    path = tmp_path / "cups" / "notes.txt"
    path.write_text("not a picture")
    with pytest.raises(ValueError, match=f"^cannot read {re.escape(str(path))} as an image"):
        from_folder(tmp_path)
    with pytest.raises(ValueError, match="holds no images; put those of each class into a folder of its own there$"):
        from_folder(tmp_path / "cups")
    path.unlink()
    (tmp_path / "jugs").mkdir()
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / 'jugs'))} holds no images; put some there, or"):
        from_folder(tmp_path)
