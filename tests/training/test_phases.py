"""The plan of phases over a run's steps."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from training.config_file import parse_config
from training.phases import Phase, plan_phases
from yunmin.errors import ConfigError


def test_phases_cover_all_steps_in_order() -> None:
    config = parse_config({})
    for total in (4, 7, 100, 1001):
        spans = plan_phases(config, total)
        assert [s.phase for s in spans] == list(Phase)
        assert spans[0].start == 0
        assert spans[-1].stop == total
        assert all(a.stop == b.start and a.stop > a.start for a, b in itertools.pairwise(spans))
    assert (spans[0].progress(spans[0].start), spans[0].progress(spans[0].stop - 1)) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"enable_masking": False}, [Phase.DENSE, Phase.ADAPTERS]),
        ({"enable_peft": False}, [Phase.DENSE, Phase.GATES, Phase.RECOVER]),
        ({"enable_masking": False, "enable_peft": False}, [Phase.DENSE]),
        ({"dense_share": 0.0, "recover_share": 0.0}, [Phase.GATES, Phase.ADAPTERS]),
    ],
)
def test_disabled_pillars_have_no_phase(options: dict[str, Any], expected: list[Phase]) -> None:
    spans = plan_phases(parse_config(options), 50)
    assert [s.phase for s in spans] == expected
    assert spans[-1].stop == 50


@pytest.mark.parametrize(
    ("options", "total", "message"),
    [
        ({}, 3, "3 steps cannot hold the 4 phases"),
        ({"gate_share": 0.0}, 100, "gate_share"),
        ({"adapter_share": 0.0}, 100, "adapter_share"),
        ({"dense_share": 0.0, "enable_masking": False, "enable_peft": False}, 100, "dense_share"),
    ],
)
def test_impossible_plans_are_refused(options: dict[str, Any], total: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_phases(parse_config(options), total)
