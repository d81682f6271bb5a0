"""Pictures: they draw, the same picture is the same file, and they leave matplotlib's settings alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from browser import BROWSER, found_in_the_browser
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.container import ErrorbarContainer
from matplotlib.text import Annotation

from metatutor.backbones import MLP, ConvNet
from metatutor.book import figures
from metatutor.book.figures import Picture
from metatutor.book.figures.style import BLUE, CJK_FONTS, GREY
from metatutor.episodes import Episode
from metatutor.functional import class_means
from metatutor.metric.matching import attend
from metatutor.metric.prototypical import similarity
from metatutor.optimization.maml import MAML


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
    generator, labels = torch.Generator().manual_seed(0), torch.arange(5).repeat(3, 1)
    support, query = torch.rand(2, 3, 5, 1, 28, 28, generator=generator)
    return Episode(support, labels, query, labels, n_way=5)


ALL: dict[str, Callable[[], Picture]] = {
    "characters": lambda: figures.characters({"Omniglot": torch.rand(6, 28, 28), "Strokes": torch.rand(4, 28, 28)}),
    "redrawn": lambda: figures.redrawn([(torch.rand(28, 28), torch.rand(12, 28, 28)) for _ in range(3)]),
    "task": lambda: figures.task(episode()),
    "lines": lambda: figures.lines({"a": ([1, 2], [0.1, 0.2]), "b": ([1, 2], [0.3, 0.2])}, x="step", y="loss (nats)"),
    "lines, intervals": lambda: figures.lines({"a": ([1, 2], [0.1, 0.2], [0.05, 0.01])}, x="ways", y="accuracy"),
    "cost": lambda: figures.cost({"metric": {"A": (2.0, 0.01, 0.002), "B": (60, 0.5, 0.6)}}, x="minutes"),
    "differences": lambda: figures.differences({"A": (0.01, 0.002), "B": (-0.01, 0.02)}, x="points"),
    "places": lambda: figures.places({f"group {i}": torch.rand(4, 2) for i in range(9)}, x="first", y="second"),
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
    "waves": lambda: figures.waves(
        {name: {0: torch.zeros(9), 1: torch.ones(9), 10: torch.arange(9.0)} for name in ("MAML", "pretrained")},
        torch.arange(9.0),
        points=torch.rand(4, 2),
        truth=torch.arange(9.0).sin(),
    ),
    "beginnings": lambda: figures.beginnings({"a": (torch.arange(5.0), torch.rand(5))}, {"b": 2.0}, x="w", y="loss"),
    "heat": lambda: figures.heat(torch.rand(2, 3), rows=[1, 2], columns=[0.1, 0.2, 0.3], y="steps", x="rate"),
    "journeys": lambda: figures.journeys({"task": (1.0, 0.0)}, {"Reptile": torch.rand(4, 2)}, x="weight", y="bias"),
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


def shuffled(task: Episode) -> Episode:
    """The same tasks, their support sets in another order."""
    order = torch.randperm(task.support_labels.shape[1], generator=torch.Generator().manual_seed(3))
    assert order.tolist() != sorted(order)
    return replace(task, support_images=task.support_images[:, order], support_labels=task.support_labels[:, order])


OF_TASKS: dict[str, Callable[[Episode], Picture]] = {
    "task": figures.task,
    "answers": lambda task: figures.answers(task, torch.eye(5), shown=range(5)),
    "families": figures.families,
}


@pytest.mark.parametrize("name", OF_TASKS)
def test_a_task_is_drawn_class_by_class_in_whatever_order_it_comes(name: str) -> None:
    task = three_tasks()
    assert OF_TASKS[name](shuffled(task)).svg() == OF_TASKS[name](task).svg()


def coloured(task: Episode) -> Episode:
    """The same tasks in red, green and blue: the ink is red."""

    def red(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images, torch.zeros_like(images), torch.zeros_like(images)], dim=2)

    return replace(task, support_images=red(task.support_images), query_images=red(task.query_images))


OF_IMAGES: dict[str, Callable[[Episode], Picture]] = OF_TASKS | {
    "characters": lambda task: figures.characters({"them": task.support_images[0]}),
    "adaptation": lambda task: figures.adaptation(task, torch.rand(2, 5, 5), shown=range(5)),
    "embedding": lambda task: figures.embedding(task, {"here": (torch.rand(5, 8), torch.rand(5, 8))}),
    "confusions": lambda task: figures.confusions(task.support_images[:, :3]),
}


@pytest.mark.parametrize("name", OF_IMAGES)
def test_images_of_three_channels_are_drawn_in_their_colours(name: str) -> None:
    def drawn(task: Episode) -> list[Any]:
        return [image.get_array() for axes in OF_IMAGES[name](task).axes for image in axes.images]

    grey, colour = drawn(three_tasks()), drawn(coloured(three_tasks()))
    assert len(grey) == len(colour) >= 5
    assert {pixels.shape for pixels in grey} == {(28, 28)} and {pixels.shape for pixels in colour} == {(28, 28, 3)}
    assert all(pixels[..., 0].max() > 0.9 and pixels[..., 1:].max() == 0 for pixels in colour)


def test_a_chinese_title_is_drawn_where_a_font_has_its_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    manager = font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", [font for font in manager.ttflist if font.name not in CJK_FONTS])
    figures.characters({"字": torch.zeros(1, 28, 28)}).svg()  # no such font: a box, and nothing is asked for in vain
    assert [str(warned.message)[:13] for warned in recwarn.list] == ["Glyph 23383 ("] * len(recwarn.list) != []
    recwarn.clear()
    manager.addfont(tiny_font(tmp_path / "tiny.ttf", "SimHei", "字"))
    without = figures.characters({"Omniglot": torch.zeros(1, 28, 28)}).svg()
    assert "SimHei" in figures.characters({"字": torch.zeros(1, 28, 28)}).svg() and "SimHei" not in without
    assert not recwarn.list and not caplog.records


def tiny_font(path: Path, name: str, character: str) -> Path:
    """A font of one character, a triangle."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((500, 0))
    pen.lineTo((0, 500))
    pen.closePath()
    glyphs = {".notdef": TTGlyphPen(None).glyph(), "one": pen.glyph()}
    made = FontBuilder(1000)
    made.setupGlyphOrder(list(glyphs))
    made.setupCharacterMap({ord(character): "one"})
    made.setupGlyf(glyphs)
    made.setupHorizontalMetrics(dict.fromkeys(glyphs, (600, 0)))
    made.setupHorizontalHeader(ascent=800, descent=-200)
    made.setupNameTable({"familyName": name, "styleName": "Regular", "psName": name})
    made.setupOS2()
    made.setupPost()
    made.save(path)
    return path


def test_names_beside_costs_stand_in_the_order_of_the_errors() -> None:
    points = {"best": (9.0, 0.01, 0.001), "worst": (1.0, 0.5, 0.01), "middle": (3.0, 0.1, 0.01)}
    [axes] = figures.cost({"metric": points}, x="minutes").axes
    heights = {text.get_text(): text.xyann[1] for text in axes.texts if isinstance(text, Annotation)}
    assert heights["worst"] > heights["middle"] > heights["best"]
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_a_difference_whose_interval_holds_zero_is_grey() -> None:
    [axes] = figures.differences({"clear": (0.02, 0.01), "not": (0.01, 0.02)}, x="points").axes
    colours = [
        container.lines[0].get_color() for container in axes.containers if isinstance(container, ErrorbarContainer)
    ]
    assert colours == [BLUE, GREY]


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
    assert shown.splitlines()[3] == "| pixels | – | 10 |"
    assert figures.table(("task", "right"), ("20-way 1-shot", "96%")).splitlines()[1] == "|:--|--:|"
    assert shown._repr_markdown_() == shown and shown._repr_html_() is None
    with pytest.raises(ValueError, match="head has 2 columns but a row has 3"):
        figures.table(("a", "b"), (1, 2, 3))


def test_a_table_has_minus_signs_where_a_number_is_negative() -> None:
    shown = figures.table(("change", "from"), ("-0.4 … -.3", "Conv-4, 5-way"), (-1200, "1e-05"))
    assert shown.splitlines()[1:] == ["|--:|:--|", "| −0.4 … −.3 | Conv-4, 5-way |", "| −1,200 | 1e-05 |"]


def test_a_bar_in_a_table_divides_nothing() -> None:
    shown = figures.table(("log p(x | c)", r"done \| already"), ("a | b", 1))
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in shown.splitlines()] == [3, 3, 3]
    assert r"log p(x \| c)" in shown and r"\\|" not in shown


# --- what a reader moves ---

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
    shown = figures.movable_plane(support, labels, query)
    found = torch.tensor(found_in_the_browser(tmp_path, shown, MOVES), dtype=torch.float64)

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


WAVE_MOVES = """
<script>
const box = document.querySelector("div[id^=wave]"), board = box.querySelector(".board"), found = [];
const [steps, rate] = box.querySelectorAll("[type=range]"), radios = box.querySelectorAll("[type=radio]");
const points = () => [...box.querySelectorAll(".move")].filter((point) => point.style.display !== "none");
const press = (point, key) => point.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const slide = (slider, value) => { slider.value = value; slider.dispatchEvent(new Event("input", {bubbles: true})); };
const button = (name) => [...box.querySelectorAll("button")].find((b) => b.textContent === name).click();
const point = (kind, target, clientX, clientY) => target.dispatchEvent(
  new PointerEvent(kind, {clientX, clientY, bubbles: true}));
const at = (x, y) => {
  const on = box.querySelector(".plot").getBoundingClientRect();
  return [on.left + on.width * (x + 5) / 10, on.top + on.height * (6 - y) / 12];
};
let drawn = 1;
Math.random = () => (drawn = drawn * 16807 % 2147483647) / 2147483647;
const note = (does) => {
  const {points, losses, curve} = box.dataset;
  const chosen = [...radios].findIndex((radio) => radio.checked), texts = [...box.querySelectorAll("td, th")];
  found.push({does, chosen, steps: Number(steps.value), rate: 0.01 * 10 ** rate.value, points: JSON.parse(points),
    losses: JSON.parse(losses), curve: JSON.parse(curve), text: texts.map((text) => text.textContent).join("|")});
};
note("nothing");
slide(steps, 10); note("steps");
slide(rate, 0.4); note("rate");
radios[1].click(); note("network");
point("click", board, ...at(-4, 2)); note("add");
press(points()[0], "ArrowUp"); press(points()[0], "ArrowLeft"); note("keys");
point("pointerdown", points()[1], ...at(0, 0)); point("pointermove", window, ...at(3, -2));
point("pointerup", window, ...at(3, -2)); point("click", points()[1], ...at(3, -2)); note("drag");
point("pointerdown", points()[1], ...at(3, -2)); point("pointerup", window, ...at(3, -2));
point("click", points()[1], ...at(3, -2)); note("remove");
press(points()[0], "Delete"); slide(steps, 3); slide(rate, -0.7); note("delete");
button("clear"); note("clear");
for (let i = 0; i < 30; i++) button("add a point");
note("many");
button("new wave"); slide(rate, 0); note("new wave");
radios[2].click(); slide(rate, 1); slide(steps, 10); note("diverge");
button("start again"); note("nothing");
document.body.dataset.found = JSON.stringify(found);
</script>
"""


def rounded_mlp(seed: int, size: float = 1.0) -> MLP:
    """A float64 network whose weights have six digits, as in the page."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = MLP(hidden=(40, 20)).double()
    for p in network.parameters():
        p.data = torch.tensor([float(f"{size * v:.6g}") for v in p.flatten().tolist()], dtype=p.dtype).view_as(p)
    return network


@pytest.mark.skipif(not BROWSER, reason="needs Chromium or Chrome")
def test_the_page_adapts_as_maml_does(tmp_path: Path) -> None:
    networks = {"small": rounded_mlp(0), "<large>": rounded_mlp(1, 1.5), "too large": rounded_mlp(1, 4.0)}
    points = torch.tensor([[-3.0, 1.5], [0.0, 0.0], [2.5, -1.25]], dtype=torch.float64)
    shown = figures.adapting_wave(networks, points, inner_lr=0.01, wave=torch.tensor([2.0, 0.5]))
    found = found_in_the_browser(tmp_path, shown, WAVE_MOVES)
    assert len({(state["chosen"], state["steps"], state["rate"]) for state in found}) >= 6
    x = torch.linspace(-5, 5, 201, dtype=torch.float64)[:, None]
    for state in found:
        if state["does"] in ("clear", "diverge"):
            continue
        known_x, known_y = torch.tensor(state["points"], dtype=torch.float64).T[:, None, :, None]
        learner = MAML(list(networks.values())[state["chosen"]], inner_lr=state["rate"])
        asked = Episode(known_x, known_y, x[None], torch.zeros_like(x)[None], n_way=1)
        adapted = learner.adapt(asked, state["steps"])
        curve = learner.query_logits(asked, adapted)[0, :, 0]
        losses = [learner.support_losses(asked, p).item() for p in (learner.adapt(asked, 0), adapted)]
        assert torch.allclose(torch.tensor(state["curve"], dtype=torch.float64), curve, atol=1e-4), state["does"]
        assert state["losses"] == pytest.approx(losses, abs=1e-4), state["does"]

    assert found[0] == found[-1] and found[0]["points"] == points.tolist()
    by_name = {state["does"]: state for state in found}
    assert by_name["add"]["points"][:3] == points.tolist()
    assert by_name["add"]["points"][3] == pytest.approx([-4, 2], abs=0.05)
    assert by_name["keys"]["points"][0] == pytest.approx([-3.1, 1.6])
    assert by_name["drag"]["points"][1] == pytest.approx([3, -2], abs=0.05)
    assert len(by_name["drag"]["points"]) == 4
    assert by_name["remove"]["points"] == [p for i, p in enumerate(by_name["drag"]["points"]) if i != 1]
    assert by_name["delete"]["points"] == by_name["remove"]["points"][1:]
    assert by_name["clear"]["points"] == [] and by_name["clear"]["losses"] == [None, None]
    assert len(by_name["many"]["points"]) == 20 and len(by_name["new wave"]["points"]) == 10
    assert by_name["diverge"]["curve"] == [] and by_name["diverge"]["losses"][1] is None
    assert by_name["diverge"]["text"].count("diverged") == 2 and "diverged" not in by_name["new wave"]["text"]
    assert "|after 1 step|" in found[0]["text"] and "|after 10 steps|" in found[1]["text"]


def test_a_wave_to_be_played_with_needs_no_network_and_has_its_labels() -> None:
    shown = figures.adapting_wave({"a<b": MLP(), "</script>": MLP()}, torch.zeros(1, 2), inner_lr=0.1, steps=5)
    assert "http" not in shown.replace("http://www.w3.org/2000/svg", "") and "src=" not in shown
    assert shown.count("<script") == shown.count("</script") == 1
    assert "a&lt;b" in shown and "a<b" not in shown
    assert shown.count('type="radio"') == 2 and shown.count(" checked>") == 2  # one of them, and the box of the wave
    for text in (
        'aria-label="initial parameters"',
        'aria-live="polite"',
        "arrow keys move it",
        ">inner learning rate<",
    ):
        assert text in shown
    ids = re.findall(r'<input type="range" id="([^"]+)"', shown)
    assert len(ids) == 2 and all(f'<label for="{name}">' in shown for name in ids)
    assert 'max="5"' in shown and shown == shown._repr_html_()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"networks": {}}, "networks must name at least one network"),
        ({"networks": {"a": ConvNet(1)}}, "networks['a'] must be an MLP with one input and one output, got ConvNet"),
        ({"networks": {"a": MLP(2)}}, "must be an MLP with one input and one output, got MLP with 2 and 1"),
        ({"points": torch.zeros(3)}, "points must be [n, 2], an x and a y in each row, got [3]"),
        ({"points": torch.zeros(2, 3)}, "points must be [n, 2], an x and a y in each row, got [2, 3]"),
        ({"points": torch.zeros(21, 2)}, "there is room for 20 points, got 21"),
        ({"points": torch.tensor([[6.0, 0.0]])}, "points must lie within x from -5.0 to 5.0, y up to ±6.0"),
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"inner_lr": 0.0}, "inner_lr must be positive, got 0.0"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_what_a_wave_cannot_be_adapted_from(change: dict[str, Any], message: str) -> None:
    arguments = {"networks": {"a": MLP()}, "points": torch.zeros(1, 2), "inner_lr": 0.01} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        figures.adapting_wave(**arguments)
