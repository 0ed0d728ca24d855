"""The onnx runtime computes what the torch network computes, however the work is cut up, and copies no state."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import onnxruntime
import pytest
import torch
from torch import Tensor

import yunmin
from export.onnx_graph.emit import GraphOptions
from export.onnx_graph.weights import reference_checkpoint
from tests.models import random_ids, small_config
from tests.onnx_artifacts import checkpoint_of, onnx_runtime_of, write_onnx_artifact
from yunmin.config import MambaConfig
from yunmin.errors import ArtifactError, RequestError, ShapeError, StateError
from yunmin.model import MambaLM
from yunmin.runtime.onnx_contract import Flavour
from yunmin.runtime.onnx_runtime import OnnxRuntime
from yunmin.runtime.onnx_session import Binding
from yunmin.runtime.onnx_state import OnnxState
from yunmin.runtime.torch_runtime import TorchRuntime
from yunmin.state import MambaState

AWKWARD = {
    "odd widths": small_config(d_model=40).with_widths(d_inner=[72, 24], d_state=[3, 5]),
    "no biases, untied": small_config(use_conv_bias=False, use_bias=False),
    "tied": small_config(tie_word_embeddings=True),
    "one channel, one state": small_config(d_model=1).with_widths(d_inner=[1, 1], d_state=[1, 1]),
    "many states, seven taps": small_config(d_conv=7).with_widths(d_inner=[32, 48], d_state=[64, 2]),
}
SAME = 1e-4  # of the largest logit


def torch_runtime_of(folder: Path) -> TorchRuntime:
    checkpoint = checkpoint_of(folder)
    return TorchRuntime(MambaLM.from_tensors(checkpoint.config, checkpoint.tensors))


def require_same(found: Tensor, expected: Tensor, share: float = SAME) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= share * float(expected.abs().max())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx_artifact(tmp_path_factory.mktemp("onnx") / "artifact", AWKWARD["odd widths"])


@pytest.fixture(scope="module")
def runtime(folder: Path) -> OnnxRuntime:
    return onnx_runtime_of(folder)


@pytest.fixture(scope="module")
def plain(folder: Path) -> TorchRuntime:
    return torch_runtime_of(folder)


@pytest.mark.parametrize("flavour", ["ort", "portable"])
@pytest.mark.parametrize("name", AWKWARD)
def test_logits_and_states_equal_those_of_the_torch_network(tmp_path: Path, name: str, flavour: Flavour) -> None:
    folder = write_onnx_artifact(tmp_path / "artifact", AWKWARD[name], GraphOptions(flavour))
    runtime, plain = onnx_runtime_of(folder), torch_runtime_of(folder)
    for batch, length in ((1, 1), (3, 2), (1, 7), (2, 65)):
        ids = random_ids(runtime.config, batch, length, seed=length)
        require_same(runtime.forward(ids), plain.forward(ids))
    expected, reached = plain.prefill(ids[0].tolist())
    logits, state = runtime.prefill(ids[0].tolist())
    require_same(logits, expected)
    for mine, theirs in zip(state.conv + state.ssm, reached.conv + reached.ssm, strict=True):
        require_same(mine, theirs)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_other_precisions_compute_what_their_weights_stand_for(tmp_path: Path, precision: Any) -> None:
    config = small_config(d_model=64).with_widths(d_inner=[96, 64])
    folder = write_onnx_artifact(tmp_path / "artifact", config, GraphOptions(precision=precision))
    reference = reference_checkpoint(checkpoint_of(folder), precision)
    plain = TorchRuntime(MambaLM.from_tensors(config, reference.tensors))
    runtime, ids = onnx_runtime_of(folder), random_ids(config, 3, 9)
    found, expected = runtime.forward(ids), plain.forward(ids)
    # products of integers round activations, and narrow layers average little of it out
    require_same(found, expected, SAME if precision == "fp16" else 0.1)
    assert float((found - expected).abs().median()) <= 5e-3 * float(expected.abs().max())


def test_steps_chunks_and_whole_sequences_agree(runtime: OnnxRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(runtime.config, 1, 61)
    whole = runtime.forward(ids)[0]
    for chunk in (1, 2, 7, 60, 61):
        monkeypatch.setattr("yunmin.runtime.onnx_runtime._CHUNK_ROWS", chunk)
        require_same(runtime.prefill(ids[0].tolist())[0], whole[-1])
        require_same(runtime.score(ids[0].tolist())[0], whole)
        require_same(runtime.forward(ids.view(1, 61).expand(3, 61)), whole.expand(3, -1, -1))
    state = runtime.new_state(1)
    for position, token_id in enumerate(ids[0].tolist()):
        logits, state = runtime.step([token_id], state)
        require_same(logits[0], whole[position])


def test_a_batch_that_sequences_join_and_leave_equals_each_alone(runtime: OnnxRuntime) -> None:
    """As an engine does it: the first so many rows of one memory step, and whoever leaves gives its row to the last."""
    pool, names, alone = runtime.new_state(5), cast("list[int]", []), cast("dict[int, MambaState]", {})
    for turn in range(40):
        if turn % 3 == 0 and len(names) < 5:
            prompt = random_ids(runtime.config, 1, 1 + turn, seed=turn)[0].tolist()
            _, state = runtime.prefill(prompt)
            runtime.scatter(pool, [len(names)], state)
            alone[turn] = state
            names.append(turn)
        if turn % 5 == 4:
            gone, last = turn % len(names), len(names) - 1
            runtime.scatter(pool, [gone], runtime.gather(pool, [last]))
            names[gone] = names[last]
            names.pop()
        if turn == 17:  # some wait while others go on
            runtime.step([1], pool.first_rows(1))
            alone[names[0]] = runtime.step([1], alone[names[0]])[1]
        ids = [(13 * turn + row) % runtime.config.n_tokens for row in range(len(names))]
        rows = pool.first_rows(len(names))
        logits, after = runtime.step(ids, rows)
        assert after is rows
        for row, (name, token_id) in enumerate(zip(names, ids, strict=True)):
            expected, alone[name] = runtime.step([token_id], alone[name])
            require_same(logits[row], expected[0])
    require_same(runtime.gather(pool, [2, 0]).ssm[1], torch.cat([alone[names[row]].ssm[1] for row in (2, 0)]))


def test_steps_take_turns_between_two_places_and_copy_nothing(
    runtime: OnnxRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = runtime.new_state(3)
    for _ in range(2):
        runtime.step([1, 2, 3], state)
    places = []

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a state was copied, or bound anew")

    with monkeypatch.context() as watched:
        watched.setattr("yunmin.runtime.onnx_session.Binding", refuse)
        for name in ("index_copy_", "copy_", "clone", "to"):
            watched.setattr(torch.Tensor, name, refuse)
        for _ in range(4):
            _, after = runtime.step([1, 2, 3], state)
            assert after is state
            places.append([tensor.data_ptr() for tensor in state.tensors()])
    assert places[0] == places[2] != places[1] == places[3]


def test_rows_that_others_left_behind_are_brought_along(runtime: OnnxRuntime, plain: TorchRuntime) -> None:
    """A step of the first row leaves it on the other side of the memory than the rest."""
    state, expected = runtime.new_state(3), [plain.new_state(1) for _ in range(3)]
    for count in (3, 1, 3, 2, 2, 1, 3, 2, 3):
        logits, _ = runtime.step([7, 8, 9][:count], state.first_rows(count))
        for row in range(count):
            wanted, expected[row] = plain.step([7 + row], expected[row])
            require_same(logits[row], wanted[0])
    runtime.step([4], state.first_rows(1))
    _, expected[0] = plain.step([4], expected[0])
    copy = state.copy()
    for row in range(3):
        for mine, theirs in zip(copy.ssm + copy.conv, expected[row].ssm + expected[row].conv, strict=True):
            require_same(mine[row], theirs[0])


def test_logits_outlive_the_next_step(runtime: OnnxRuntime) -> None:
    state = runtime.new_state(1)
    logits, state = runtime.step([1], state)
    before = logits.clone()
    for token_id in (2, 3):
        _, state = runtime.step([token_id], state)
    assert torch.equal(logits, before)


def test_prefill_leaves_its_state_alone_and_step_writes_over_it(runtime: OnnxRuntime) -> None:
    _, state = runtime.prefill([1, 2, 3])
    before = state.copy()
    expected, _ = runtime.prefill([4, 5], state)
    assert all(map(torch.equal, state.conv + state.ssm, before.conv + before.ssm))
    for _ in range(2):
        _, stepped = runtime.step([4], state)
        assert stepped is state
    assert not torch.equal(state.ssm[0], before.ssm[0])
    assert torch.equal(runtime.prefill([4, 5], before)[0], expected)


def test_gathered_rows_are_copies_that_may_repeat(runtime: OnnxRuntime) -> None:
    pool = runtime.new_state(3)
    _, read = runtime.prefill([1, 2])
    runtime.scatter(pool, [2, 0], runtime.gather(read, [0, 0]))
    taken = runtime.gather(pool, [0, 2, 2, 1])
    assert torch.equal(taken.ssm[0][0], taken.ssm[0][2])
    assert not taken.ssm[1][3].any()
    for _ in range(2):
        runtime.step([1, 1, 1, 1], taken)
    assert torch.equal(pool.ssm[0][0], read.ssm[0][0])


def test_states_travel_between_the_runtimes(folder: Path, runtime: OnnxRuntime) -> None:
    others = [yunmin.load(folder, device="cpu", runtime=name).runtime for name in ("native", "torch", "onnx")]
    ids = random_ids(runtime.config, 1, 20)[0].tolist()
    expected, _ = others[1].prefill(ids)
    for other in others:
        for first, second in ((runtime, other), (other, runtime)):
            _, state = first.prefill(ids[:13])
            require_same(second.prefill(ids[13:], state)[0], expected)
            pool = second.new_state(2)
            second.scatter(pool, [1], state)
            _, after = second.step([ids[13]], second.gather(pool, [1]))
            require_same(second.prefill(ids[14:], after)[0], expected)
            _, after = second.step([ids[13]], state.copy())
            assert type(after) is type(second.new_state(1))


def test_nbytes_count_one_sequence_whatever_has_happened_to_it(runtime: OnnxRuntime) -> None:
    state = runtime.new_state(2)
    expected = MambaState.zeros(runtime.config, 2).nbytes
    assert state.nbytes == expected
    runtime.step([1, 2], state)
    assert state.nbytes == expected == sum(tensor.nbytes for tensor in state.conv + state.ssm)
    assert state.first_rows(1).nbytes == expected // 2


def test_states_of_other_widths_are_refused(runtime: OnnxRuntime) -> None:
    config = runtime.config
    others: dict[str, dict[str, Any]] = {
        r"layer 0: expected a conv state of shape \(1, 72, 3\), found \(1, 1, 3\)": {"d_inner": (1, 1)},
        r"layer 1: expected a ssm state of shape \(1, 24, 5\), found \(1, 24, 4\)": {"d_state": (3, 4)},
        r"expected states of 2 layers, found 3 and 3": {"d_inner": (72, 24, 24), "d_state": (3, 5, 5)},
    }
    for message, widths in others.items():
        state = MambaState.zeros(replace(config, **widths), 1)
        uses: list[Callable[[], object]] = [
            lambda state=state: runtime.step([1], state),  # type: ignore[misc]
            lambda state=state: runtime.prefill([1], state),  # type: ignore[misc]
            lambda state=state: runtime.scatter(runtime.new_state(2), [1], state),  # type: ignore[misc]
        ]
        for use in uses:
            with pytest.raises(StateError, match=message):
                use()


def test_wrong_shapes_and_ids_are_refused_and_an_empty_batch_is_not(runtime: OnnxRuntime) -> None:
    for read in (runtime.prefill, runtime.score):
        with pytest.raises(ShapeError, match="at least one token"):
            read([])
        with pytest.raises(ShapeError, match="expected the state of one sequence, got 2"):
            read([1], runtime.new_state(2))
    with pytest.raises(ShapeError, match="tokens of 2 sequences and the states of 1"):
        runtime.step([1, 2], runtime.new_state(1))
    for token_id in (-1, runtime.config.vocab_size):
        uses: tuple[Callable[[], object], ...] = (
            lambda token_id=token_id: runtime.prefill([1, token_id]),  # type: ignore[misc]
            lambda token_id=token_id: runtime.step([token_id], runtime.new_state(1)),  # type: ignore[misc]
            lambda token_id=token_id: runtime.forward(torch.tensor([[token_id]])),  # type: ignore[misc]
        )
        for use in uses:
            with pytest.raises(RequestError, match=r"token_ids: must lie in 0\.\.299"):
                use()
    for ids in (torch.ones(1, 3), torch.ones(3, dtype=torch.int64)):
        with pytest.raises(ShapeError, match=r"forward: expected ids \(B, L\), got"):
            runtime.forward(ids)
    logits, _ = runtime.step([], runtime.new_state(0))
    assert logits.shape == (0, runtime.config.vocab_size)
    assert runtime.forward(torch.empty(0, 4, dtype=torch.int64)).shape == (0, 4, runtime.config.vocab_size)


def test_a_step_that_fails_leaves_the_states_as_they_were(
    runtime: OnnxRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, state = runtime.prefill([1, 2])
    expected, _ = runtime.step([3], state.copy())

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(Binding, "run", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            runtime.step([3], state)
    assert torch.equal(runtime.step([3], state)[0], expected)


def test_threads_share_a_runtime(runtime: OnnxRuntime) -> None:
    def generated(seed: int) -> Tensor:
        logits, state = runtime.prefill([seed, 5, 9])
        for _ in range(20):
            logits, state = runtime.step([int(logits.argmax())], state)
        return logits[0]

    expected = [generated(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert all(map(torch.equal, pool.map(generated, range(4)), expected))


def test_torchs_defaults_do_not_reach_the_graphs_memory(runtime: OnnxRuntime) -> None:
    expected = runtime.forward(torch.tensor([[1, 2]]))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            _, state = runtime.prefill([1])
            pool = runtime.new_state(2)
            runtime.scatter(pool, [1], state)
            logits, _ = runtime.step([2], runtime.gather(pool, [1]))
    finally:
        torch.set_default_dtype(torch.float32)
    require_same(logits[0], expected[0, 1])


def test_weight_bytes_count_a_tied_head_once_and_int8_a_quarter(tmp_path: Path) -> None:
    config = MambaConfig.create(vocab_size=4096, d_model=64, n_layers=1)
    found = {}
    for name, tied, precision in (("tied", True, "fp32"), ("untied", False, "fp32"), ("int8", True, "int8")):
        options = GraphOptions(precision=cast("Any", precision))
        folder = write_onnx_artifact(tmp_path / name, replace(config, tie_word_embeddings=tied), options)
        found[name] = onnx_runtime_of(folder).weight_bytes
    assert abs(found["untied"] - found["tied"] - 4096 * 64 * 4) < 4096
    assert found["int8"] < 0.35 * found["tied"]


def test_weights_of_their_own_file_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.onnx_graph.external.EXTERNAL_BYTES", 0)
    folder = write_onnx_artifact(tmp_path / "artifact", small_config())
    ids = random_ids(small_config(), 2, 7)
    require_same(onnx_runtime_of(folder).forward(ids), torch_runtime_of(folder).forward(ids))
    data = folder / "onnx/model.onnx.data"
    data.write_bytes(b"\1" + data.read_bytes()[1:])
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data: wrong hash"):
        yunmin.load(folder, runtime="onnx")


@pytest.mark.gpu
def test_cuda_computes_what_the_cpu_computes(folder: Path, runtime: OnnxRuntime) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    model = yunmin.load(folder, device="cuda", runtime="onnx")
    ids = random_ids(model.config, 2, 40)
    require_same(model.runtime.forward(ids).cpu(), runtime.forward(ids))
    logits, state = model.runtime.prefill(ids[0].tolist())
    expected, before = runtime.prefill(ids[0].tolist())
    require_same(logits.cpu(), expected)
    pool = model.runtime.new_state(3)
    model.runtime.scatter(pool, [0, 1], model.runtime.gather(state, [0, 0]))
    for _ in range(4):
        logits, rows = model.runtime.step([5, 6], pool.first_rows(2))
        assert isinstance(rows, OnnxState)
    expected, _ = runtime.step([5], runtime.step([5], runtime.step([5], runtime.step([5], before)[1])[1])[1])
    require_same(logits[:1].cpu(), expected)
