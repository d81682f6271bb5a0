"""The pad on which a reader draws an alphabet: its network is the recorded one, and a hand can use it."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import alphabet as pad
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from browser import BROWSER, Window, window
from sources import ROOT
from torch import Tensor

from metatutor import ConvNet, Prototypical, evaluate
from metatutor.book import figures
from metatutor.book.figures.alphabet import as_in_the_page, eight_bits
from metatutor.data import Omniglot, omniglot
from metatutor.episodes import EpisodeSpec
from metatutor.files import members
from metatutor.runs import load_run

BITMAP = 105
HAS_OMNIGLOT = bool(os.environ.get("METATUTOR_DATA"))
in_a_browser = pytest.mark.skipif(not BROWSER, reason="needs Chromium or Chrome")
on_omniglot = pytest.mark.skipif(not HAS_OMNIGLOT, reason="needs METATUTOR_DATA")
widths = pytest.mark.parametrize(("width", "touch"), [(1280, False), (390, True)], ids=["1280", "390"])

BOX = "document.querySelector('[id^=alphabet-]')"
BY_NAME = f"[...{BOX}.querySelectorAll('button')].find((b) => b.textContent === "
# bitmaps, packed in hexadecimal digits, to embeddings and the pixels that they are shrunk to
EMBED = f"""(packed) => packed.map((digits) => {{
  const bits = digits.match(/../g).flatMap((d) => [...parseInt(d, 16).toString(2).padStart(8, "0")].map(Number));
  const {{shrink, embed}} = {BOX}.network, pixels = shrink(bits.slice(0, {BITMAP**2}));
  return [[...pixels], [...embed(pixels)]];
}})"""


def page_of(tmp_path: Path) -> Path:
    """A page with nothing else."""
    path, viewport = tmp_path / "page.html", '<meta name="viewport" content="width=device-width, initial-scale=1">'
    shown = pad.PAGE.read_text(encoding="utf-8")
    path.write_text(f'<!doctype html><meta charset="utf-8">{viewport}<body>{shown}</body>', encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Window]:
    """One browser for all tests; each opens the page anew."""
    with window(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def show(browser: Window, tmp_path: Path) -> Any:
    """Opens the page and waits until the example alphabet is embedded."""

    def opened(width: int = 1280, *, touch: bool = False) -> Window:
        browser.open(page_of(tmp_path), width, touch=touch)
        browser.wait_for(f"{BOX}?.dataset.ready === ''")
        return browser

    return opened


def rounded_network() -> ConvNet:
    """The recorded network with the weights that the page has."""
    network = copy.deepcopy(pad.network())
    network.load_state_dict(as_in_the_page(network.state_dict()))
    return network.double()


def scanned(strokes: list[list[tuple[float, float]]]) -> np.ndarray:
    """What a round pen 5.2 pixels wide leaves on 105 × 105 pixels; ink is True."""
    y, x = np.mgrid[:BITMAP, :BITMAP] + 0.5
    bitmap = np.zeros((BITMAP, BITMAP), dtype=bool)
    for stroke in strokes:
        for (x0, y0), (x1, y1) in zip([stroke[0], *stroke], stroke, strict=False):
            squared = (x1 - x0) ** 2 + (y1 - y0) ** 2
            along = ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / squared if squared else 0
            along = np.clip(along, 0, 1)
            bitmap |= np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0)) <= 2.6
    return bitmap


def embedded_in(page: Window, bitmaps: np.ndarray) -> tuple[Tensor, Tensor]:
    """Pixels and embeddings that the page makes of bitmaps."""
    packed = [np.packbits(bitmap).tobytes().hex() for bitmap in bitmaps]
    pixels, embeddings = zip(*page.run(f"({EMBED})({json.dumps(packed)})"), strict=True)
    return torch.tensor(pixels).view(-1, 28, 28), torch.tensor(embeddings, dtype=torch.float64)


def check_network(page: Window, bitmaps: np.ndarray) -> None:
    """The page's pixels are the data set's, to the bit; its embeddings are PyTorch's."""
    pixels, embeddings = embedded_in(page, bitmaps)
    expected = torch.from_numpy(np.stack([omniglot._ink(~bitmap, 28) for bitmap in bitmaps]))
    assert torch.equal(pixels, expected.long())
    with torch.no_grad():
        of_torch = rounded_network()(expected[:, None].double() / 255)
    error = (embeddings - of_torch).norm(dim=1) / of_torch.norm(dim=1)
    print(f"relative error of {len(bitmaps)} embeddings: at most {error.max():.1e}")
    assert error.max() < 1e-4


def omniglot_bitmaps(characters: range) -> np.ndarray:
    """Drawings of characters of the meta-test split, `[character, drawing, y, x]`; ink is True."""
    names = sorted(Omniglot.load().split("random", seed=0, rotations=False).test.names)
    wanted = [names[i] for i in characters]
    found: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
    for part in omniglot._PARTS:
        source = omniglot._locate(None, part, False)
        with members(source, source.parent if part.inside else source) as (files, read):
            for path in sorted(files):
                if (name := path.removeprefix(part.inside).rpartition("/")[0]) in found and path.endswith(".png"):
                    found[name].append(~omniglot._bitmap(read, path))
    return np.stack([np.stack(found[name]) for name in wanted])


# --- what the page is made from ---


def test_the_page_is_up_to_date_with_the_recorded_weights() -> None:
    assert pad.PAGE.read_text(encoding="utf-8") == figures.drawn_alphabet(pad.network()) + "\n", "run `make tables`"


def test_the_page_grows_by_at_most_200_kilobytes() -> None:
    assert pad.PAGE.stat().st_size <= 200_000


def test_the_landing_page_and_the_first_chapter_show_it() -> None:
    assert ":file: _static/alphabet.html" in (ROOT / "book/index.md").read_text(encoding="utf-8")
    chapter = (ROOT / "notebooks/01_concepts.ipynb").read_text(encoding="utf-8")
    assert "figures.drawn_alphabet(" in chapter and pad.RUN in chapter


def test_a_filter_in_eight_bits_is_off_by_half_a_step_at_most() -> None:
    filters = torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(0))
    filters[3] = 0
    levels, step = eight_bits(filters)
    off = (levels * step[:, None, None, None] - filters).flatten(1).abs()
    assert (off <= 0.5001 * step[:, None]).all()
    assert levels.abs().flatten(1).amax(1).tolist() == [127] * 3 + [0] + [127] * 60


@pytest.mark.parametrize("change", [{"pooling": "stride"}, {"filters": 32}, {"hidden": (8,)}, {"n_outputs": 5}])
def test_a_network_that_the_page_cannot_compute_is_refused(change: dict[str, Any]) -> None:
    [name] = change
    with pytest.raises(ValueError, match=name):
        figures.drawn_alphabet(ConvNet(**{"pooling": "max", "normalization": "group"} | change))


# --- what it computes ---


@in_a_browser
def test_it_embeds_strokes_as_the_package_does(show: Any) -> None:
    random = np.random.default_rng(0)
    drawings = [[random.uniform(0, 105, (n, 2)).round(2).tolist() for n in random.integers(1, 5, 3)] for _ in range(12)]
    bitmaps = np.stack([scanned(strokes) for strokes in drawings])
    page = show()
    scans = page.run(f"{json.dumps(drawings)}.map((strokes) => [...{BOX}.network.scan(strokes)])")
    assert np.array_equal(np.array(scans, dtype=bool).reshape(bitmaps.shape), bitmaps)
    check_network(page, np.concatenate([bitmaps, np.zeros_like(bitmaps[:1]), np.ones_like(bitmaps[:1])]))


@in_a_browser
def test_it_adapts_the_last_layer_by_gradient_descent(show: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.rand(7, 64, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 2])
    script = f"{BOX}.network.descent({x.tolist()}, {labels.tolist()}, 3, 6, 0.3).map(({{rows, loss}}) => "
    found = show().run(script + "[rows.map((row) => [...row]), loss])")
    layer = torch.nn.Linear(64, 3).double()
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
    for rows, loss in found:
        ours = torch.cat([layer.weight, layer.bias[:, None]], 1)
        assert torch.allclose(torch.tensor(rows, dtype=torch.float64), ours, atol=1e-12)
        expected = F.cross_entropy(layer(x), labels, weight=1 / labels.bincount().double())  # classes count the same
        assert abs(expected.item() - loss) < 1e-12
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
    losses = [loss for _, loss in found]
    assert losses == sorted(losses, reverse=True)


@in_a_browser
def test_a_drawing_takes_at_most_50_milliseconds(show: Any) -> None:
    measure = f"""(() => {{ const {{scan, shrink, embed}} = {BOX}.network, times = [];
      for (let i = 0; i < 40; i++) {{
        const began = performance.now(), stroke = [[20, 20 + i], [60, 80], [85, 30]];
        embed(shrink(scan([stroke]))); times.push(performance.now() - began);
      }}
      return times.sort((a, b) => a - b)[20]; }})()"""
    milliseconds = show().run(measure)
    print(f"{milliseconds:.1f} ms a drawing")
    assert milliseconds <= 50


# --- what a visitor can do ---


def stroke(page: Window, points: list[tuple[float, float]], *, touch: bool) -> None:
    """Draw on the pad, in its own units, in steps of a hand."""
    page.run(f"{BOX}.querySelector('.pad').scrollIntoView({{block: 'center'}})")
    left, top, width = page.run(
        f"(({{x, y, width}}) => [x, y, width])({BOX}.querySelector('.pad').getBoundingClientRect())"
    )
    ends = pairwise(points)
    steps = [(a + (c - a) * i / 6, b + (d - b) * i / 6) for (a, b), (c, d) in ends for i in range(7)]
    before = page.run("scrollY")
    page.draw([(left + x * width / BITMAP, top + y * width / BITMAP) for x, y in steps], touch=touch)
    assert page.run("scrollY") == before  # a finger on the pad draws, and does not scroll


def press(page: Window, name: str) -> None:
    """A button, by its text."""
    page.run(f"{BY_NAME}{json.dumps(name)}).click()")


def state(page: Window) -> dict[str, Any]:
    """What the page says, after the frame in which it says so."""
    page.run("new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)))")
    text = f"{BOX}.querySelector('.verdict').textContent"
    wide = "document.documentElement.scrollWidth <= innerWidth"
    names = f"[...{BOX}.querySelectorAll('.character > b')].map((b) => b.textContent)"
    return page.run(f"({{...{BOX}.dataset, text: {text}, fits: {wide}, names: {names}}})")


CROSS = [[(30.0, 30.0), (75.0, 75.0)], [(75.0, 30.0), (30.0, 75.0)]]
BOWL = [[(28.0, 30.0), (32.0, 70.0), (52.0, 82.0), (72.0, 70.0), (76.0, 30.0)]]


@in_a_browser
@widths
def test_two_characters_are_drawn_and_a_third_drawing_is_recognised(show: Any, width: int, touch: bool) -> None:
    page: Window = show(width, touch=touch)
    press(page, "Start empty")
    assert state(page)["names"] == []
    for character in (CROSS, BOWL):
        for points in character:
            stroke(page, points, touch=touch)
        press(page, "Teach it as a new character")
    assert state(page)["names"] == ["A", "B"]
    places = page.run(f"[...{BOX}.querySelectorAll('.map text')].map((letter) => letter.getAttribute('x'))")
    assert len(set(places)) == 2  # the map tells them apart
    for character, letter in ((CROSS, "A"), (BOWL, "B")):
        for points in character:
            stroke(page, [(0.9 * x + 9, 0.95 * y + 0.1 * x - 4) for x, y in points], touch=touch)
        now = state(page)
        assert now["answer"] == letter and f"It’s {letter}" in now["text"] and now["fits"]
        found = json.loads(now["found"])
        assert abs(sum(found["prototypes"]) - 1) < 1e-9 and abs(sum(found["layer"]) - 1) < 1e-9
        assert F.softmax(-torch.tensor(found["distances"]), 0).argmax() == "AB".index(letter)
        press(page, f"It’s {letter}")
    assert (state(page)["asked"], json.loads(state(page)["right"])["prototypes"]) == ("2", 2)
    stroke(page, CROSS[0], touch=touch)
    press(page, "Undo")
    assert state(page)["answer"] == ""
    stroke(page, [(50.0, 50.0), (51.0, 50.0)], touch=touch)
    assert state(page)["answer"] != ""
    press(page, "Clear")
    assert state(page)["answer"] == ""
    assert page.requests == [page.run("location.href")]  # nothing else was loaded, from anywhere


@in_a_browser
def test_a_second_shot_helps(show: Any) -> None:
    page: Window = show()
    assert (state(page)["asked"], json.loads(state(page)["right"])["prototypes"]) == ("15", 12)
    assert page.run(f"{BOX}.querySelectorAll('.wrong').length") == 3
    page.run(f"{BOX}.querySelectorAll('.wrong')[2].click()")
    assert (state(page)["asked"], json.loads(state(page)["right"])["prototypes"]) == ("14", 14)
    assert json.loads(state(page)["right"])["layer"] >= 13  # two shots of one class do not drown the others
    page.run(f"[...{BOX}.querySelectorAll('.shots button.picture')].pop().click()")  # and it is taken back
    assert state(page)["asked"] == "15"
    press(page, "Start empty")
    press(page, "Back to the example")
    assert json.loads(state(page)["right"])["prototypes"] == 12


@in_a_browser
def test_more_steps_lower_the_loss(show: Any) -> None:
    page: Window = show()
    losses = []
    for steps in (0, 1, 10, 20):
        slide = f"const s = {BOX}.querySelector('input'); s.value = {steps}; s.dispatchEvent(new Event('input'));"
        page.run(f"(() => {{ {slide} }})()")
        losses.append(float(page.run(f"{BOX}.querySelector('.curve text:last-of-type').textContent").split()[-1]))
        assert f"{steps} step" in page.run(f"{BOX}.querySelector('.key').textContent")
    assert losses[0] == 1.61 and losses == sorted(losses, reverse=True)


@in_a_browser
def test_a_keyboard_is_enough(show: Any) -> None:
    page: Window = show()

    def key(name: str, text: str = "") -> None:
        page.call("Input.dispatchKeyEvent", type="keyDown", key=name, code=name, text=text)
        page.call("Input.dispatchKeyEvent", type="keyUp", key=name, code=name)

    press(page, "Start empty")  # the pad has the focus now
    press(page, "Clear")
    key(" ", " ")
    for name in ["ArrowRight"] * 5 + ["ArrowDown"] * 5:
        key(name)
    key(" ", " ")
    key("ArrowUp")
    path = page.run(f"{BOX}.querySelector('.ink').getAttribute('d')")
    assert path.startswith("M52 52L") and path.endswith("L72 72") and path.count("M") == 1
    press(page, "Teach it as a new character")
    assert state(page)["names"] == ["A"] and page.run("document.activeElement.getAttribute('class')") == "pad"
    press(page, "Draw for me")
    assert "nothing to choose" in state(page)["text"]
    key("Backspace")
    nameless = "(e) => !(e.getAttribute('aria-label') || e.textContent || e.labels?.length)"
    assert page.run(f"[...{BOX}.querySelectorAll('button, input, [role]')].filter({nameless}).length") == 0


@in_a_browser
@widths
def test_ten_characters_fit(show: Any, width: int, touch: bool) -> None:
    page: Window = show(width, touch=touch)
    for _ in range(5):
        press(page, "Draw for me")
        press(page, "Teach it as a new character")
    press(page, "Draw for me")
    assert page.run(f"{BY_NAME}'Teach it as a new character').disabled")
    for _ in range(9):
        press(page, "Draw for me")
        press(page, "It’s A")
    for _ in range(6):
        page.run(f"{BOX}.querySelector('.asked .picture').click()")
    assert state(page)["names"] == list("ABCDEFGHIJ") and state(page)["fits"]
    assert page.run(f"{BOX}.querySelectorAll('.character:first-child .picture').length") <= 12


# --- how good it is ---


@on_omniglot
def test_eight_bits_cost_nearly_nothing() -> None:
    learner = load_run(pad.RUN).learner()
    rounded = copy.deepcopy(learner)
    assert isinstance(rounded, Prototypical)
    rounded.network.load_state_dict(as_in_the_page(rounded.network.state_dict()))
    test = Omniglot.load().split("random", seed=0).test
    accuracies = [evaluate(each, test, EpisodeSpec(5, 1, 15), n_episodes=200).accuracy for each in (learner, rounded)]
    print("float32 and 8 bits:", accuracies)
    assert abs(accuracies[0] - accuracies[1]) < 0.002


@in_a_browser
@on_omniglot
def test_it_recognises_the_drawings_of_twelve_other_hands(show: Any) -> None:
    bitmaps = omniglot_bitmaps(range(0, 400, 10))[:, :13]  # 8 tasks of 5 characters, by 13 hands
    page: Window = show()
    check_network(page, bitmaps[:, 0])
    _, embeddings = embedded_in(page, bitmaps.reshape(-1, BITMAP, BITMAP))
    task = embeddings.view(8, 5, 13, -1)
    prototypes, queries = task[:, :, 0], task[:, :, 1:]
    answers = torch.cdist(queries.flatten(1, 2), prototypes).argmin(-1).view(8, 5, 12)
    right = (answers == torch.arange(5)[:, None]).double().mean((0, 1))
    print("right, of each hand:", [f"{share:.3f}" for share in right.tolist()], f"in all {right.mean():.3f}")
    assert right.mean() >= 0.9
