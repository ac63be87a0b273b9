"""A mark for tests that need more than torch, triton, numpy and pytest."""

import importlib.util

import pytest


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skips a test, which imports them itself, where one of these packages is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
