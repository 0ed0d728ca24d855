"""What each process of a small team does: runs of every kind, one after the other, in the folder it is given."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from tests.training.runs import small_run
from training.records import NoScreen
from training.run import resume, train

EQUAL: dict[str, Any] = {"peft_dropout": 0.0, "checkpoint_interval": 9}
CUT: dict[str, Any] = {
    "gate_ranking": "activation",
    "channel_gates": "channel",
    "state_ranking": "activation",
    "scan_objective": "auto",
    "scan_gradient_weighted": False,
    "adapter_parameters": 900,
    "importance_steps": 2,
    "gradient_accumulation": 2,
    "gradient_checkpointing": True,
}


def main(folder: Path) -> None:
    train(small_run(folder / "copies", **EQUAL))
    train(small_run(folder / "shards", **EQUAL, sharding="full"))
    train(small_run(folder / "cut", **EQUAL | CUT))
    train(small_run(folder / "cut-shards", **EQUAL | CUT, sharding="full"))
    for name in ("alone", "alone-shards"):  # begun by one process, up to the middle of the gate phase
        resume(folder / name / "run", ["sharding=full"] if name == "alone-shards" else [])
    train(small_run(folder / "last", **EQUAL, sharding="full", enable_peft=False, recover_share=0))
    _interrupt_the_second_after(8)
    stopped = train(small_run(folder / "stopped", **EQUAL, sharding="full"))
    assert stopped.interrupted
    assert stopped.steps == 8


def _interrupt_the_second_after(step: int) -> None:
    """Signals the process that shows nothing, while it does its given step."""
    if os.environ["RANK"] == "1":

        def interrupt(_screen: NoScreen, done: int, *_: object) -> None:
            if done == step:
                signal.raise_signal(signal.SIGINT)

        NoScreen.advance = interrupt  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
