"""Every method beside every other, and beside its paper: what `metatutor results` prints and chapter 10 draws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metatutor.evaluation import Evaluation
from metatutor.runs import published, read_evaluations, run_folders, study

SETTINGS = ((5, 1), (5, 5), (20, 1), (20, 5))  # ways and shots
PUBLISHED = "-published"  # the end of an evaluation's name: under the rules of the method's paper

# From the beginning and end of a recorded evaluation's name to the method's, and to that of the published numbers.
METHODS: dict[tuple[str, str], tuple[str, str | None]] = {
    ("nearest-pixels", ""): ("Nearest pixels", None),
    ("scratch", ""): ("CNN from scratch", None),
    ("pretrained-cosine", ""): ("Pretrained CNN, cosine", "baseline CNN, cosine"),
    ("pretrained-finetuned", ""): ("Pretrained CNN, fine-tuned", "baseline CNN, softmax + fine-tuning"),
    ("siamese", ""): ("Siamese Network", "Siamese, fine-tuned"),
    ("matching", ""): ("Matching Networks", "Matching Networks"),
    ("prototypical", ""): ("Prototypical Networks", "Prototypical Networks"),
    ("best", ""): ("Prototypical, recipe for today", None),
    ("relation", ""): ("Relation Network", "Relation Network"),
    ("r2d2", ""): ("R2-D2 (ridge head)", None),
    ("protomaml", ""): ("ProtoMAML", None),
    ("maml", ""): ("MAML", "MAML"),
    ("fomaml", ""): ("First-order MAML", "first-order MAML"),
    ("anil", ""): ("ANIL (head only)", "ANIL"),
    ("boil", ""): ("BOIL (body only)", None),
    ("metasgd", ""): ("Meta-SGD", "Meta-SGD"),
    ("maml", "-plusplus"): ("MAML++", "MAML++"),
    ("imaml", ""): ("Implicit MAML", "iMAML, Hessian-free"),
    ("reptile", ""): ("Reptile", "Reptile"),
    ("reptile", "-transductive"): ("Reptile, transductive", "Reptile, transductive"),
    ("metalstm", ""): ("LSTM optimizer", None),
    ("mann", ""): ("MANN", None),
    ("metanet", ""): ("Meta Networks", "Meta Networks, standard split"),
    ("snail", ""): ("SNAIL", "SNAIL"),
}


@dataclass(frozen=True)
class Row:
    """One method on one kind of tasks of Omniglot.

    Attributes:
        method: its name in the book.
        name: name of the recorded evaluation.
        ours: its result.
        as_published: its result under the paper's own rules, where these differ from ours: as many query images as in
            the paper, which matters if they are answered together, or trained and tested on the paper's characters;
            None: not recorded.
        paper: the published number with its source and protocol; None if there is none.
        train_seconds, parameters, peak_memory_mib: those of the training whose weights were evaluated.
        ms_a_task: milliseconds to adapt to a single task and answer it, on one thread; None: not measured.
        tasks_a_second: tasks per second when 32 are answered side by side; None: not measured.
    """

    method: str
    name: str
    ours: Evaluation
    as_published: Evaluation | None
    paper: dict[str, Any] | None
    train_seconds: float
    parameters: int
    peak_memory_mib: int
    ms_a_task: float | None
    tasks_a_second: float | None

    @property
    def as_published_cell(self) -> str:
        """Accuracy under the paper's rules and what differs in them, such as `99.2 ± 0.1% (1 query a class)`."""
        found = self.as_published
        if found is None:
            return "–"
        if found.split != self.ours.split:
            return f"{found} (the paper's characters)"
        return f"{found} ({found.n_query} quer{'y' if found.n_query == 1 else 'ies'} a class)"

    @property
    def below_paper(self) -> bool:
        """Whether the result, under the paper's rules if recorded, is below the published number less its interval.

        The result is rounded as the paper's is: to tenths of a percent, or to hundredths.
        """
        if self.paper is None:
            return False
        least = round(self.paper["accuracy"] - (self.paper["ci95"] or 0), 4)
        digits = max(3, len(f"{self.paper['accuracy']:.4f}".rstrip("0")) - 2)
        return round((self.as_published or self.ours).accuracy, digits) < least

    @property
    def papers_cell(self) -> str:
        """The published accuracy as tables show it, such as `98.7 ± 0.4%`."""
        if self.paper is None:
            return "–"
        interval = "" if self.paper["ci95"] is None else f" ± {100 * self.paper['ci95']:.1f}"
        return f"{100 * self.paper['accuracy']:.1f}{interval}%"


def compared(results: Path | None = None) -> list[Row]:
    """One row per method and setting that was recorded, in the order of the book."""
    records = {
        record["name"]: (about, record)
        for about in map(read_evaluations, run_folders(results))
        for record in about["evaluations"]
    }
    papers = {(row["method"], row["n_way"], row["k_shot"]): row for row in published()}
    times = {row["name"]: row for row in study("comparison")}
    rows = []
    for (start, end), (method, of_paper) in METHODS.items():
        for n_way, k_shot in SETTINGS:
            name = f"omniglot-{start}-{n_way}w{k_shot}s{end}"
            if name in records:
                about, record = records[name]
                paper = papers.get((of_paper, n_way, k_shot)) if of_paper else None
                size = (about["train_seconds"], about["parameters"], about["peak_memory_mib"])
                time = times.get(name)
                speed = (time["ms_alone"], 1000 / time["ms_of_32"]) if time else (None, None)
                ours, theirs = Evaluation.from_record(record), records.get(name + PUBLISHED, (None, None))[1]
                as_published = Evaluation.from_record(theirs) if theirs else None
                rows.append(Row(method, name, ours, as_published, paper, *size, *speed))
    return rows


def summary(results: Path | None = None) -> list[tuple[str, ...]]:
    """One row per method: its accuracy in each of `SETTINGS`, the paper's in brackets; – where there is none."""
    by_method: dict[str, dict[tuple[int, int], str]] = {}
    for row in compared(results):
        of_paper = f" ({100 * row.paper['accuracy']:.1f})" if row.paper else ""
        by_method.setdefault(row.method, {})[row.ours.n_way, row.ours.k_shot] = f"{str(row.ours)[:-1]}{of_paper}"
    return [(method, *(cells.get(setting, "–") for setting in SETTINGS)) for method, cells in by_method.items()]
