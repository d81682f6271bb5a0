"""Classification of one's own pictures, from Python and from the command line: answers, doubt, files and mistakes."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from metatutor import ConvNet, NearestPixels, Prototypical
from metatutor.classify import FewShotClassifier, interval, novelty_threshold, support_check
from metatutor.cli import main
from metatutor.pretrained import PictureNetwork
from tests.test_data_pictures import BAD

SHAPES = {"circle 🙂": "ellipse", "<b>box & co": "rectangle", "line": "line"}


def drawing(name: str, i: int) -> Image.Image:
    paper = Image.new("L", (105 + 3 * i, 105), "white")
    at = 12 + 5 * (i % 5)
    pen = {"fill": "black"} if name == "line" else {"outline": "black"}
    getattr(ImageDraw.Draw(paper), SHAPES[name])((at, at, at + 60, at + 55 + i), width=3, **pen)
    return paper


def drawings(n: int, start: int = 0) -> tuple[list[Image.Image], list[str]]:
    pairs = [(drawing(name, i), name) for name in SHAPES for i in range(start, start + n)]
    return [image for image, _ in pairs], [name for _, name in pairs]


@pytest.fixture
def support() -> tuple[list[Image.Image], list[str]]:
    return drawings(4)


@pytest.fixture
def fitted(support: tuple[list[Image.Image], list[str]]) -> FewShotClassifier:
    return FewShotClassifier().fit(*support)


def folder_of(folder: Path, n: int, start: int = 0) -> Path:
    for name in SHAPES:
        (folder / name).mkdir(parents=True)
        for i in range(start, start + n):
            drawing(name, i).save(folder / name / f"{i} ü.png")
    return folder


# --- from Python ---


@pytest.mark.parametrize("head", ["ridge", "prototypes", "gaussians"])
def test_in_the_manner_of_scikit_learn(head, support: tuple[list[Image.Image], list[str]]):
    classifier = FewShotClassifier(head=head).fit(*support)
    images, names = drawings(4, 4)
    assert classifier.classes_.tolist() == sorted(SHAPES) and classifier.backbone_ == "omniglot"
    probabilities = classifier.predict_proba(images)
    assert probabilities.shape == (12, 3) and np.allclose(probabilities.sum(1), 1, atol=1e-5)
    assert classifier.predict(images).tolist() == classifier.classes_[probabilities.argmax(1)].tolist()
    assert classifier.score(images, names) > 0.9
    assert classifier.check_.n == 12 and (classifier.check_.accuracy or 0) > 0.9
    assert classifier.warnings_ == []
    assert classifier.predict([]).tolist() == []


def test_numbers_arrays_and_paths(tmp_path: Path, support: tuple[list[Image.Image], list[str]]):
    images, names = support
    numbers = np.array([sorted(SHAPES).index(name) for name in names])
    arrays = [np.asarray(image.resize((64, 64))) for image in images]
    classifier = FewShotClassifier("omniglot").fit(np.stack(arrays), numbers)
    assert classifier.classes_.tolist() == [0, 1, 2]
    images[0].save(tmp_path / "a.png")
    assert classifier.predict([tmp_path / "a.png", torch.from_numpy(arrays[0] / 255)]).tolist() == [numbers[0]] * 2


def test_names_of_any_kind(tmp_path: Path, support: tuple[list[Image.Image], list[str]]):
    kinds = dict(zip(SHAPES, [1, "1", ("a", 2)], strict=True))
    classifier = FewShotClassifier().fit(support[0], [kinds[name] for name in support[1]])
    assert classifier.predict(support[0][::4]).tolist() == [1, "1", ("a", 2)]
    classifier.save(tmp_path / "kinds.safetensors")
    again = FewShotClassifier.load(tmp_path / "kinds.safetensors")
    assert again.predict(support[0][::4]).tolist() == [1, "1", ("a", 2)]
    assert again.score(support[0][::4], [1, "1", "a"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="^there are not as many names as pictures"):
        again.score(support[0][::4], ["1"])


def test_names_that_come_as_numbers_of_numpy_or_torch(tmp_path: Path, support: tuple[list[Image.Image], list[str]]):
    numbers = np.arange(3).repeat(4)
    for names in (numbers, list(numbers), list(torch.from_numpy(numbers))):
        classifier = FewShotClassifier().fit(support[0], names)
        classifier.save(tmp_path / "numbers.safetensors")
        assert FewShotClassifier.load(tmp_path / "numbers.safetensors").classes_.tolist() == [0, 1, 2]
    classifier = FewShotClassifier().fit(support[0], [date(2026, 1, 1 + number) for number in numbers])
    with pytest.raises(ValueError, match="^only names that are text, numbers or tuples of these can be saved$"):
        classifier.save(tmp_path / "dates.safetensors")


def test_answers_do_not_depend_on_the_other_pictures(fitted: FewShotClassifier):
    images, _ = drawings(3, 4)
    together = fitted.predict_proba(images)
    assert np.allclose(np.concatenate([fitted.predict_proba([image]) for image in images]), together, atol=1e-5)


def test_a_picture_of_another_kind_is_too_far(fitted: FewShotClassifier):
    images, _ = drawings(3, 4)
    assert fitted.novel(images).mean() < 0.4
    generator = np.random.default_rng(0)
    noise = [Image.fromarray(generator.integers(0, 256, (60, 60), dtype=np.uint8)) for _ in range(8)]
    assert fitted.novel(noise).all()


def test_the_threshold_is_two_deviations_below_the_nearest_others():
    support = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    nearest = [max(float(support[i] @ support[j]) for j in range(6) if i != j) for i in range(6)]
    assert novelty_threshold(support) == pytest.approx(np.mean(nearest) - 2 * np.std(nearest, ddof=1), abs=1e-5)
    assert novelty_threshold(support[:2]) == -1


def test_photos_given_to_the_network_for_drawings_are_a_warning():
    photos = [Image.effect_noise((50, 50), 10 * i + 20) for i in range(4)]
    warned = FewShotClassifier("omniglot").fit(photos, ["a", "a", "b", "b"]).warnings_
    assert len(warned) == 1 and "use the backbone photos" in warned[0]


def test_what_the_support_set_says_of_itself():
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    logits = torch.eye(4)[torch.tensor([0, 1, 0, 1, 2, 1, 0])]
    logits[6] = torch.nan
    check = support_check(logits, labels, ["a", "b", "c", "d"])
    assert (check.n, check.accuracy, check.chance, check.confused) == (6, 3 / 6, 0.25, ("a", "b", 2))
    assert (check.low, check.high) == interval(3, 6)
    assert interval(0, 10)[0] == 0 and interval(10, 10) == (pytest.approx(0.7225, abs=1e-3), 1.0)
    assert support_check(logits[6:], labels[6:], ["a", "b", "c", "d"]).accuracy is None


@pytest.mark.parametrize("make", [lambda: Prototypical(ConvNet(filters=8)), NearestPixels])
def test_any_learner_of_any_ways_is_a_head(make: Callable, support: tuple[list[Image.Image], list[str]]):
    learner = make()
    classifier = FewShotClassifier(head=learner).fit(*support)
    images, _ = drawings(2, 4)
    prepared = [torch.stack([classifier.network_.prepared(p) for p in pictures]) for pictures in (support[0], images)]
    assert classifier.predict(images).tolist() == learner.predict(prepared[0], support[1], prepared[1])
    rest = torch.arange(12) != 5
    without = learner.predict(prepared[0][rest], [n for i, n in enumerate(support[1]) if i != 5], prepared[0][5:6])
    again = FewShotClassifier(head=learner).fit(
        [p for i, p in enumerate(support[0]) if i != 5], [n for i, n in enumerate(support[1]) if i != 5]
    )
    assert again.predict(support[0][5:6]).tolist() == without
    assert classifier.check_.n == 12
    with pytest.raises(ValueError, match="^only closed-form heads are saved"):
        classifier.save("x")


def test_save_and_load(tmp_path: Path, fitted: FewShotClassifier):
    fitted.save(tmp_path / "a.safetensors")
    again = FewShotClassifier.load(tmp_path / "a.safetensors")
    images, _ = drawings(3, 4)
    assert np.array_equal(again.predict_proba(images), fitted.predict_proba(images))
    assert np.array_equal(again.novel(images), fitted.novel(images))
    assert again.check_ == fitted.check_ and again.thumbnails_ == fitted.thumbnails_
    other = PictureNetwork("mine", fitted.network_.prepared, lambda images: images.flatten(1))
    with pytest.raises(ValueError, match="was fitted with other weights of omniglot; give them with --weights$"):
        FewShotClassifier.load(tmp_path / "a.safetensors", backbone=other)
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-100])
    Prototypical(ConvNet(filters=8)).save(tmp_path / "c.safetensors")
    for name in ("b.safetensors", "c.safetensors"):
        with pytest.raises(ValueError, match=f"{name} is not a file that classify --save wrote"):
            FewShotClassifier.load(tmp_path / name)


def test_mistakes_from_python(support: tuple[list[Image.Image], list[str]], tmp_path: Path):
    images, names = support
    with pytest.raises(ValueError, match="^there are not as many names as pictures; give one name per picture$"):
        FewShotClassifier().fit(images, names[:-1])
    with pytest.raises(ValueError, match="^all pictures are of one class, a; give pictures of at least two$"):
        FewShotClassifier().fit(images, ["a"] * 12)
    with pytest.raises(ValueError, match="^there are no pictures to learn from$"):
        FewShotClassifier().fit([], [])
    assert not hasattr(FewShotClassifier(), "classes_")
    with pytest.raises(ValueError, match="^the classifier knows no classes yet; call fit first$"):
        FewShotClassifier().predict(images)
    with pytest.raises(ValueError, match="^an image must be"):
        FewShotClassifier().fit([np.zeros((2, 2, 2, 2))] * 2, "ab")
    from metatutor import MAML

    with pytest.raises(ValueError, match="^MAML takes tasks of 5 ways only; give one that takes any$"):
        FewShotClassifier(head=MAML(ConvNet(5)))


# --- from the command line ---


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    main(["classify", *map(str, arguments)])
    return capsys.readouterr().out


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a mistake costs."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["classify", *map(str, arguments)])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("metatutor: ") and error.count("\n") == 1
    return error.removeprefix("metatutor: ").rstrip("\n")


def test_a_folder_of_class_folders_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    support, query = folder_of(tmp_path / "support", 4), folder_of(tmp_path / "query", 3, 4)
    told = run(capsys, support, query).splitlines()
    assert told[0] == "3 classes, 12 pictures: <b>box & co 4, circle 🙂 4, line 4"
    assert told[1] == "backbone omniglot, head auto; chance 33.3%"
    assert re.fullmatch(r"support pictures left out one by one: .* of 12 right", told[2])
    assert any(re.fullmatch(r"accuracy \d+\.\d% \(95% interval .* to .*\) of 9; chance 33.3%", line) for line in told)
    assert told[-4].startswith("it is \\ named") and told[-1].startswith("2 line")
    assert len([line for line in told if "ü.png" in line]) == 9


def test_the_rest_is_classified_whatever_lies_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    support, query = folder_of(tmp_path / "support", 4), tmp_path / "query"
    query.mkdir()
    for name, (data, _) in BAD.items():
        (query / name).write_bytes(data)
        (support / "line" / name).write_bytes(data)
    (query / "loop.jpg").symlink_to("loop.jpg")
    (support / "empty 💥").mkdir()
    (support / "<b>box & co" / "copy.png").write_bytes((support / "line" / "0 ü.png").read_bytes())
    drawing("line", 5).save(query / "good 🙂.png")
    (query / "known.png").write_bytes((support / "line" / "1 ü.png").read_bytes())
    told = run(capsys, support, query).splitlines()
    assert len([line for line in told if line.startswith("left out: ")]) == 2 * len(BAD) + 1
    assert any("bomb.png: more than 100 million pixels; make it smaller" in line for line in told)
    assert "warning: class empty 💥 has no picture that can be read; it is left out" in told
    assert any(line.startswith("warning: the same picture is in two classes: ") for line in told)
    assert "warning: 1 of the query pictures are support pictures: their answers prove nothing" in told
    assert [line.split()[-2] for line in told if line.startswith("good 🙂.png")] == ["line"]


def test_one_file_and_a_saved_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    support, saved = folder_of(tmp_path / "support", 4), tmp_path / "fitted.safetensors"
    drawing("line", 6).save(tmp_path / "one.png")
    first = run(capsys, support, tmp_path / "one.png", "--head", "gaussians", "--save", saved).splitlines()
    again = run(capsys, "--support", saved, tmp_path / "one.png").splitlines()
    assert again == first and first[-1].split()[:2] == ["one.png", "line"]
    assert run(capsys, support, "--save", saved).splitlines()[:2] == [first[0], first[1].replace("gaussians", "auto")]


def test_csv_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    support, query = folder_of(tmp_path / "support", 3), folder_of(tmp_path / "query", 2, 4)
    run(capsys, support, query, "--csv", tmp_path / "a.csv", "--json", tmp_path / "a.json")
    rows = list(csv.DictReader((tmp_path / "a.csv").open(encoding="utf-8")))
    about = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert len(rows) == len(about["pictures"]) == 6
    assert [row["file"] for row in rows] == [row["file"] for row in about["pictures"]]
    assert all(0 <= float(row["probability"]) <= 1 for row in rows) and {row["truth"] for row in rows} == set(SHAPES)
    assert np.sum(about["confusion"]) == 6 and about["classes"] == sorted(SHAPES)


class Page(HTMLParser):
    """The elements of a page, with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_report_is_one_page_that_needs_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    support, query = folder_of(tmp_path / "support", 3), folder_of(tmp_path / "query", 2, 4)
    bad = "<img src=x onerror=alert(1)>.png"
    Image.effect_noise((90, 90), 120).save(query / "line" / bad)
    run(capsys, support, query, "--report", tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    page = Page(text)
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == 7
    assert all(
        (a["src"] or "").startswith("data:image/jpeg;base64,") and a["alt"] and "onerror" not in a for a in images
    )
    assert not {tag for tag, _ in page.elements} & {"script", "link", "b"} and "http" not in text
    assert all(url.startswith("data:") for url in re.findall(r"url\((.*?)\)", text))
    assert page.words.index(bad) < page.words.index("ü.png")  # the most doubtful first
    assert page.words.count("too far from every class") >= 2 and "<b>box & co" in page.words


def test_mistakes_cost_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    support, query = folder_of(tmp_path / "support", 3), folder_of(tmp_path / "query", 1, 5)
    assert "nowhere does not exist" in fails(capsys, tmp_path / "nowhere", query)
    assert "is the support folder" in fails(capsys, support, support / ".." / "support")
    assert "expected SUPPORT and QUERY" in fails(capsys)
    assert "expected SUPPORT and QUERY" in fails(capsys, support, query, query)
    assert "expected SUPPORT and QUERY" in fails(capsys, "--support", tmp_path / "x", support, query)
    assert "has no folders; put the pictures of each class" in fails(capsys, support / "line", query)
    assert "the head must be auto, ridge, gaussians, prototypes or a recorded run" in fails(
        capsys, support, query, "--head", "x"
    )
    assert "the backbone must be auto" in fails(capsys, support, query, "--backbone", "resnet")
    assert "x.pth" in fails(capsys, support, query, "--weights", tmp_path / "x.pth")
    assert "classify --save wrote" in fails(capsys, "--support", support / "line" / "0 ü.png", query)
    assert "MAML takes tasks of 5 ways only" in fails(capsys, support, query, "--head", "omniglot-maml-5w1s")
    (tmp_path / "nothing" / "a").mkdir(parents=True)
    (tmp_path / "nothing" / "b").mkdir()
    (tmp_path / "nothing" / "b" / "x.jpg").write_text("text")
    assert "no support picture that can be read (" in fails(capsys, tmp_path / "nothing", query)
    (tmp_path / "nothing" / "b" / "y.jpg").write_bytes((query / "line" / "5 ü.png").read_bytes())
    assert "all pictures are of one class, b" in fails(capsys, tmp_path / "nothing", query)


def test_a_query_without_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    support = folder_of(tmp_path / "support", 3)
    (tmp_path / "query").mkdir()
    assert "query holds no picture that can be read" in fails(capsys, support, tmp_path / "query")
    (tmp_path / "query" / "x.jpg").touch()
    assert "x.jpg: an empty file" in fails(capsys, support, tmp_path / "query")


def test_names_that_the_terminal_has_no_letters_for(tmp_path: Path):
    support = folder_of(tmp_path / "support", 3)
    command = [sys.executable, "-m", "metatutor", "classify", str(support)]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, check=True)
    assert b"circle ? 3" in done.stdout and not done.stderr


def test_pictures_are_read_as_they_are_needed(fitted: FewShotClassifier):
    """Of a thousand no more than two batches are in memory."""
    taken = 0

    def pictures():
        nonlocal taken
        for i in range(1000):
            taken += 1
            yield drawing("line", i % 5)

    next(fitted.answers(pictures()))
    assert taken <= 2 * fitted.network_.batch
