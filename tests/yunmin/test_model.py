"""The network equals `transformers`' own, and itself in whatever way a sequence is fed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import hf_model, random_ids, random_model, random_tensors, small_config
from yunmin.axes import expected_shapes
from yunmin.checkpoint import load_checkpoint
from yunmin.config import MambaConfig
from yunmin.errors import CheckpointError, ShapeError
from yunmin.model import MambaLM
from yunmin.state import MambaState

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"use_bias": True},
    "no_conv_bias": {"use_conv_bias": False, "use_bias": True},
    "state_8": {"state_size": 8},
    "state_11": {"state_size": 11, "tie_word_embeddings": False},
    "state_24": {"state_size": 24, "use_bias": True},
    "rank_explicit": {"time_step_rank": 7},
    "expand_3": {"expand": 3, "use_bias": True},
    "taps_3": {"conv_kernel": 3},
    "taps_2": {"conv_kernel": 2, "state_size": 11, "use_bias": True, "tie_word_embeddings": False},
    "odd_widths": {"hidden_size": 18, "intermediate_size": 37, "state_size": 5, "num_hidden_layers": 3},
    "half_residual": {"residual_in_fp32": False, "rescale_prenorm_residual": True},
}
MASKS = [
    [1, 1, 1, 1, 1, 1, 1, 1, 1],
    [0, 0, 0, 1, 1, 1, 1, 1, 1],
    [1, 1, 1, 1, 1, 0, 0, 0, 0],
    [0, 1, 0, 0, 1, 1, 0, 1, 0],
    [0, 0, 0, 0, 1, 0, 0, 0, 0],
]


def ours_and_theirs(seed: int = 0, **options: Any) -> tuple[MambaLM, Any]:
    theirs = hf_model(seed, **options)
    config = MambaConfig.from_dict(theirs.config.to_dict())
    tensors = {name: t for name, t in theirs.state_dict().items() if name in expected_shapes(config)}
    return MambaLM.from_tensors(config, tensors), theirs


def assert_states_equal(a: MambaState, b: MambaState, tolerance: float) -> None:
    for mine, other in zip(a.conv + a.ssm, b.conv + b.ssm, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str) -> None:
    ours, theirs = ours_and_theirs(**VARIANTS[variant])
    for length in (1, 2, 7, 65):
        ids = random_ids(ours.config, 2, length, seed=length)
        with torch.no_grad():
            expected = theirs(ids).logits
            assert expected.abs().max() > 1  # a test on nearly constant logits would show nothing
            torch.testing.assert_close(ours(ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", ["plain", "biases", "odd_widths"])
def test_gradients_equal_transformers(variant: str) -> None:
    ours, theirs = ours_and_theirs(**VARIANTS[variant])
    ids = random_ids(ours.config, 2, 7)
    weight = torch.randn(2, 7, ours.config.vocab_size, generator=torch.Generator().manual_seed(1))
    for model in (ours, theirs):
        output = model(ids)
        (weight * (output if isinstance(output, Tensor) else output.logits)).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        scale = float(expected[name].grad.abs().max())
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0, atol=1e-5 * max(1.0, scale))


@pytest.mark.parametrize("variant", ["plain", "biases", "taps_2", "state_11"])
def test_padded_rows_equal_the_same_rows_alone_in_transformers(variant: str) -> None:
    ours, theirs = ours_and_theirs(**VARIANTS[variant])
    mask = torch.tensor(MASKS)
    ids = random_ids(ours.config, *mask.shape)
    with torch.no_grad():
        logits = ours(ids, mask)
        last, _ = ours.prefill(ids, attention_mask=mask)
        for row, real in enumerate(mask.bool()):
            expected = theirs(ids[row : row + 1, real]).logits[0]
            torch.testing.assert_close(logits[row, real], expected, rtol=0, atol=1e-4)
            torch.testing.assert_close(last[row], expected[-1], rtol=0, atol=1e-4)
            assert not logits[row, ~real].any()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padded_batches_equal_transformers_padded_batches_where_it_masks_exactly(padding: str) -> None:
    # Without biases its masked inputs stay zero; the conv bias must go, too, or its own padding leaks into the state.
    ours, theirs = ours_and_theirs(use_bias=False, use_conv_bias=False)
    lengths = torch.tensor([9, 4, 1])
    real = torch.arange(9) < lengths[:, None]
    mask = (real if padding == "right" else real.flip(1)).long()
    ids = random_ids(ours.config, 3, 9)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
        torch.testing.assert_close(ours(ids, mask)[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_logits_equal_transformers_at_the_130m_shape() -> None:
    shape = {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24, "time_step_rank": 48}
    _, theirs = ours_and_theirs(**shape)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("dt_proj.bias"):
                parameter -= 3  # step sizes as in trained models; 24 layers would amplify rounding of larger ones
    config = MambaConfig.from_dict(theirs.config.to_dict())
    ours = MambaLM.from_tensors(config, {n: theirs.state_dict()[n] for n in expected_shapes(config)})
    ids = random_ids(ours.config, 1, 12)
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours(ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", ["uniform", "ragged"])
def test_step_by_step_chunked_and_whole_are_equal(dtype: torch.dtype, variant: str) -> None:
    widths = {"d_inner": (40, 24, 33), "d_state": (5, 8, 3)} if variant == "ragged" else {}
    model = random_model(small_config(**widths), dtype=dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    ids = random_ids(model.config, 3, 13)
    with torch.no_grad():
        whole = model(ids)
        last, end = model.prefill(ids)
        torch.testing.assert_close(last, whole[:, -1], rtol=0, atol=tolerance)
        state = model.new_state(3)
        for position in range(13):
            logits, state = model.step(ids[:, position], state)
            torch.testing.assert_close(logits, whole[:, position], rtol=0, atol=tolerance)
        assert_states_equal(state, end, tolerance)
        for chunks in ([1, 12], [2, 1, 1, 9], [7, 6]):
            state, begin = model.new_state(3), 0
            for chunk in chunks:
                logits, state = model.prefill(ids[:, begin : begin + chunk], state)
                begin += chunk
                torch.testing.assert_close(logits, whole[:, begin - 1], rtol=0, atol=tolerance)
            assert_states_equal(state, end, tolerance)


@pytest.mark.parametrize("variant", ["plain", "biases"])
def test_steps_equal_transformers_cached_steps(variant: str) -> None:
    ours, theirs = ours_and_theirs(**VARIANTS[variant])
    ids = random_ids(ours.config, 2, 9)
    with torch.no_grad():
        output = theirs(ids[:, :5], use_cache=True)
        logits, state = ours.prefill(ids[:, :5])
        for position in range(5, 9):
            step = {"cache_params": output.cache_params, "use_cache": True}
            output = theirs(ids[:, position : position + 1], **step)
            logits, state = ours.step(ids[:, position], state)
            torch.testing.assert_close(logits, output.logits[:, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("carried", [False, True])
def test_padding_never_reaches_the_state(carried: bool) -> None:
    model = random_model(dtype=torch.float64)
    mask = torch.tensor(MASKS)
    ids = random_ids(model.config, *mask.shape)
    other_padding = torch.where(mask.bool(), ids, (ids + 17) % model.config.n_tokens)
    with torch.no_grad():
        start = model.prefill(random_ids(model.config, len(MASKS), 6, seed=9))[1] if carried else None
        before = None if start is None else start.copy()
        logits, state = model.prefill(ids, start, mask)
        again, state_again = model.prefill(other_padding, start, mask)
        assert torch.equal(logits, again)
        assert all(map(torch.equal, state.conv + state.ssm, state_again.conv + state_again.ssm))
        for row, real in enumerate(mask.bool()):
            alone, alone_state = model.prefill(ids[row : row + 1, real], None if start is None else start.gather([row]))
            torch.testing.assert_close(logits[row], alone[0], rtol=0, atol=1e-12)
            assert_states_equal(state.gather([row]), alone_state, 1e-12)
        if start is not None and before is not None:
            assert all(map(torch.equal, start.conv + start.ssm, before.conv + before.ssm))  # not modified


def test_gradients_do_not_pass_through_padding() -> None:
    model = random_model(dtype=torch.float64)
    ids = random_ids(model.config, 1, 6)
    padded = torch.cat([torch.full((1, 3), 299), ids, torch.full((1, 2), 298)], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 6 + [0] * 2])
    model(padded, mask)[:, 3:9].square().sum().backward()
    with_padding = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model(ids).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(with_padding[name], parameter.grad, rtol=0, atol=1e-9)


def test_a_row_of_padding_alone_gives_zero_logits_and_no_nan() -> None:
    model = random_model()
    logits = model(random_ids(model.config, 2, 4), torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]))
    assert not logits[1].any()
    assert torch.isfinite(logits).all()


def test_the_state_holds_no_more_memory_than_its_size() -> None:
    model = random_model()
    for mask in (None, torch.ones(2, 50)):
        with torch.no_grad():
            _, state = model.prefill(random_ids(model.config, 2, 50), attention_mask=mask)
        for tensor in state.conv + state.ssm:
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_empty_batches_and_sequences_are_computed() -> None:
    model = random_model()
    assert model(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 300)
    assert model(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, 300)
    logits, state = model.prefill(torch.zeros(0, 3, dtype=torch.int64), attention_mask=torch.ones(0, 3))
    assert (logits.shape, state.batch_size) == ((0, 300), 0)


@pytest.mark.parametrize(
    ("ids", "rows", "mask", "named"),
    [
        ((2, 0), None, None, "input_ids has no tokens"),
        ((2, 3), 3, None, "input_ids has 2 rows, the state has 3"),
        ((2, 3), None, [[1, 1, 1], [0, 0, 0]], "a row of attention_mask has no real token"),
        ((2, 3), None, [[1, 1]], "attention_mask has shape"),
    ],
)
def test_impossible_shapes_are_refused(
    ids: tuple[int, int], rows: int | None, mask: Sequence[Sequence[int]] | None, named: str
) -> None:
    model = random_model()
    state = None if rows is None else model.new_state(rows)
    with pytest.raises(ShapeError, match=named):
        model.prefill(torch.zeros(ids, dtype=torch.int64), state, None if mask is None else torch.tensor(mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_full_precision_and_keeps_a_wide_state(dtype: torch.dtype) -> None:
    model = random_model()
    ids = random_ids(model.config, 2, 9)
    with torch.no_grad():
        exact = model(ids)
        half = random_model().to(dtype)
        logits, state = half.prefill(ids)
        assert (logits.dtype, state.ssm[0].dtype, state.conv[0].dtype) == (dtype, torch.float32, torch.float32)
        assert (logits.float() - exact[:, -1]).norm() < 0.1 * exact[:, -1].norm()


def test_autocast_leaves_the_scan_in_float32() -> None:
    model = random_model()
    ids = random_ids(model.config, 2, 9)
    with torch.no_grad():
        exact = model(ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids)
    assert (logits.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("tied", [True, False])
def test_from_tensors_owns_copies_and_gives_them_back(tied: bool) -> None:
    config = small_config(tie_word_embeddings=tied)
    tensors = random_tensors(config)
    kept = {name: t.clone() for name, t in tensors.items()}
    model = MambaLM.from_tensors(config, tensors)
    assert (model.lm_head.weight is model.backbone.embeddings.weight) is tied
    for parameter in model.parameters():
        parameter.data.zero_()
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)
    model = MambaLM.from_tensors(config, tensors)
    assert list(model.tensors()) == list(expected_shapes(config))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.tensors().items())
    assert not model.training


@pytest.mark.parametrize(
    ("name", "tensor", "named"),
    [
        ("backbone.layers.1.mixer.A_log", None, "tensor 'backbone.layers.1.mixer.A_log' is missing"),
        ("backbone.layers.0.mixer.D", torch.zeros(3), r"expected shape \(40,\), found \(3,\)"),
        ("backbone.layers.2.mixer.D", torch.zeros(40), "unexpected tensor 'backbone.layers.2.mixer.D'"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name: str, tensor: Tensor | None, named: str) -> None:
    tensors = random_tensors(small_config())
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    with pytest.raises(CheckpointError, match=named):
        MambaLM.from_tensors(small_config(), tensors)


def test_a_fresh_model_follows_mambas_initialization() -> None:
    config = MambaConfig.create(vocab_size=50, d_model=32, n_layers=2, d_state=6, use_bias=True)
    model = MambaLM.initialized(config, torch.Generator().manual_seed(3))
    again = MambaLM.initialized(config, torch.Generator().manual_seed(3))
    assert all(map(torch.equal, model.tensors().values(), again.tensors().values()))
    for layer in range(2):
        tensors = {n.rpartition("mixer.")[2]: t for n, t in model.tensors().items() if f"layers.{layer}.mixer" in n}
        assert torch.equal(tensors["A_log"].exp().round(), torch.arange(1.0, 7.0).expand(64, 6))
        assert tensors["D"].eq(1).all()
        step = torch.nn.functional.softplus(tensors["dt_proj.bias"])
        assert 1e-3 * 0.999 <= float(step.min()) <= float(step.max()) <= 1e-1 * 1.001
        assert not tensors["in_proj.bias"].any()
        assert tensors["dt_proj.weight"].abs().max() <= 2**-0.5
    assert abs(float(model.tensors()["backbone.embeddings.weight"].std()) - 0.1) < 0.01


def test_folders_of_transformers_load_with_equal_logits(tmp_path: Path) -> None:
    theirs = hf_model(use_bias=True)
    theirs.save_pretrained(tmp_path / "single")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    ids = torch.arange(9)[None]
    with torch.no_grad():
        expected = theirs(ids).logits
        for name in ("single", "sharded"):
            checkpoint = load_checkpoint(tmp_path / name)
            ours = MambaLM.from_tensors(checkpoint.config, checkpoint.tensors)
            torch.testing.assert_close(ours(ids), expected, rtol=0, atol=1e-4)
