"""The house rules that neither ruff nor import-linter knows: docstrings, examples that run, no global generator."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import metatutor
from metatutor import double_backward

PACKAGE = Path(metatutor.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def name_of(path: Path) -> str:
    """`metatutor/data/omniglot.py` -> `metatutor.data.omniglot`."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): tree for path, tree in TREES.items()}
MODULE_NAMES = sorted(MODULES)


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere in a file, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            assert node.module
            if node.module == "metatutor":
                yield from (f"metatutor.{alias.name}" for alias in node.names)
            else:
                yield node.module


# --- rooms ----------------------------------------------------------------------------------------------------


def test_only_figures_draw():
    drawing = {name for name, tree in MODULES.items() if any(i.startswith("matplotlib") for i in imports(tree))}
    assert drawing and all(name.startswith("metatutor.book.figures") for name in drawing)


# --- anti-patterns ---------------------------------------------------------------------------------------------


def test_no_seed_for_the_global_generator():
    """Unless it is put back afterwards."""
    for name, tree in MODULES.items():
        forked = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.With) and "fork_rng" in ast.unparse(node.items[0])
            for inner in ast.walk(node)
        }
        seeding = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.manual_seed"]
        assert all(id(node) in forked for node in seeding), name


def test_a_convolution_is_not_written_twice():
    """No second layer library: whatever has parameters and convolves is in the networks' modules."""
    for name, tree in MODULES.items():
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        assert not [c.name for c in classes if re.fullmatch(r"Meta(Conv|Linear|BatchNorm|Module|Sequential).*", c.name)]
        if name not in ("metatutor.backbones", "metatutor.efficientnet", "metatutor.double_backward"):
            assert not [n for n in ast.walk(tree) if isinstance(n, ast.Call) and "conv2d" in ast.unparse(n.func)], name


# --- docstrings ------------------------------------------------------------------------------------------------


def public(body: list[ast.stmt]) -> list[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in body if isinstance(node, (ast.ClassDef, *FUNCTIONS)) and not node.name.startswith("_")]


def summary(documented: ast.AST) -> str:
    """The first paragraph of a docstring, as one line."""
    assert isinstance(documented, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    return " ".join((ast.get_docstring(documented) or "").split("\n\n")[0].split())


def sections(docstring: str) -> dict[str, str]:
    """`Args`, `Returns`, … by name."""
    parts = re.split(r"^([A-Z]\w+):$", docstring, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def is_overload_or_setter(node: ast.AST) -> bool:
    return any(ast.unparse(d).endswith(("overload", ".setter")) for d in getattr(node, "decorator_list", []))


@pytest.mark.parametrize("module", MODULE_NAMES)
def test_every_public_name_says_what_it_is(module: str):
    tree = MODULES[module]
    assert summary(tree).endswith((".", ":")), f"{module} begins with a sentence"
    for node in public(tree.body):
        assert summary(node).endswith("."), f"{module}.{node.name} begins with a sentence"
        if isinstance(node, ast.ClassDef):
            for method in public(node.body):
                if not is_overload_or_setter(method):
                    assert summary(method).endswith("."), f"{module}.{node.name}.{method.name} is a sentence"


EXPORTED = [name for name in metatutor.__all__ if inspect.isclass(value := getattr(metatutor, name)) or callable(value)]


def test_all_is_what_it_says():
    assert sorted(metatutor.__all__, key=str.lower) == sorted(set(metatutor.__all__), key=str.lower)
    assert all(hasattr(metatutor, name) for name in metatutor.__all__)


@pytest.mark.parametrize("name", EXPORTED)
def test_every_argument_of_an_exported_name_is_explained(name: str):
    exported = getattr(metatutor, name)
    constructor = exported.__init__ if inspect.isclass(exported) else exported
    if constructor is torch.nn.Module.__init__:
        return
    parameters = [p for p in inspect.signature(constructor).parameters if p != "self" and not p.startswith("_")]
    explained = sections(inspect.cleandoc(exported.__doc__ or "")).get("Args", "")
    assert [p for p in parameters if not re.search(rf"(^|,) *{p}\b.*:", explained, re.MULTILINE)] == []


def of_any_shape(function: Callable[..., Any]) -> list[str]:
    """Arguments that are tensors whose annotation says no shape; `return` among them."""
    annotations = {name: str(annotation).split("|") for name, annotation in inspect.get_annotations(function).items()}
    return [name for name, kinds in annotations.items() if "Tensor" in {kind.strip() for kind in kinds}]


def functions_of(exported: Any) -> dict[str, Callable[..., Any]]:
    """An exported function, or the constructor and public methods of an exported class."""
    if not inspect.isclass(exported):
        return {exported.__name__: exported}
    members = {name: getattr(value, "fget", None) or value for name, value in vars(exported).items()}
    members = {name: getattr(value, "__func__", value) for name, value in members.items()}
    shown = {name: value for name, value in members.items() if name == "__init__" or not name.startswith("_")}
    return {name: value for name, value in shown.items() if inspect.isfunction(value)}


@pytest.mark.parametrize("name", EXPORTED)
def test_what_takes_or_returns_tensors_says_their_shapes(name: str):
    exported = getattr(metatutor, name)
    for method, function in functions_of(exported).items():
        documented = exported if method == "__init__" else function
        if tensors := of_any_shape(function):
            assert re.search(r"\[\w[\w ,.*]*\]|scalar", documented.__doc__ or ""), f"{name}.{method}: {tensors}"


def test_a_shape_that_is_not_said_is_found():
    def scaled(images: Tensor, by: Float[Tensor, " task"], also: Tensor | None = None) -> Tensor: ...

    assert of_any_shape(scaled) == ["images", "also", "return"]


@pytest.mark.parametrize("module", MODULE_NAMES)
def test_examples_run_on_a_machine_without_data(
    module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("METATUTOR_DATA", raising=False)
    monkeypatch.setenv("METATUTOR_CACHE", str(tmp_path))
    monkeypatch.setenv("METATUTOR_OMNIGLOT_URL", "http://127.0.0.1:9/nothing")  # no example may need the network
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failed, _ = doctest.testmod(importlib.import_module(module), optionflags=flags)
    assert failed == 0, capsys.readouterr().out


# --- the tests themselves --------------------------------------------------------------------------------------


def test_shapes_are_checked_at_run_time():
    with pytest.raises(jaxtyping.TypeCheckError):
        double_backward.conv2d(torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 3, 3))  # two channels, one channel
