"""The pad on which a reader draws a character once: it computes the package's model, and a hand can use it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import redraw as recorded
import torch
from browser import BROWSER, Window, window

from metatutor.applications.generation import ConditionalVAE, ink, placed
from metatutor.book import figures
from metatutor.book.figures.redraw import as_in_the_page, packed, script

in_a_browser = pytest.mark.skipif(not BROWSER, reason="needs Chromium or Chrome")
BOX = "document.querySelector('[id^=redraw-]')"


def model() -> ConditionalVAE:
    torch.manual_seed(0)
    made = ConditionalVAE(latent=5, width=8)
    for name, parameter in made.named_parameters():
        if name.startswith(("prior.last", "decoder.spread")):
            parameter.data *= 3  # so that it matters which numbers are drawn
    made.places.copy_(torch.tensor([0.2, 0.3, 0.1, 0.05, 0.15, 0.12]))
    return made


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Window]:
    """A page as in the built book, with the weights in a file of their own."""
    for name in ("notebooks", "_static", "profile"):
        (tmp_path / name).mkdir()
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    shown = f'<!doctype html><meta charset="utf-8">{viewport}<body>{figures.drawn_again(model())}</body>'
    (tmp_path / "notebooks/page.html").write_text(shown, encoding="utf-8")
    (tmp_path / "_static/redraw.js").write_text(script(model()), encoding="utf-8")
    with window(tmp_path / "profile") as opened:
        opened.open(tmp_path / "notebooks/page.html", 390, touch=True)
        yield opened


def test_the_weights_are_those_of_the_recorded_model_and_at_most_a_megabyte() -> None:
    assert recorded.SCRIPT.read_text(encoding="utf-8") == script(recorded.model()), "run `make tables`"
    assert recorded.SCRIPT.stat().st_size <= 1_000_000


def test_weights_in_eight_bits_are_close() -> None:
    exact, rounded = dict(model().named_parameters()), as_in_the_page(dict(model().named_parameters()))
    assert exact.keys() == rounded.keys()
    for name, weight in exact.items():
        assert (rounded[name] - weight).abs().max() <= weight.abs().max() / 200
        assert torch.equal(rounded[name], weight) == name.endswith("bias")


def test_where_somebody_sits_at_the_kernel_the_weights_come_along(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packed(model()) not in figures.drawn_again(model())
    monkeypatch.setattr("metatutor.book.figures.redraw.live", lambda: True)
    shown = figures.drawn_again(model())
    assert packed(model()) in shown and "_static" not in shown


@in_a_browser
def test_it_draws_what_the_package_draws(page: Window) -> None:
    rounded = model().double()
    rounded.load_state_dict(as_in_the_page(model().state_dict()))
    generator = torch.Generator().manual_seed(0)
    drawing = ink(torch.rand(1, 1, 28, 28, generator=generator, dtype=torch.float64))
    noise = torch.randn(3, 5 + 6, generator=generator, dtype=torch.float64)
    context = rounded.context(drawing)
    page.run(f"{BOX}.network.unpack({json.dumps(packed(model()))})")
    for heat, back in ((0.6, 0.8), (0.0, 1.0), (1.3, 0.0)):  # heat² + back² = 1, or all is left as it is
        logits = rounded.decoder(rounded.prior(context).at(heat * noise[:, :5]), context.expand(3, -1, -1, -1))
        expected = placed(logits, back * rounded.places * noise[:, 5:]).sigmoid().flatten(1).detach()
        call = f"{BOX}.network.redrawn(Float64Array.from({drawing.flatten().tolist()}), {noise.tolist()}, {heat})"
        found = torch.tensor(page.run(f"{call}.map((drawn) => [...drawn])"), dtype=torch.float64)
        assert expected.std(0).mean() > 1e-3
        assert (found - expected).abs().max() < 1e-4


@in_a_browser
def test_a_hand_draws_and_the_weights_are_loaded_then(page: Window) -> None:
    shades = (
        f"[...{BOX}.querySelectorAll('canvas')].map((c) => [...c.getContext('2d').getImageData(0, 0, 28, 28).data])"
    )
    assert page.requests == [page.run("location.href")]
    assert {tuple(shade) for shade in page.run(shades)} == {(255,) * (4 * 784)}
    page.run(f"{BOX}.querySelector('.pad').scrollIntoView({{block: 'center'}})")
    left, top = page.run(f"(({{x, y}}) => [x, y])({BOX}.querySelector('.pad').getBoundingClientRect())")
    page.draw([(left + 60 + 10 * i, top + 60 + 8 * i) for i in range(12)], touch=True)
    page.wait_for(f"{BOX}.dataset.ready === ''")
    assert [address.rpartition("/")[2] for address in page.requests] == ["page.html", "redraw.js"]
    first = page.run(shades)
    assert len({tuple(shade) for shade in first}) == 12
    page.run(f"{BOX}.querySelector('.more').click()")
    second = page.run(shades)
    assert second != first
    page.run(
        f"(() => {{ const h = {BOX}.querySelector('input'); h.value = 0; h.dispatchEvent(new Event('input')); }})()"
    )
    assert page.run(shades) != second
    page.run(f"{BOX}.querySelector('.undo').click()")
    assert {tuple(shade) for shade in page.run(shades)} == {(255,) * (4 * 784)}
    page.run(f"{BOX}.querySelector('.for-me').click()")
    assert "twelve" in page.run(f"{BOX}.querySelector('.state').textContent")
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    nameless = "(e) => !(e.getAttribute('aria-label') || e.textContent || e.labels?.length)"
    assert page.run(f"[...{BOX}.querySelectorAll('button, input, [role]')].filter({nameless}).length") == 0


@in_a_browser
def test_a_keyboard_is_enough(page: Window) -> None:
    page.run(f"{BOX}.querySelector('.pad').focus()")
    for name in (" ", *["ArrowRight"] * 5, "ArrowDown", " "):
        page.call("Input.dispatchKeyEvent", type="keyDown", key=name, code=name, text=name if name == " " else "")
    assert page.run(f"{BOX}.querySelector('.ink').getAttribute('d')").startswith("M52 52L")
    page.wait_for(f"{BOX}.dataset.ready === ''")
