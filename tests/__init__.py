"""The package's tests; and how shapes and types are checked while they run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_checked: dict[tuple[str, str, str], Callable[..., Any]] = {}


def typechecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype for jaxtyping (see `addopts` in `pyproject.toml`), which writes its checks once per signature.

    A function inside another one is defined anew at every call. To write its checks anew each time took half of all
    tests' time.
    """
    signature = function.__module__, function.__qualname__, str(inspect.signature(function))
    if signature not in _checked:
        _checked[signature] = _check(function)
    return _checked[signature]
