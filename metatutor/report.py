"""What `metatutor classify` writes: lines, a table, CSV, JSON and one page of HTML."""

from __future__ import annotations

import csv
import io
import json
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from metatutor.classify import THUMBNAIL, FewShotClassifier, interval
from metatutor.files import one_line, replacing

FIELDS = ("file", "class", "probability", "second", "second_probability", "cosine", "too_far", "truth")


@dataclass(frozen=True)
class Row:
    """What was found out about one query picture.

    Attributes:
        file: its path.
        name: the likeliest class, with its probability.
        probability: of that class, 0 to 1.
        second: the next class, with its probability.
        second_probability: of the next class.
        cosine: to the nearest support picture.
        too_far: whether it is too far from every class.
        truth: its class, if it is known.
        nearest: numbers of the nearest support pictures and the cosines to them.
        thumbnail: a small copy of it, as JPEG; empty: not kept.
    """

    file: Path
    name: str
    probability: float
    second: str
    second_probability: float
    cosine: float
    too_far: bool
    truth: str | None
    nearest: tuple[tuple[int, float], ...] = ()
    thumbnail: bytes = b""

    def record(self) -> dict[str, Any]:
        """The fields of CSV and JSON."""
        values = (self.name, self.probability, self.second, self.second_probability, self.cosine)
        rounded = [round(value, 4) if isinstance(value, float) else value for value in values]
        return dict(zip(FIELDS, (shown(self.file), *rounded, self.too_far, self.truth), strict=True))


@dataclass
class Report:
    """Everything that one call of `metatutor classify` found out.

    Attributes:
        classifier: the fitted classifier.
        rows: the query pictures.
        warnings: sentences.
        skipped: files that were left out, and why.
        known: digests of the files of the support pictures, if those were read.
    """

    classifier: FewShotClassifier
    rows: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    skipped: dict[Path, str] = field(default_factory=dict)
    known: set[bytes] = field(default_factory=set)

    @property
    def names(self) -> list[str]:
        """The classes."""
        return [str(name) for name in self.classifier.classes_]

    @property
    def judged(self) -> list[Row]:
        """The query pictures whose class is known and among the classes."""
        return [row for row in self.rows if row.truth in self.names]

    def support_lines(self) -> list[str]:
        """What there is to learn from, and how well the support set says it will work."""
        check, of = self.classifier.check_, self.classifier
        counts = of.labels_.bincount(minlength=len(self.names)).tolist()
        each = ", ".join(f"{one_line(name)} {n}" for name, n in zip(self.names, counts, strict=True))
        head = of.head if isinstance(of.head, str) else type(of.head).__name__
        lines = [f"{len(self.names)} classes, {sum(counts)} pictures: {each}"]
        lines += [f"backbone {of.backbone_}, head {head}; chance {check.chance:.1%}"]
        if check.accuracy is None:
            return [*lines, "one picture per class: nothing can be left out as a check; give two or more of each"]
        lines += [f"support pictures left out one by one: {_percent(check.accuracy, check.n)} right"]
        if check.confused:
            first, second, times = check.confused
            plural = "time" if times == 1 else "times"
            lines += [f"most confused: {one_line(first)} and {one_line(second)}, {times} {plural}"]
        return lines

    def query_lines(self) -> list[str]:
        """The results for the query pictures: how many are too far, and the accuracy where their classes are known."""
        far, lines = sum(row.too_far for row in self.rows), []
        if far:
            lines += [f"{far} of {len(self.rows)} pictures are too far from every class: do not trust their names"]
        if judged := self.judged:
            share = sum(row.name == row.truth for row in judged) / len(judged)
            lines += [f"accuracy {_percent(share, len(judged))}; chance {self.classifier.check_.chance:.1%}"]
        return lines

    def confusion(self) -> list[list[int]]:
        """How many pictures of each class, a row, were given each name, a column."""
        numbers = {name: i for i, name in enumerate(self.names)}
        counts = [[0] * len(numbers) for _ in numbers]
        for row in self.judged:
            counts[numbers[row.truth or ""]][numbers[row.name]] += 1
        return counts

    def confusion_rows(self) -> list[list[Any]]:
        """The same with the names of the classes, for a terminal; names given are numbered as the rows are."""
        numbered = [f"{i} {one_line(name)}" for i, name in enumerate(self.names)]
        rows = [[name, *counts] for name, counts in zip(numbered, self.confusion(), strict=True)]
        return [["it is \\ named", *map(str, range(len(rows)))], *rows]

    def doubtful_first(self) -> list[Row]:
        """The query pictures, most doubtful first: those too far from every class, then by doubt in the first name."""
        return sorted(self.rows, key=lambda row: (not row.too_far, row.probability - row.second_probability))

    # --- files ---

    def write_csv(self, path: Path) -> None:
        """One line per query picture."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list[str](FIELDS))
        writer.writeheader()
        writer.writerows(row.record() for row in self.rows)
        _write(path, text.getvalue())

    def write_json(self, path: Path) -> None:
        """Everything but the pictures."""
        about = {"classes": self.names, "backbone": self.classifier.backbone_, "check": asdict(self.classifier.check_)}
        about |= {"warnings": self.warnings, "skipped": {shown(p): reason for p, reason in self.skipped.items()}}
        about |= {"confusion": self.confusion()} if self.judged else {}
        _write(path, json.dumps(about | {"pictures": [row.record() for row in self.rows]}, indent=1) + "\n")

    def write_html(self, path: Path) -> None:
        """One page that needs nothing else, the most doubtful pictures first."""
        used = sorted({number for row in self.rows for number, _ in row.nearest})
        pictures = "\n".join(f".s{i}{{background-image:url({_uri(self.classifier.thumbnails_[i])})}}" for i in used)
        parts = [f"<h1>{len(self.rows)} pictures, {len(self.names)} classes</h1>"]
        parts += [_list("summary", [*self.support_lines(), *self.query_lines()])]
        parts += [_list("warnings", self.warnings, "Warnings")]
        parts += [self._confusion_table()] if self.judged else []
        parts += ["<h2>Pictures, the most doubtful first</h2>", "<div class=cards>"]
        parts += [self._card(row) for row in self.doubtful_first()]
        parts += ["</div>", _list("skipped", [f"{shown(p)}: {why}" for p, why in self.skipped.items()], "Left out")]
        _write(path, _PAGE.replace("/*pictures*/", pictures).replace("<!--body-->", "\n".join(filter(None, parts))))

    def _card(self, row: Row) -> str:
        labels = self.classifier.labels_.tolist()
        near = "".join(
            f'<figure><div class="p s{i}" role=img aria-label="support picture of {_html(self.names[labels[i]])}">'
            f"</div><figcaption>{_html(self.names[labels[i]])}<br>cosine {cosine:.2f}</figcaption></figure>"
            for i, cosine in row.nearest
        )
        remarks = ["<strong class=far>too far from every class</strong>"] if row.too_far else []
        if row.truth is not None and row.truth != row.name:
            remarks += [f"<strong class=wrong>it is {_html(row.truth)}</strong>"]
        return (
            f'<article><figure><img src="{_uri(row.thumbnail)}" alt="query picture {_html(row.file.name)}">'
            f"<figcaption>{_html(row.file.name)}</figcaption></figure><div><h3>{_html(row.name)} "
            f"<small>{row.probability:.0%}</small></h3><meter value={row.probability:.3f}></meter>"
            f"<p>else {_html(row.second)} {row.second_probability:.0%} {' '.join(remarks)}</p></div>"
            f"<div class=near>{near}</div></article>"
        )

    def _confusion_table(self) -> str:
        head = "".join(f"<th scope=col>{_html(name)}</th>" for name in self.names)
        rows = "".join(
            f"<tr><th scope=row>{_html(name)}</th>"
            + "".join(f"<td{' class=right' if i == j else ''}>{n or ''}</td>" for j, n in enumerate(counts))
            for i, (name, counts) in enumerate(zip(self.names, self.confusion(), strict=True))
        )
        title = "<h2>Classes (rows) and names given (columns)</h2>"
        return f"{title}<div class=wide><table><tr><td></td>{head}{rows}</table></div>"


def _percent(share: float, n: int) -> str:
    low, high = interval(round(share * n), n)
    return f"{share:.1%} (95% interval {low:.1%} to {high:.1%}) of {n}"


def shown(path: Path | str) -> str:
    """A path that can be written anywhere: bytes that are not text become question marks."""
    return str(path).encode("utf-8", "replace").decode()


def _html(text: str) -> str:
    return escape(shown(text), quote=True)


def _uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{b64encode(jpeg).decode()}"


def _list(kind: str, lines: Sequence[str], title: str = "") -> str:
    heading = f"<h2>{title}</h2>" if title else ""
    return f"{heading}<ul class={kind}>{''.join(f'<li>{_html(line)}</li>' for line in lines)}</ul>" if lines else ""


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace", newline="")


def table(rows: Iterable[Row]) -> list[tuple[str, str, str, str]]:
    """File, name, probability and remarks of query pictures, for the terminal."""
    return [(_named(row), one_line(row.name), f"{row.probability:.0%}", _remark(row)) for row in rows]


def _named(row: Row) -> str:
    return one_line(row.file.name if row.truth is None else f"{row.truth}/{row.file.name}")


def _remark(row: Row) -> str:
    wrong = row.truth is not None and row.truth != row.name
    return ", ".join(["too far from every class"] * row.too_far + [f"it is {one_line(row.truth or '')}"] * wrong)


_PAGE = f"""<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">
<title>metatutor classify</title>
<style>
:root{{color-scheme:light dark}}
body{{font:16px/1.45 system-ui,sans-serif;max-width:68rem;margin:0 auto;padding:1rem}}
h3{{margin:0}} figure{{margin:0}} figcaption{{font-size:.8rem;overflow-wrap:anywhere}}
.warnings,.far,.wrong{{color:light-dark(#a33400,#ffb08a)}}
.wide{{overflow-x:auto}} table{{border-collapse:collapse}} td,th{{border:1px solid #8886;padding:.2rem .5rem}}
td{{text-align:right}} .right{{font-weight:bold}}
article{{display:grid;grid-template-columns:{THUMBNAIL + 16}px minmax(8rem,1fr) auto;gap:1rem;padding:.8rem 0;
border-top:1px solid #8886}}
article img,.p{{width:{THUMBNAIL}px;height:{THUMBNAIL}px;object-fit:contain;background:center/contain no-repeat #8882}}
.near{{display:flex;gap:.5rem}} .near figure{{width:{THUMBNAIL}px}} meter{{width:100%}}
@media(max-width:40rem){{article{{grid-template-columns:{THUMBNAIL + 16}px 1fr}} .near{{grid-column:1/-1}}}}
/*pictures*/
</style>
<!--body-->
</html>
"""
