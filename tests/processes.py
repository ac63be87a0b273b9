"""New Python processes, in which Triton compiles."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def python(
    *arguments: object, cwd: Path = ROOT, **variables: str | None
) -> subprocess.CompletedProcess[str]:
    """Runs Python with the checkout on its path; a variable that is None is not set."""
    own = {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": None} | variables
    environment = {k: v for k, v in (os.environ | own).items() if v is not None}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
