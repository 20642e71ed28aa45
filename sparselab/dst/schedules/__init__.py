"""When something happens, and how much of it."""
