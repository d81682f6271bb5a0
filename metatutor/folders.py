"""What `metatutor classify` does with folders: learns from one, names the pictures of another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from metatutor.classify import THUMBNAIL, Answers, FewShotClassifier, thumbnail
from metatutor.data.pictures import Picture, PictureFiles
from metatutor.files import expanded
from metatutor.heads import HeadName
from metatutor.learner import Learner
from metatutor.report import Report, Row, shown
from metatutor.runs import load_run

_SIDE = 560  # pixels: twice those that networks look at, THUMBNAIL at least
_SAME = 0.99999  # the cosine of a picture with itself, up to rounding


def learned(support: Path, head: str = "auto", backbone: str = "auto", weights: Path | None = None) -> Report:
    """A classifier fitted to a folder of class folders, with what there is to say about it.

    Raises:
        ValueError: if there are not two classes with pictures, or head or backbone do not exist.
    """
    classifier = FewShotClassifier(backbone, head_of(head), weights=weights)
    files = PictureFiles.of(support, at_least=_SIDE)
    if not files.names:
        raise ValueError(f"{support} has no folders; put the pictures of each class into a folder of its own there")
    classifier.fit_pairs((picture.image, picture.name) for picture in _read(files, "support"))
    empty = sorted(set(files.names) - set(classifier.classes_.tolist()))
    warnings = [f"class {name} has no picture that can be read; it is left out" for name in empty]
    for same in files.in_two_classes():
        warnings.append(f"the same picture is in two classes: {' and '.join(map(shown, same))}")
    return Report(classifier, [], warnings + classifier.warnings_, files.skipped, set(files.digests))


def answer(report: Report, query: Path, *, keep: bool = False) -> None:
    """Name one picture, or those of a folder or of class folders, and add what is found to a report.

    Args:
        report: the report of a fitted classifier.
        query: the folder or file.
        keep: whether to keep small copies of the pictures, for a page.

    Raises:
        ValueError: if there is no picture that can be read.
    """
    side = max(2 * report.classifier.network_.side, THUMBNAIL)
    files = PictureFiles.of(query, at_least=side)
    if unknown := sorted(set(files.names) - set(report.names)):
        some = ", ".join(unknown[:5]) + " …" * (len(unknown) > 5)
        report.warnings.append(f"not classes of the support set, so not judged: {some}")
    pairs = ((picture.image, _small(picture, keep)) for picture in _read(files, "query"))
    for answers, pictures in report.classifier.answer_pairs(pairs):
        report.rows += [_row(report, answers, i, *picture) for i, picture in enumerate(pictures)]
    report.skipped |= files.skipped
    if not report.rows:
        raise ValueError(f"{query} holds no picture that can be read{_first_reason(files)}")
    if same := max(len(report.known & files.digests.keys()), sum(row.cosine > _SAME for row in report.rows)):
        report.warnings.append(f"{same} of the query pictures are support pictures: their answers prove nothing")


def _small(picture: Picture, keep: bool) -> tuple[Path, str | None, bytes]:
    return picture.path, picture.name, thumbnail(picture.image) if keep else b""


def _row(report: Report, answers: Answers, i: int, path: Path, truth: str | None, small: bytes) -> Row:
    best = answers.probabilities[i].topk(2)
    (name, second), (chance, less) = (report.names[j] for j in best.indices.tolist()), best.values.tolist()
    near = tuple(zip(answers.nearest[i].tolist(), answers.cosines[i].tolist(), strict=True))
    return Row(path, name, chance, second, less, near[0][1], bool(answers.novel[i]), truth, near, small)


def check_apart(support: Path, query: Path) -> None:
    """Raise a `ValueError` if the pictures to name are the ones learned from."""
    support, query = expanded(support, "SUPPORT"), expanded(query, "QUERY")
    if support.exists() and query.exists() and support.samefile(query):
        raise ValueError(
            f"{query} is the support folder: its pictures are known already, and are left out one by one as a check; "
            "give other pictures as QUERY, or none"
        )


def head_of(name: str) -> HeadName | Learner:
    """A head by its name, or the learner of a recorded run."""
    if name in get_args(HeadName):
        return name  # pyright: ignore[reportReturnType]
    try:
        return load_run(name).learner()
    except ValueError as error:
        raise ValueError(f"the head must be {', '.join(get_args(HeadName))} or a recorded run; {error}") from None


def _read(files: PictureFiles, what: str) -> Iterator[Picture]:
    """The pictures that can be read, with a progress bar; a ValueError if there is none."""
    found = False
    with tqdm(total=len(files), desc=what, unit="picture", disable=None, leave=False) as bar:
        for picture in files:
            found = True
            bar.update(1)
            yield picture
    if not found and what == "support":
        raise ValueError(f"there is no support picture that can be read{_first_reason(files)}")


def _first_reason(files: PictureFiles) -> str:
    return "".join(f" ({shown(path)}: {reason})" for path, reason in list(files.skipped.items())[:1])
