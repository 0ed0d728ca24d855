"""Every backend of the scan equals the loop it is defined by, forward and backward."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch
from torch import Tensor

from yunmin import scan
from yunmin.errors import ConfigError, MissingExtraError, ShapeError
from yunmin.kernels import chunked
from yunmin.kernels.chunked import chunked_scan
from yunmin.kernels.reference import reference_scan
from yunmin.scan import carried_convolution, causal_conv1d, choose_backend, gated_scan, selective_scan, use_backend

SHAPES = [(2, 1, 3, 4), (1, 2, 5, 1), (3, 7, 4, 5), (2, 65, 3, 2), (2, 130, 5, 3), (2, 0, 3, 4), (0, 4, 3, 2)]


def scan_inputs(batch: int, length: int, inner: int, n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """u, delta, A, B, C and a carried state, all random and all taking gradients."""
    rng = torch.Generator().manual_seed(length + 7 * n)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    tensors = [
        randn(batch, length, inner),
        torch.nn.functional.softplus(randn(batch, length, inner)),
        -torch.exp(randn(inner, n)),
        randn(batch, length, n),
        randn(batch, length, n),
        randn(batch, inner, n),
    ]
    return [t.to(dtype).requires_grad_() for t in tensors]


def gradients(run: object, inputs: list[Tensor]) -> list[Tensor]:
    y, last_state = run(*inputs)  # type: ignore[operator]
    rng = torch.Generator().manual_seed(5)
    loss = sum((t * torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t)).sum() for t in (y, last_state))
    return list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("work_numbers", [1, 40, 1 << 20])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunked_scan_equals_reference(
    shape: tuple[int, int, int, int], work_numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "_WORK_NUMBERS", work_numbers)
    inputs = scan_inputs(*shape)
    for mine, expected in zip(chunked_scan(*inputs), reference_scan(*inputs), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    for mine, expected in zip(gradients(chunked_scan, inputs), gradients(reference_scan, inputs), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("work_numbers", [1, 30])
def test_chunked_scan_passes_gradcheck(work_numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_WORK_NUMBERS", work_numbers)
    assert torch.autograd.gradcheck(chunked_scan, scan_inputs(2, 5, 3, 2))


@pytest.mark.parametrize("output", [0, 1])
def test_gradients_of_one_output_alone_are_right(output: int) -> None:
    inputs = scan_inputs(2, 70, 3, 2)
    for run in (chunked_scan, reference_scan):
        result = run(*inputs)[output].square().sum()
        grads = torch.autograd.grad(result, inputs, allow_unused=True)
        filled = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True)]
        if run is chunked_scan:
            mine = filled
    for a, b in zip(mine, filled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_steps_of_any_size_neither_overflow_nor_give_nan() -> None:
    u, delta, A, B_ssm, C_ssm, state = (t.detach() for t in scan_inputs(2, 9, 3, 4, torch.float32))
    for size in (0.0, 1e-30, 1e4, 1e30):
        arguments = [u, torch.full_like(delta, size) / max(size, 1.0), A * max(size, 1.0), B_ssm, C_ssm, state]
        inputs = [t.requires_grad_() for t in arguments]
        y, last_state = chunked_scan(*inputs)
        expected, expected_state = reference_scan(*inputs)
        assert torch.isfinite(y).all()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(last_state, expected_state)
        assert all(torch.isfinite(g).all() for g in gradients(chunked_scan, inputs))


def test_a_step_of_zero_keeps_the_state_bit_for_bit() -> None:
    u, delta, A, B_ssm, C_ssm, state = (t.detach() for t in scan_inputs(2, 9, 3, 4, torch.float32))
    _, last_state = chunked_scan(u, torch.zeros_like(delta), A, B_ssm, C_ssm, state)
    assert torch.equal(last_state, state)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["reference", "chunked", "native"])
def test_a_bad_number_shows_from_its_position_on_and_not_before(bad: float, backend: str) -> None:
    u, delta, A, B_ssm, C_ssm, state = (t.detach() for t in scan_inputs(1, 9, 3, 4, torch.float32))
    u[0, 4, 1] = bad
    with use_backend(backend):
        y, last_state = selective_scan(u, delta, A, B_ssm, C_ssm, torch.ones(3), state)
    assert torch.isfinite(y[:, :4]).all()
    assert not torch.isfinite(y[:, 4:, 1]).any()
    assert torch.isfinite(y[:, :, [0, 2]]).all()
    assert not torch.isfinite(last_state[:, 1]).any()


def test_memory_kept_for_the_backward_is_linear_in_length() -> None:
    def kept_bytes(length: int) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        inputs = scan_inputs(2, length, 8, 16, torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            kept = chunked_scan(*inputs)
        del kept
        return sum(sizes.values())

    short, long = kept_bytes(256), kept_bytes(1024)
    assert long < 4.1 * short
    states_of_every_position = 4 * 1024 * 2 * 8 * 16
    assert long < states_of_every_position / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "chunked", "native"])
def test_selective_scan_computes_the_skip_and_keeps_the_inputs_dtype(dtype: torch.dtype, backend: str) -> None:
    u, delta, A, B_ssm, C_ssm, state = (t.detach() for t in scan_inputs(2, 7, 3, 4))
    D_skip = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    expected = reference_scan(u, delta, A, B_ssm, C_ssm, state)[0] + D_skip * u
    wide = torch.promote_types(dtype, torch.float32)
    narrow = [t.to(dtype) for t in (u, delta)]
    with use_backend(backend):
        y, last_state = selective_scan(
            narrow[0], narrow[1], A.to(wide), B_ssm.to(dtype), C_ssm.to(dtype), D_skip, state.to(wide)
        )
    assert (y.dtype, last_state.dtype) == (dtype, wide)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.2}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["delta", "A", "B_ssm", "C_ssm", "D_skip", "state"])
def test_a_wrong_width_is_refused_by_name(name: str) -> None:
    u, delta, A, B_ssm, C_ssm, state = (t.detach() for t in scan_inputs(2, 7, 3, 4))
    arguments = {"u": u, "delta": delta, "A": A, "B_ssm": B_ssm, "C_ssm": C_ssm, "D_skip": u[0, 0], "state": state}
    arguments[name] = torch.cat([arguments[name]] * 2)
    if name == "A":
        arguments[name] = A[:2]
    with pytest.raises(ShapeError, match=f"selective_scan: {name} has shape .*, expected"):
        selective_scan(**arguments)


@pytest.mark.parametrize("backend", ["chunked", "native"])
@pytest.mark.parametrize("taps", [2, 3, 4, 7])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_convolution_equals_torchs_and_continues_from_carried_inputs(
    taps: int, has_bias: bool, backend: str
) -> None:
    rng = torch.Generator().manual_seed(taps)
    x = torch.randn(2, 9, 5, generator=rng, dtype=torch.float64)
    weight = torch.randn(5, taps, generator=rng, dtype=torch.float64)
    bias = torch.randn(5, generator=rng, dtype=torch.float64) if has_bias else None
    whole = torch.nn.functional.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=taps - 1, groups=5)
    expected = torch.nn.functional.silu(whole[..., :9]).transpose(1, 2)
    state = torch.zeros(2, 5, taps - 1, dtype=torch.float64)
    for begin, end in ((0, 1), (1, 1), (1, 6), (6, 9)):
        with use_backend(backend):
            y, inputs = causal_conv1d(x[:, begin:end], weight, bias, state)
            same, next_state = carried_convolution(x[:, begin:end], weight, bias, state)
        torch.testing.assert_close(y, expected[:, begin:end], rtol=0, atol=1e-12)
        assert torch.equal(same, y)
        state = inputs[:, inputs.shape[1] - (taps - 1) :].transpose(1, 2)
        assert torch.equal(next_state, state)


@pytest.mark.parametrize("taps", [2, 4, 7])
def test_the_next_inputs_of_a_padded_row_are_those_of_the_row_alone(taps: int) -> None:
    rng = torch.Generator().manual_seed(taps)
    x, state = torch.randn(4, 5, 3, generator=rng), torch.randn(4, 3, taps - 1, generator=rng)
    weight, lengths = torch.randn(3, taps, generator=rng), torch.tensor([0, 1, 4, 5])
    _, together = carried_convolution(x, weight, None, state, lengths)
    for row, length in enumerate(lengths.tolist()):
        part = slice(row, row + 1)
        _, alone = carried_convolution(x[part, :length], weight, None, state[part])
        assert torch.equal(together[part], alone)
    _, unmoved = carried_convolution(x[:, :0], weight, None, state, torch.zeros(4, dtype=torch.int64))
    assert torch.equal(unmoved, state)


@pytest.mark.parametrize("name", ["raw_delta", "z", "lengths"])
def test_a_wrong_width_of_the_gated_scan_is_refused_by_name(name: str) -> None:
    u, delta, A, B_ssm, C_ssm, state = (t.detach() for t in scan_inputs(2, 7, 3, 4))
    own = {"raw_delta": delta, "z": u, "lengths": torch.tensor([7, 7])}
    own[name] = torch.cat([own[name]] * 2)
    with pytest.raises(ShapeError, match=f"gated_scan: {name} has shape .*, expected"):
        gated_scan(u=u, A=A, B_ssm=B_ssm, C_ssm=C_ssm, D_skip=u[0, 0], state=state, **own)


@pytest.mark.parametrize("has_lengths", [True, False])
@pytest.mark.parametrize("backend", ["reference", "chunked", "native"])
def test_the_gated_scan_rounds_bfloat16_only_at_its_end(backend: str, has_lengths: bool) -> None:
    u, delta, A, B_ssm, C_ssm, state = (t.detach() for t in scan_inputs(2, 70, 3, 4, torch.float32))
    u, raw_delta, z, B_ssm, C_ssm = (t.bfloat16() for t in (u, delta - 2, 3 * u + 1, B_ssm, C_ssm))
    lengths = torch.tensor([70, 9]) if has_lengths else None
    D_skip = u[0, 0].float()
    with use_backend(backend):
        y, last_state = gated_scan(u, raw_delta, A, B_ssm, C_ssm, D_skip, z, state, lengths)
    u, raw_delta, A, B_ssm, C_ssm, D_skip, z, state = (
        t.double() for t in (u, raw_delta, A, B_ssm, C_ssm, D_skip, z, state)
    )
    with use_backend("reference"):
        exact, exact_state = gated_scan(u, raw_delta, A, B_ssm, C_ssm, D_skip, z, state, lengths)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(last_state.double(), exact_state, rtol=0, atol=1e-5)


def test_the_backend_is_forced_by_block_and_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.delenv("YUNMIN_SCAN", raising=False)
    assert choose_backend(cpu) == "native"
    monkeypatch.setenv("YUNMIN_SCAN", "reference")
    assert choose_backend(cpu) == "reference"
    with use_backend("chunked"):
        assert choose_backend(cpu) == "chunked"
        with pytest.raises(RuntimeError, match="inside"), use_backend("reference"):
            raise RuntimeError("inside")
        assert choose_backend(cpu) == "chunked"
    assert choose_backend(cpu) == "reference"


def test_an_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "scan backend must be one of reference, chunked, native, cuda, got 'fast'"
    with pytest.raises(ConfigError, match=message), use_backend("fast"):
        pass
    monkeypatch.setenv("YUNMIN_SCAN", "fast")
    with pytest.raises(ConfigError, match=message):
        choose_backend(torch.device("cpu"))


def test_the_cuda_backend_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_cuda_kernels_installed", lambda: False)
    with pytest.raises(MissingExtraError, match=r"pip install 'yunmin\[cuda\]'"), use_backend("cuda"):
        choose_backend(torch.device("cuda"))
    assert choose_backend(torch.device("cuda")) == "chunked"


def test_cuda_is_chosen_where_it_can_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_cuda_kernels_installed", lambda: True)
    assert choose_backend(torch.device("cuda")) == "cuda"
    assert choose_backend(torch.device("cuda"), torch.float64) == "chunked"
    assert choose_backend(torch.device("cpu")) == "native"


def test_native_kernels_are_refused_where_they_cannot_compute() -> None:
    message = "the scan backend 'native' computes on the CPU, the inputs are on cuda"
    with pytest.raises(ConfigError, match=message), use_backend("native"):
        choose_backend(torch.device("cuda"))


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    scan._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="yunmin.scan"), use_backend("reference"):
        choose_backend(torch.device("cpu"))
        choose_backend(torch.device("cpu"))
    assert caplog.messages == ["scan backend reference on cpu (forced)"]


def _needs_cuda_kernels() -> None:
    for package in ("mamba_ssm", "causal_conv1d"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 1, 8, 4), (2, 7, 8, 16), (1, 65, 24, 11), (2, 2100, 8, 16)], ids=str)
@pytest.mark.parametrize("carried", [False, True])
def test_cuda_scan_equals_reference(shape: tuple[int, int, int, int], carried: bool) -> None:
    _needs_cuda_kernels()
    inputs = [t.detach().cuda().requires_grad_() for t in scan_inputs(*shape, torch.float32)]
    if not carried:
        inputs[-1] = torch.zeros_like(inputs[-1]).requires_grad_()
    D_skip = torch.ones(shape[2], device="cuda")

    def run(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(u, delta, A, B, C, D_skip, state)

    results = {}
    for backend in ("cuda", "reference"):
        with use_backend(backend):
            with torch.no_grad():
                outputs = run(*inputs)
            results[backend] = [*outputs, *gradients(run, inputs)]
    for mine, expected in zip(results["cuda"], results["reference"], strict=True):
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(mine, expected, rtol=0, atol=2e-4 * scale)


@pytest.mark.gpu
@pytest.mark.parametrize("taps", [2, 3, 4, 5])
def test_cuda_convolution_equals_chunked(taps: int) -> None:
    _needs_cuda_kernels()
    x, weight, bias, state = (
        torch.randn(shape, device="cuda") for shape in ((2, 9, 8), (8, taps), (8,), (2, 8, taps - 1))
    )
    with use_backend("cuda"):
        mine = causal_conv1d(x, weight, bias, state)
    with use_backend("chunked"):
        expected = causal_conv1d(x, weight, bias, state)
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
