"""The checks of the book can fail: each is shown something wrong."""

from __future__ import annotations

import pytest
import sources


def test_toc_files_are_found_at_every_depth() -> None:
    toc = "root: a\nparts:\n- chapters:\n  - file: b\n    sections:\n    - file: c\n"
    assert sources.toc_files(toc) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "text",
    [
        "![](plot.png)",
        "```{figure} plot.png\n:name: fig\n\nA caption.\n```\n",
        ":::{image} plot.png\n:::\n",
        '<img src="plot.png">',
        '<img src="plot.png" alt="">',
        '<svg viewBox="0 0 1 1">',
    ],
)
def test_a_picture_without_text_is_found(text: str) -> None:
    assert sources.pictures_without_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "![A line.](plot.png)",
        "```{figure} plot.png\n:alt: A line.\n\nA caption.\n```\n",
        ":::{image} plot.png\n---\nalt: A line.\n---\n:::\n",
        '<img alt="A line." src="plot.png">',
        '<svg role="img" aria-label="A line.">',
    ],
)
def test_a_picture_with_text_passes(text: str) -> None:
    assert not sources.pictures_without_text(text)


def test_citations_and_their_keys() -> None:
    assert sources.cited_keys("{cite}`a` {cite:p}`b, c` {cite:t}`d`") == {"a", "b", "c", "d"}
    assert sources.bibliography_keys("@article{a,\n year={1}}\n@misc{a,\n}\n") == ["a", "a"]


def test_terms_and_the_glossary() -> None:
    page = "# G\n```{glossary}\n:sorted:\n\ntask\nepisode\n  What {term}`way` means.\n```\nelse\n"
    assert sources.glossary_terms(page) == {"task", "episode"}
    assert sources.used_terms("{term}`task` {term}`many tasks <task>` {term}`way`") == {"task", "way"}


@pytest.mark.parametrize("place", ["work", "home", "root", "Users"])
def test_a_machine_path_is_found(place: str) -> None:
    assert sources.machine_paths(f"see /{place}/someone/data")
    assert not sources.machine_paths(f"see https://example.org/{place}/someone and ~/{place}/x and ./{place}/x")


def test_imports_are_found_inside_functions() -> None:
    code = "import a.b\nfrom c.d import e\nfrom . import f\ndef g():\n    import h\n"
    assert sources.imported_packages(code) == {"a", "c", "h"}
