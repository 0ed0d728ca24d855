"""Mamba language models, from fine-tuning to production.

Example:
    model = yunmin.load("artifact/")
    print(model.generate("def main(", max_tokens=64, temperature=0.8).text)
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yunmin.language_model import LanguageModel, load
    from yunmin.state import MambaState, Snapshot

__version__ = "0.1.0"
__all__ = ["LanguageModel", "MambaState", "Snapshot", "__version__", "load"]

# By default torch's threads spin for milliseconds after each operation and keep the cores from whatever runs next:
# native kernels, other processes. torch reads the choice when it is imported, hence this place; `yunmin.threads` takes
# it back, so that programs started later choose for themselves.
_chose_to_wait = "torch" not in sys.modules and not os.environ.keys() & {
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
}
if _chose_to_wait:
    os.environ["OMP_WAIT_POLICY"] = "passive"

_HOMES = {
    "LanguageModel": "yunmin.language_model",
    "load": "yunmin.language_model",
    "MambaState": "yunmin.state",
    "Snapshot": "yunmin.state",
}


def __getattr__(name: str) -> Any:
    """Imports the API at first use, so that `yunmin --help` does not wait for torch."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'yunmin' has no attribute {name!r}")
