"""torch's threads wait without spinning where nobody has chosen otherwise, and only in processes that import yunmin."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("code", "chosen", "while_importing"),
    [
        ("import yunmin", {}, "passive"),
        ("import yunmin", {"OMP_WAIT_POLICY": "active"}, "active"),
        ("import yunmin", {"GOMP_SPINCOUNT": "100"}, None),
        ("import torch, yunmin", {}, None),
    ],
)
def test_the_wait_policy_is_chosen_for_torch_and_then_taken_back(
    code: str, chosen: dict[str, str], while_importing: str | None
) -> None:
    show = "print(os.environ.get('OMP_WAIT_POLICY'))"
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    result = subprocess.run(
        [sys.executable, "-c", f"import os; {code}; {show}; import yunmin.threads; {show}"],
        env=inherited | chosen,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert result.stdout.split() == [str(while_importing), str(chosen.get("OMP_WAIT_POLICY"))]
