"""Which of the libraries are there; the cases of those that are get into the table on import."""

from __future__ import annotations

from importlib import import_module

from tests.models import vision  # noqa: F401

LIBRARIES = "transformers", "timm", "torchvision"


def missing() -> dict[str, str]:
    """Why a library cannot be used here, by its name."""
    found: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            import_module(name)
        # A torchvision built for another torch raises RuntimeError.
        except (ImportError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    if "transformers" not in found:
        for module in ("text", "images"):
            import_module(f"tests.models.{module}")
    return found
