"""Measures fusedrnn beside torch.nn and other implementations."""

from pathlib import Path

#: Where results are written when ``--out`` does not name a folder.
DEFAULT_FOLDER = Path(__file__).parent / "results" / "local"


class UserError(ValueError):
    """An error that the user can correct; the message is one sentence."""
