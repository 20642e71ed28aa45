"""Command lines of the examples: what ``--set name=value`` means, and checks of numbers."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

Config = TypeVar("Config", bound=Any)


def at_least_one(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {value}")
    return number


def changed(cfg: Config, settings: Sequence[str]) -> Config:
    """`cfg` with each ``name=value`` applied, the value read as the type the field has."""
    for setting in settings:
        name, _, value = setting.partition("=")
        names = [field.name for field in dataclasses.fields(cfg)]
        if name not in names:
            raise SystemExit(f"--set {setting}: no setting {name!r}; expected one of {', '.join(names)}")
        kind = type(getattr(cfg, name))
        try:
            cfg = dataclasses.replace(cfg, **{name: kind(value)})
        except ValueError:
            raise SystemExit(f"--set {setting}: expected {name}=<{kind.__name__}>, got {value!r}") from None
    return cfg


def configured(description: str | None, cfg: Config, quick: Config, options: Sequence[str] | None) -> Config:
    """What a command line of ``--quick`` and ``--set name=value`` asks for: `cfg` or `quick`, changed."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a small run: shows that it runs, not that it learns"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting")
    args = parser.parse_args(options)
    return changed(quick if args.quick else cfg, args.set)
