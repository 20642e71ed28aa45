"""The programs, by topic; importing this registers them all."""

from tests.hazards.programs import arrays, first_hour, forks, kinds, loops, misuse, operators

__all__ = ["arrays", "first_hour", "forks", "kinds", "loops", "misuse", "operators"]
