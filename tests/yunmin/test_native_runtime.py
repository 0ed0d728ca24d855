"""The native runtime computes what the torch network computes, and the same bits however the work is cut up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import yunmin
from tests.models import random_ids, random_pillars, random_tensors, small_config, write_model
from yunmin.checkpoint import Checkpoint
from yunmin.config import MambaConfig
from yunmin.errors import ConfigError, RequestError, ShapeError, StateError
from yunmin.quantization.layout import Format, Quantization
from yunmin.quantization.packing import pack_tensors
from yunmin.quantization.reference import network_of
from yunmin.quantization.rounding import round_tensors
from yunmin.runtime.native.runtime import NativeRuntime
from yunmin.runtime.torch_runtime import TorchRuntime
from yunmin.state import MambaState
from yunmin.threads import get_threads, run_team, set_threads

FORMATS: tuple[Format, ...] = ("none", "int8", "int4")

AWKWARD = {
    "odd widths": small_config(d_model=40).with_widths(d_inner=[72, 24], d_state=[3, 5]),
    "biases everywhere": small_config(use_bias=True),
    "no biases, untied": small_config(use_conv_bias=False, tie_word_embeddings=False),
    "one channel, one state": small_config(d_model=1).with_widths(d_inner=[1, 1], d_state=[1, 1]),
    "many states, seven taps": small_config(d_conv=7).with_widths(d_inner=[32, 48], d_state=[256, 2]),
}


def checkpoint_of(config: MambaConfig, weight_format: Format = "none", seed: int = 0) -> Checkpoint:
    tensors = random_tensors(config, seed)
    quantization = Quantization(weight_format)
    if weight_format != "none":
        tensors = pack_tensors(config, tensors, round_tensors(tensors, quantization), quantization)
    return Checkpoint(config, tensors, None, Path("nowhere"), quantization)


@pytest.fixture(autouse=True)
def _even_tiny_models_run_on_a_team(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yunmin.runtime.native.runtime._ALONE_BYTES", 0)


@pytest.fixture
def threads() -> Any:
    before = get_threads()
    yield set_threads
    set_threads(before)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("name", AWKWARD)
def test_native_logits_equal_those_of_the_torch_network(name: str, weight_format: Format) -> None:
    checkpoint = checkpoint_of(AWKWARD[name], weight_format)
    ids = random_ids(checkpoint.config, 2, 23)
    expected = TorchRuntime(network_of(checkpoint)).forward(ids)
    found = NativeRuntime(checkpoint).forward(ids)
    # a rounding to int8 that falls the other way moves an activation by a 127th of the largest one in its row
    limit = 1e-5 if weight_format == "none" else 3e-2
    assert float((found - expected).abs().max()) <= limit * float(expected.abs().max())
    typical = (found - expected).abs().median()
    assert float(typical) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("weight_format", FORMATS)
def test_steps_chunks_and_whole_sequences_give_the_same_bits(
    weight_format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = NativeRuntime(checkpoint_of(AWKWARD["odd widths"], weight_format))
    ids = random_ids(runtime.config, 1, 61)[0].tolist()
    logits, state = runtime.prefill(ids)
    assert torch.equal(runtime.forward(torch.tensor([ids]))[0, -1], logits)
    for chunk in (1, 2, 7, 60):
        monkeypatch.setattr("yunmin.runtime.native.runtime._CHUNK_ROWS", chunk)
        found, reached = runtime.prefill(ids)
        assert torch.equal(found, logits)
        assert torch.equal(reached.memory, state.memory)
    stepped = runtime.new_state(1)
    for token_id in ids:
        step_logits, stepped = runtime.step([token_id], stepped)
    assert torch.equal(step_logits[0], logits)
    assert torch.equal(stepped.memory, state.memory)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_batch_of_sixteen_gives_the_bits_of_each_sequence_alone(weight_format: Format) -> None:
    runtime = NativeRuntime(checkpoint_of(small_config(), weight_format))
    prompts = random_ids(runtime.config, 16, 9)
    states = [runtime.prefill(row.tolist())[1] for row in prompts]
    batch = runtime.new_state(16)
    for row, state in enumerate(states):
        runtime.scatter(batch, [row], state)
    for ids in random_ids(runtime.config, 5, 16, seed=1).tolist():
        together, batch = runtime.step(ids, batch)
        together = together.clone()
        for row, token_id in enumerate(ids):
            alone, states[row] = runtime.step([token_id], states[row])
            assert torch.equal(together[row], alone[0])
    assert torch.equal(batch.memory, torch.cat([state.memory for state in states]))
    whole = runtime.forward(prompts)
    assert all(torch.equal(whole[row], runtime.forward(prompts[row : row + 1])[0]) for row in range(16))


@pytest.mark.parametrize("weight_format", FORMATS)
def test_the_number_of_threads_changes_no_bit(weight_format: Format, threads: Callable[[int], None]) -> None:
    runtime = NativeRuntime(checkpoint_of(AWKWARD["odd widths"], weight_format))
    ids = random_ids(runtime.config, 3, 11)
    found = []
    for count in (1, 2, 3, 5):
        threads(count)
        found.append(runtime.forward(ids))
    assert all(torch.equal(logits, found[0]) for logits in found)


def test_little_work_is_done_by_one_thread_with_the_same_bits(
    threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(2)
    runtime = NativeRuntime(checkpoint_of(small_config()))
    ids = random_ids(runtime.config, 1, 9)[0].tolist()
    expected, _ = runtime.prefill(ids)
    sizes = []

    def run(*arguments: Any, size: int) -> None:
        sizes.append(size)
        run_team(*arguments, size=size)

    monkeypatch.setattr("yunmin.runtime.native.runtime.run_team", run)
    for limit in (0, 1 << 30):
        monkeypatch.setattr("yunmin.runtime.native.runtime._ALONE_BYTES", limit)
        assert torch.equal(runtime.prefill(ids)[0], expected)
    assert sizes == [2, 1]


def test_threads_set_while_a_step_begins_leave_its_team_as_it_is(
    threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = NativeRuntime(checkpoint_of(small_config()))
    sizes = []

    def set_then_run(kernel: Any, *arguments: Any, **options: Any) -> None:
        threads(5)
        run_team(lambda *given: sizes.append(given[-1]), **options)
        run_team(kernel, *arguments, **options)

    threads(2)
    expected, _ = runtime.step([1], runtime.new_state(1))
    monkeypatch.setattr("yunmin.runtime.native.runtime.run_team", set_then_run)
    assert torch.equal(runtime.step([1], runtime.new_state(1))[0], expected)
    assert sizes == [2, 2]  # more would work beyond the scratch memory


def test_torchs_defaults_do_not_reach_the_kernels_memory() -> None:
    checkpoint = checkpoint_of(small_config(use_conv_bias=False))
    expected = NativeRuntime(checkpoint).forward(torch.tensor([[1, 2]]))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            runtime = NativeRuntime(checkpoint)
            logits, _ = runtime.step([2], runtime.prefill([1])[1])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(logits[0], expected[0, 1])


def test_states_of_other_widths_are_refused() -> None:
    config = small_config()
    runtime = NativeRuntime(checkpoint_of(config))
    same = NativeRuntime(checkpoint_of(config, seed=1)).new_state(1)
    assert torch.equal(runtime.step([1], same)[0], runtime.step([1], runtime.new_state(1))[0])
    others = {
        r"layer 0: expected a conv state of shape \(1, 40, 3\), found \(1, 1, 3\)": {"d_inner": (1, 1)},
        r"layer 1: expected a ssm state of shape \(1, 40, 5\), found \(1, 40, 4\)": {"d_state": (5, 4)},
        r"expected states of 2 layers, found 3 and 3": {"d_inner": (40,) * 3, "d_state": (5,) * 3},
    }
    for message, widths in others.items():
        other = replace(config, **cast("Any", widths))
        for state in (NativeRuntime(checkpoint_of(other)).new_state(1), MambaState.zeros(other, 1)):
            uses: list[Callable[[], object]] = [
                lambda state=state: runtime.step([1], state),  # type: ignore[misc]
                lambda state=state: runtime.prefill([1], state),  # type: ignore[misc]
                lambda state=state: runtime.scatter(runtime.new_state(2), [1], state),  # type: ignore[misc]
            ]
            for use in uses:
                with pytest.raises(StateError, match=message):
                    use()


def test_states_travel_between_the_runtimes() -> None:
    checkpoint = checkpoint_of(AWKWARD["odd widths"])
    native, plain = NativeRuntime(checkpoint), TorchRuntime(network_of(checkpoint))
    ids = random_ids(checkpoint.config, 1, 20)[0].tolist()
    expected, _ = plain.prefill(ids)
    for first, second in ((native, plain), (plain, native)):
        _, state = first.prefill(ids[:13])
        logits, _ = second.prefill(ids[13:], state.copy())
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_prefill_leaves_its_state_alone_and_step_writes_over_it() -> None:
    runtime = NativeRuntime(checkpoint_of(small_config()))
    _, state = runtime.prefill([1, 2, 3])
    before = state.memory.clone()
    runtime.prefill([4, 5], state)
    assert torch.equal(state.memory, before)
    _, stepped = runtime.step([4], state)
    assert stepped.memory.data_ptr() == state.memory.data_ptr()
    assert not torch.equal(stepped.memory, before)


def test_gathered_rows_are_copies_that_may_repeat() -> None:
    runtime = NativeRuntime(checkpoint_of(small_config()))
    pool = runtime.new_state(3)
    runtime.scatter(pool, [2, 0], runtime.gather(runtime.prefill([1, 2])[1], [0, 0]))
    taken = runtime.gather(pool, [0, 2, 2, 1])
    assert torch.equal(taken.memory[0], taken.memory[2])
    assert not taken.memory[3].any()
    runtime.step([1, 1, 1, 1], taken)
    assert torch.equal(pool.memory[0], runtime.prefill([1, 2])[1].memory[0])


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_reaches_the_logits_of_its_own_row_only(weight_format: Format, poison: float) -> None:
    runtime = NativeRuntime(checkpoint_of(small_config(), weight_format))
    state = runtime.new_state(2)
    state.ssm[0][1, 3, 2] = poison
    logits, state = runtime.step([5, 5], state)
    assert bool(logits[0].isfinite().all())
    assert bool(logits[1].isnan().all())
    alone = runtime.step([5], runtime.new_state(1))[0][0]
    assert torch.equal(logits[0], alone)
    after, _ = runtime.step([5, 5], runtime.new_state(2))  # in the memory that held it
    assert torch.equal(after, torch.stack([alone, alone]))


def test_zero_weights_and_tiny_activations_give_finite_logits() -> None:
    for factor in (0.0, 1e-30, 1e-38):
        tensors = {name: t * factor if "norm" in name else t for name, t in random_tensors(small_config()).items()}
        quantization = Quantization("int8")
        packed = pack_tensors(small_config(), tensors, round_tensors(tensors, quantization), quantization)
        runtime = NativeRuntime(Checkpoint(small_config(), packed, None, Path("nowhere"), quantization))
        assert bool(runtime.prefill([1, 2, 3])[0].isfinite().all())


def test_wrong_shapes_are_refused_and_an_empty_batch_is_not() -> None:
    runtime = NativeRuntime(checkpoint_of(small_config()))
    with pytest.raises(ShapeError, match="at least one token"):
        runtime.prefill([])
    with pytest.raises(ShapeError, match="tokens of 2 sequences and the states of 1"):
        runtime.step([1, 2], runtime.new_state(1))
    for token_id in (-1, runtime.config.vocab_size):
        with pytest.raises(RequestError, match="token_ids: must lie in"):
            runtime.prefill([1, token_id])
    wrong: tuple[Tensor, ...] = (torch.ones(1, 3), torch.ones(3, dtype=torch.int64))
    for ids in wrong:
        with pytest.raises(ShapeError, match=r"forward: expected ids \(B, L\), got"):
            runtime.forward(ids)
    logits, _ = runtime.step([], runtime.new_state(0))
    assert logits.shape == (0, runtime.config.vocab_size)
    assert runtime.forward(torch.empty(0, 4, dtype=torch.int64)).shape == (0, 4, runtime.config.vocab_size)


def test_quantized_weights_are_used_where_they_lie() -> None:
    checkpoint = checkpoint_of(small_config(), "int8")
    runtime = NativeRuntime(checkpoint)
    kept = {t.data_ptr() for t in runtime._weights.kept}
    assert all(t.data_ptr() in kept for name, t in checkpoint.tensors.items() if name.endswith(".int8"))


@pytest.mark.parametrize("weight_format", FORMATS)
def test_weight_bytes_count_a_tied_head_once(weight_format: Format) -> None:
    config = small_config(vocab_size=304, tie_word_embeddings=True)
    untied = replace(config, tie_word_embeddings=False)
    tied_bytes, untied_bytes = (NativeRuntime(checkpoint_of(c, weight_format)).weight_bytes for c in (config, untied))
    assert untied_bytes - tied_bytes == 304 * (4 * 24 if weight_format == "none" else 24 + 4)


def test_load_chooses_the_native_runtime_on_a_cpu_and_refuses_what_it_cannot_run(tmp_path: Path) -> None:
    config = small_config()
    plain = write_model(tmp_path / "plain", config)
    trained = write_model(tmp_path / "trained", config, pillars=random_pillars(config))
    assert yunmin.load(plain, device="cpu").runtime.name == "native"
    assert yunmin.load(plain, runtime="torch").runtime.name == "torch"
    assert yunmin.load(trained, device="cpu").runtime.name == "torch"
    with pytest.raises(ConfigError, match="export it first"):
        yunmin.load(trained, runtime="native")
    with pytest.raises(ConfigError, match="runs on the CPU, not on 'cuda'"):
        yunmin.load(plain, device="cuda", runtime="native")
    with pytest.raises(ConfigError, match="got 'fast'"):
        yunmin.load(plain, runtime=cast("Any", "fast"))


def test_both_runtimes_of_one_folder_have_one_fingerprint(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "plain")
    native, plain = (yunmin.load(folder, device="cpu", runtime=name) for name in ("native", "torch"))
    snapshot = native.snapshot([1, 2, 3])
    native.save_state(tmp_path / "state.safetensors", snapshot)
    restored = plain.load_state(tmp_path / "state.safetensors")
    expected = native.generate(snapshot, max_tokens=6, temperature=0)
    assert plain.generate(restored, max_tokens=6, temperature=0).token_ids == expected.token_ids
    assert native.generate(snapshot, max_tokens=6, temperature=0) == expected  # the snapshot was not written over


@pytest.mark.parametrize("length", [1, 2, 64])
def test_equal_widths_with_other_depths_share_compiled_code(length: int) -> None:
    config = replace(small_config(), d_inner=(64,) * 3, d_state=(16,) * 3)
    checkpoint = checkpoint_of(config)
    ids: Tensor = random_ids(config, 1, length)
    expected = TorchRuntime(network_of(checkpoint)).forward(ids)
    torch.testing.assert_close(NativeRuntime(checkpoint).forward(ids), expected, rtol=0, atol=1e-5)
