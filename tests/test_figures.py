"""Pictures: they draw, the same picture is the same file, and they leave matplotlib's settings alone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable

import matplotlib
import pytest
import torch
import torch.nn.functional as F

from metatutor import figures
from metatutor.episodes import Episode
from metatutor.figures import Picture
from metatutor.metric.base import class_means
from metatutor.metric.matching import attend
from metatutor.metric.prototypical import similarity


def episode(n_query: int = 2) -> Episode:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(5)[None]
    support = torch.rand(1, 5, 1, 28, 28, generator=generator)
    query = torch.rand(1, 5 * n_query, 1, 28, 28, generator=generator)
    return Episode(support, labels, query, labels.repeat_interleave(n_query, 1), n_way=5)


def history() -> list[dict[str, float]]:
    row = {"seconds": 1.0, "meta_loss": 1.6, "train_accuracy": 0.2, "validation_accuracy": 0.25}
    return [row | {"iteration": float(i)} for i in (10, 20)]


def three_tasks() -> Episode:
    labels = torch.arange(5).repeat(3, 1)
    return Episode(torch.rand(3, 5, 1, 28, 28), labels, torch.rand(3, 5, 1, 28, 28), labels, n_way=5)


ALL: dict[str, Callable[[], Picture]] = {
    "characters": lambda: figures.characters({"Omniglot": torch.rand(6, 28, 28), "Strokes": torch.rand(4, 28, 28)}),
    "task": lambda: figures.task(episode()),
    "lines": lambda: figures.lines({"a": ([1, 2], [0.1, 0.2]), "b": ([1, 2], [0.3, 0.2])}, x="step", y="loss (nats)"),
    "learning_curve": lambda: figures.learning_curve(history(), levels={"guessing": 0.2}),
    "intervals": lambda: figures.intervals({"here": {"MAML": (0.9, 0.01)}, "papers": {"MAML": (0.98, None)}}),
    "adaptation": lambda: figures.adaptation(episode(), torch.rand(4, 10, 5).softmax(-1), shown=range(0, 10, 2)),
    "answers": lambda: figures.answers(episode(), torch.rand(10, 5).softmax(-1), shown=range(10)),
    "by_layer": lambda: figures.by_layer({"change": {"conv 1": torch.rand(4)}, "CKA": {"conv 1": torch.rand(4)}}),
    "slopes": lambda: figures.slopes({"a": (torch.arange(5.0), torch.arange(5.0), 2, {"slope": 1})}, x="w", y="loss"),
    "bands, few": lambda: figures.bands({"a": torch.rand(3, 9), "b": torch.rand(3, 9)}, [1, 2, 5], x="shots"),
    "bands, many": lambda: figures.bands({"a": torch.rand(9, 4)}, range(9), x="steps", levels={"guessing": 0.2}),
    "certainty": lambda: figures.certainty(torch.rand(200), n=20),
    "plane": lambda: figures.plane(
        torch.rand(4, 2),
        torch.tensor([0, 0, 1, 1]),
        {"one": lambda x: x, "two": lambda x: -x},
        crosses={"one": torch.rand(2, 2)},
        query=torch.rand(2),
        weights={"two": torch.rand(4)},
    ),
    "embedding": lambda: figures.embedding(episode(), {"here": (torch.rand(5, 8), torch.rand(10, 8))}),
    "matrices": lambda: figures.matrices({"a": torch.rand(6, 6), "b": torch.rand(6, 6)}, classes=3, unit="cosine"),
    "confusions": lambda: figures.confusions(torch.rand(5, 3, 1, 28, 28)),
    "families": lambda: figures.families(three_tasks()),
}


@pytest.mark.parametrize("name", ALL)
def test_draws_without_touching_the_settings(name: str) -> None:
    before = dict(matplotlib.rcParams)
    torch.manual_seed(0)
    text = ALL[name]().svg()
    assert dict(matplotlib.rcParams) == before
    torch.manual_seed(0)
    assert ALL[name]().svg() == text
    assert len(text) < 200_000


@pytest.mark.parametrize("name", ALL)
def test_is_no_wider_than_a_phone_can_show(name: str) -> None:
    width = re.search(r'width="([\d.]+)pt"', ALL[name]().svg())
    assert width is not None and float(width.group(1)) <= 5.5 * 72


def test_query_images_are_not_shown_in_order() -> None:
    drawn = figures.task(episode(n_query=3))
    captions = [text.get_text() for text in drawn.axes[1].texts]
    assert sorted(captions) == sorted("012340123401234") and captions != sorted(captions)


def test_wrong_answers_differ_in_more_than_colour() -> None:
    probabilities = torch.eye(5).roll(1, 0).repeat_interleave(2, 0)
    probabilities[0] = torch.eye(5)[0]
    captions = [text.get_text() for text in figures.answers(episode(), probabilities, range(3)).axes[1].texts]
    assert captions == ["✓ 0 (100%)", "✗ 4 (100%)", "✗ 0 (100%)"]


def test_a_stepper_has_a_button_and_a_described_picture_for_every_frame() -> None:
    html = figures.stepper({"before": Picture(figsize=(1, 1)), "1 step": Picture(figsize=(2, 1))}, alt='A "task"')
    assert html.count('type="radio"') == html.count("<img") == 2 and html.count(" checked>") == 1
    assert 'alt="A &quot;task&quot;: 1 step"' in html
    assert "http" not in html and "<script" not in html


def test_live_where_somebody_sits_at_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JPY_SESSION_NAME", "COLAB_RELEASE_TAG", "VSCODE_PID"):
        monkeypatch.delenv(name, raising=False)
    assert not figures.live()
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    assert figures.live()


def test_a_table_is_markdown_with_figures_to_the_right() -> None:
    shown = figures.table(("method", "points", "time"), ("MAML", "+1.0 ± 0.2", 3), ("pixels", "", 10))
    assert shown.splitlines()[1] == "|:--|--:|--:|"
    assert shown._repr_markdown_() == shown and shown._repr_html_() is None
    with pytest.raises(ValueError, match="head has 2 columns but a row has 3"):
        figures.table(("a", "b"), (1, 2, 3))


# --- what a reader moves ---

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), "")
MOVES = """
<script>
const box = document.querySelector("div[id^=plane]"), found = [];
const press = (point, key) => point.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const [first, query] = [...box.querySelectorAll(".move")].filter((_, i, all) => i === 0 || i === all.length - 1);
for (const way of box.querySelectorAll("input")) {
  way.click();
  found.push(JSON.parse(box.dataset.probabilities));
  press(first, "ArrowRight"); press(query, "ArrowUp");
  found.push(JSON.parse(box.dataset.probabilities));
}
document.body.dataset.found = JSON.stringify(found);
</script>
"""


@pytest.mark.skipif(not BROWSER, reason="needs Chromium or Chrome")
def test_the_page_computes_what_the_package_computes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    support = 4 * torch.rand(6, 2, generator=generator, dtype=torch.float64) - 2
    labels, query = torch.arange(3).repeat(2), torch.tensor([0.5, -0.3], dtype=torch.float64)
    page = tmp_path / "page.html"
    shown = figures.movable_plane(support, labels, query)
    page.write_text(f'<!doctype html><meta charset="utf-8"><body>{shown}{MOVES}</body>', encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    run = subprocess.run([BROWSER, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    written = re.search(r'data-found="([^"]*)"', run.stdout)
    assert written, run.stdout[-2000:]
    found = torch.tensor(json.loads(html.unescape(written[1])), dtype=torch.float64)

    def expected(method: int) -> torch.Tensor:
        if method == 2:
            cosines = F.normalize(query[None, None], dim=-1) @ F.normalize(support[None], dim=-1).mT
            return attend(10 * cosines, labels[None], 3).softmax(-1)[0, 0]
        prototypes = class_means(support[None], labels[None], 3)
        return similarity(query[None, None], prototypes, "cosine" if method else "squared").softmax(-1)[0, 0]

    for step in range(6):
        assert torch.allclose(found[step], expected(step // 2), atol=1e-4), step
        if step % 2 == 0:
            support[0, 0], query[1] = support[0, 0] + 0.1, query[1] + 0.1
