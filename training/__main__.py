"""`python -m training` is `yunmin train`."""

from __future__ import annotations

import sys

from training.cli import main
from yunmin.cli import run

if __name__ == "__main__":
    sys.exit(run(main))
