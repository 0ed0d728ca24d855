"""The onnx runtime's states are as good as any: in whatever mode torch is, copied, pickled, and by row."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch

from tests.models import small_config
from tests.onnx_artifacts import onnx_runtime_of, write_onnx_artifact
from yunmin.runtime.onnx_runtime import OnnxRuntime
from yunmin.state import MambaState


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> OnnxRuntime:
    return onnx_runtime_of(write_onnx_artifact(tmp_path_factory.mktemp("onnx") / "artifact", small_config()))


@pytest.mark.parametrize(
    ("made", "used"), [(torch.inference_mode, torch.enable_grad), (torch.enable_grad, torch.inference_mode)]
)
def test_states_made_in_one_mode_of_torch_are_used_in_another(
    runtime: OnnxRuntime,
    made: Callable[[], AbstractContextManager[object]],
    used: Callable[[], AbstractContextManager[object]],
) -> None:
    def history(
        first: Callable[[], AbstractContextManager[object]], then: Callable[[], AbstractContextManager[object]]
    ) -> MambaState:
        with first():
            state = runtime.new_state(4)
            runtime.step([1, 2, 3, 4], state)
            runtime.step([5, 6], state.first_rows(2))  # the others are on the other side
        with then():
            runtime.scatter(state, [0], runtime.prefill([9])[1])
            assert len(state.copy().conv) == 2
            runtime.step([1, 2, 3, 4], state)
            return runtime.gather(state, [0, 1, 2, 3])

    expected, found = history(torch.no_grad, torch.no_grad), history(made, used)
    assert all(map(torch.equal, found.conv + found.ssm, expected.conv + expected.ssm))


def test_states_that_autograd_follows_are_taken_by_value(runtime: OnnxRuntime) -> None:
    source = MambaState.zeros(runtime.config, 1)
    for tensor in source.ssm:
        tensor.requires_grad_()
    pool = runtime.new_state(2)
    runtime.scatter(pool, [1], source)
    _, after = runtime.step([1, 2], pool)
    assert not any(tensor.requires_grad for tensor in after.conv + after.ssm)


@pytest.mark.parametrize("row", [-1, 3])
def test_rows_that_there_are_not_are_refused(runtime: OnnxRuntime, row: int) -> None:
    pool = runtime.new_state(5).first_rows(3)
    for use in (lambda: pool.gather([0, row]), lambda: pool.scatter_([row], runtime.new_state(1))):
        with pytest.raises(IndexError, match=rf"row {row}: expected one of 0\.\.2"):
            use()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
def test_states_that_have_stepped_can_be_duplicated(
    runtime: OnnxRuntime, duplicate: Callable[[MambaState], MambaState]
) -> None:
    _, state = runtime.prefill([1, 2])
    for token_id in (3, 4, 5):
        runtime.step([token_id], state)
    expected = state.copy()
    twin = duplicate(state)
    assert all(map(torch.equal, twin.conv + twin.ssm, expected.conv + expected.ssm))
    assert torch.equal(runtime.step([6], twin)[0], runtime.step([6], expected)[0])
