"""Checks of arguments: every error names the argument, what it must be and what it is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def check_sizes(**sizes: int | None) -> None:
    """Raise a `ValueError` if a size is given that is not a positive integer."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size}")


def check_positive(**numbers: float | None) -> None:
    """Raise a `ValueError` if a number is given that is not positive."""
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise ValueError(f"{name} must be positive, got {number}")


def check_not_negative(**numbers: float) -> None:
    """Raise a `ValueError` if a number is negative."""
    for name, number in numbers.items():
        if not number >= 0:
            raise ValueError(f"{name} must not be negative, got {number}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a `ValueError` if an argument is not one of the choices.

    Example:
        >>> check_choice("adapt", "tail", ["all", "head"])
        Traceback (most recent call last):
        ValueError: adapt must be 'all' or 'head', got 'tail'
    """
    if value not in choices:
        *most, last = map(repr, choices)
        raise ValueError(f"{name} must be {', '.join(most)} or {last}, got {value!r}")


def check_simulated(parameter: Tensor) -> None:
    """Raise a `ValueError` if a policy is not on the CPU, where the worlds are that it acts in."""
    if parameter.device.type != "cpu":
        raise ValueError(
            f"the policy is on {parameter.device}, but worlds are simulated on the CPU; train with device='cpu', or "
            "move it there with .cpu()"
        )
