"""The CPU's kernels equal the loops that define them, forward and backward, and cost no more memory than they say."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from yunmin import threads
from yunmin.kernels.reference import reference_scan
from yunmin.scan import causal_conv1d, gated_scan, selective_scan, use_backend
from yunmin.threads import set_threads

# B, L, D, N
SHAPES = [
    (1, 1, 1, 1),
    (2, 2, 15, 3),
    (1, 7, 16, 16),
    (3, 65, 17, 4),
    (1, 130, 40, 5),
    (2, 3, 3, 256),
    (2, 0, 3, 4),
    (0, 4, 3, 2),
]
NAMES = ["u", "raw_delta", "A", "B_ssm", "C_ssm", "D_skip", "z", "state"]


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before, chosen = torch.get_num_threads(), threads._chosen
    yield
    torch.set_num_threads(before)
    threads._chosen = chosen


def scan_inputs(batch: int, length: int, inner: int, n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """As NAMES, all random and all taking gradients."""
    rng = torch.Generator().manual_seed(length + 7 * n)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    wide = (batch, length, inner)
    tensors = [randn(*wide), randn(*wide) - 1, -torch.exp(0.5 * randn(inner, n)), randn(batch, length, n)]
    tensors += [randn(batch, length, n), randn(inner), randn(*wide), randn(batch, inner, n)]
    return [t.to(dtype).requires_grad_() for t in tensors]


def convolution_inputs(batch: int, length: int, inner: int, taps: int, dtype: torch.dtype) -> list[Tensor]:
    """x, weight, bias and the carried inputs."""
    rng = torch.Generator().manual_seed(length + 7 * taps)
    shapes = [(batch, length, inner), (inner, taps), (inner,), (batch, inner, taps - 1)]
    return [torch.randn(s, generator=rng, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def reference_gated_scan(
    u: Tensor, raw: Tensor, A: Tensor, B: Tensor, C: Tensor, D_skip: Tensor, z: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    y, last_state = reference_scan(u, F.softplus(raw), A, B, C, state)
    return (y + D_skip * u) * F.silu(z), last_state


def reference_convolution(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
    inputs = torch.cat([state.transpose(1, 2), x], dim=1)
    total = inputs[:, : x.shape[1]] * weight[:, 0]
    for tap in range(1, weight.shape[1]):
        total = total + inputs[:, tap : tap + x.shape[1]] * weight[:, tap]
    return F.silu(total + bias)


def convolve(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
    return causal_conv1d(x, weight, bias, state)[0]


def gradients(run: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    outputs = run(*inputs)
    rng = torch.Generator().manual_seed(5)
    weighed = [
        (t * torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t.dtype)).sum()
        for t in (outputs if isinstance(outputs, tuple) else (outputs,))
    ]
    return list(torch.autograd.grad(weighed, inputs, allow_unused=True, materialize_grads=True))


def assert_equal_to(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """Within 1e-12 of the largest number in float64, 2e-6 in float32."""
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for mine, theirs in zip(found, expected, strict=True):
        scale = max(1.0, float(theirs.detach().abs().max())) if theirs.numel() else 1.0
        torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gated_scan_equals_the_reference_loop_forward_and_backward(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    inputs = scan_inputs(*shape, dtype)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    assert_equal_to(list(gated_scan(*inputs)), list(reference_gated_scan(*exact)), dtype)
    assert_equal_to(gradients(gated_scan, inputs), gradients(reference_gated_scan, exact), dtype)


def test_the_plain_scan_has_the_same_gradients_as_the_reference() -> None:
    inputs = scan_inputs(2, 67, 18, 5)
    u, raw_delta, A, B_ssm, C_ssm, D_skip, _, state = (t.detach() for t in inputs)
    plain = [t.requires_grad_() for t in (u, F.softplus(raw_delta), A, B_ssm, C_ssm, D_skip, state)]
    found = gradients(selective_scan, plain)
    with use_backend("reference"):
        assert_equal_to(found, gradients(selective_scan, plain), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("taps", [2, 4, 7])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 15), (1, 7, 16), (2, 65, 17), (1, 130, 40), (2, 0, 3), (0, 4, 3)])
def test_the_convolution_equals_the_reference_forward_and_backward(
    shape: tuple[int, int, int], taps: int, dtype: torch.dtype
) -> None:
    inputs = convolution_inputs(*shape, taps, dtype)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    assert_equal_to([convolve(*inputs)], [reference_convolution(*exact)], dtype)
    assert_equal_to(gradients(convolve, inputs), gradients(reference_convolution, exact), dtype)


def test_the_gradients_pass_gradcheck() -> None:
    assert torch.autograd.gradcheck(gated_scan, scan_inputs(2, 5, 3, 2))
    assert torch.autograd.gradcheck(convolve, convolution_inputs(2, 5, 3, 4, torch.float64))


@pytest.mark.parametrize("output", [0, 1])
def test_a_loss_of_one_output_alone_has_the_right_gradients(output: int) -> None:
    inputs = scan_inputs(2, 70, 3, 2)
    found = gradients(lambda *t: gated_scan(*t)[output], inputs)
    assert_equal_to(found, gradients(lambda *t: reference_gated_scan(*t)[output], inputs), torch.float64)


def test_a_second_derivative_is_refused_instead_of_wrong() -> None:
    inputs = scan_inputs(1, 3, 2, 2)
    (first,) = torch.autograd.grad(gated_scan(*inputs)[0].square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("cut", [0, 1, 63, 64, 65, 129])
def test_a_carried_state_continues_bit_for_bit(cut: int) -> None:
    u, raw, A, B_ssm, C_ssm, D_skip, z, state = (t.detach() for t in scan_inputs(2, 130, 17, 5, torch.float32))
    whole, last_state = gated_scan(u, raw, A, B_ssm, C_ssm, D_skip, z, state)
    parts = []
    for part in (slice(0, cut), slice(cut, 130)):
        wide = (t[:, part] for t in (u, raw, B_ssm, C_ssm, z))
        u_part, raw_part, B_part, C_part, z_part = wide
        y, state = gated_scan(u_part, raw_part, A, B_part, C_part, D_skip, z_part, state)
        parts.append(y)
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(state, last_state)


@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_padded_rows_equal_the_rows_alone_whatever_the_padding_holds(backend: str) -> None:
    lengths = [0, 1, 64, 70]
    inputs = scan_inputs(4, 70, 17, 5, torch.float32)
    wide = ("u", "raw_delta", "B_ssm", "C_ssm", "z")
    with torch.no_grad():
        for name in wide:
            for row, length in enumerate(lengths):
                inputs[NAMES.index(name)][row, length:] = float("nan")
    with use_backend(backend):
        y, last_state = gated_scan(*[*inputs, torch.tensor(lengths)])
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad([(y * weights).sum(), last_state.sum()], inputs)
    sums = {name: torch.zeros_like(t) for name, t in zip(NAMES, inputs, strict=True)}
    for row, length in enumerate(lengths):
        assert not y[row, length:].any()
        alone = []
        for name, tensor in zip(NAMES, inputs, strict=True):
            part = tensor[row : row + 1, :length] if name in wide else tensor
            alone.append((part[row : row + 1] if name == "state" else part).detach().requires_grad_())
        with use_backend(backend):
            y_alone, state_alone = gated_scan(*alone)
        atol = 0.0 if backend == "native" else 1e-6
        torch.testing.assert_close(y[row : row + 1, :length], y_alone, rtol=0, atol=atol)
        torch.testing.assert_close(last_state[row : row + 1], state_alone, rtol=0, atol=atol)
        loss = (y_alone * weights[row : row + 1, :length]).sum() + state_alone.sum()
        for name, part in zip(
            NAMES, torch.autograd.grad(loss, alone, allow_unused=True, materialize_grads=True), strict=True
        ):
            target = sums[name][row : row + 1] if name in (*wide, "state") else sums[name]
            (target[:, :length] if name in wide else target).add_(part)
    assert_equal_to(list(grads), list(sums.values()), torch.float32)


def test_the_number_of_threads_changes_no_bit_of_the_outputs(restored_threads: None) -> None:
    inputs = scan_inputs(2, 70, 40, 5, torch.float32)
    taps = convolution_inputs(2, 70, 40, 4, torch.float32)
    found = []
    for count in (1, 2, 3):
        set_threads(count)
        found.append([*gated_scan(*inputs), convolve(*taps)])
        grads = gradients(gated_scan, inputs)
        assert all(torch.equal(a, b) for a, b in zip(grads, gradients(gated_scan, inputs), strict=True))
        assert_equal_to(grads, gradients(reference_gated_scan, inputs), torch.float32)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def _kinds(tensor: Tensor) -> Tensor:
    """0 for numbers, 1 for NaN, 2 and 3 for the infinities."""
    return tensor.isnan() + 2 * (tensor == torch.inf) + 3 * (tensor == -torch.inf)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_number_propagates_through_the_scan_as_in_the_reference(name: str, bad: float) -> None:
    inputs = scan_inputs(1, 9, 17, 5, torch.float32)
    with torch.no_grad():
        inputs[NAMES.index(name)].view(-1)[-7] = bad
    for run in (lambda f: list(f(*inputs)), lambda f: gradients(f, inputs)):
        for mine, theirs in zip(run(gated_scan), run(reference_gated_scan), strict=True):
            assert torch.equal(_kinds(mine), _kinds(theirs))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("index", range(4))
def test_what_is_no_number_propagates_through_the_convolution_as_in_the_reference(index: int, bad: float) -> None:
    inputs = convolution_inputs(1, 9, 17, 4, torch.float32)
    with torch.no_grad():
        inputs[index].view(-1)[-7] = bad
    for run in (lambda f: [f(*inputs)], lambda f: gradients(f, inputs)):
        for mine, theirs in zip(run(convolve), run(reference_convolution), strict=True):
            assert torch.equal(_kinds(mine), _kinds(theirs))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e4, 1e30])
def test_decays_of_any_size_equal_the_references(size: float) -> None:
    inputs = scan_inputs(2, 9, 3, 4, torch.float32)
    with torch.no_grad():
        inputs[2].mul_(size)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    assert_equal_to(list(gated_scan(*inputs)), list(reference_gated_scan(*exact)), torch.float32)
    assert all(torch.isfinite(g).all() for g in gradients(gated_scan, inputs))


def test_slices_of_wider_tensors_give_what_their_copies_give() -> None:
    """As in the mixer: x and z are halves of one product, B and C parts of another; a gradient may be expanded."""
    rng = torch.Generator().manual_seed(3)
    xz, maps = (torch.randn(2, 67, width, generator=rng).requires_grad_() for width in (2 * 17, 6 + 2 * 5))
    _, raw, A, _, _, D_skip, _, state = scan_inputs(2, 67, 17, 5, torch.float32)
    weight, bias, before = convolution_inputs(2, 67, 17, 4, torch.float32)[1:]
    found = []
    for form in (lambda t: t, Tensor.contiguous):
        x, z = (form(t) for t in xz.chunk(2, dim=-1))
        _, B_ssm, C_ssm = (form(t) for t in maps.split([6, 5, 5], dim=-1))
        y, last_state = gated_scan(convolve(x, weight, bias, before), raw, A, B_ssm, C_ssm, D_skip, z, state)
        transposed = raw.detach().transpose(1, 2).contiguous().transpose(1, 2)
        same, _ = gated_scan(convolve(x, weight, bias, before), transposed, A, B_ssm, C_ssm, D_skip, z, state)
        assert torch.equal(y, same)
        found.append([y, last_state, *torch.autograd.grad(y.sum(), [xz, maps, raw, weight])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bfloat16_is_read_and_written_but_not_computed_in() -> None:
    narrow = [t.detach() for t in scan_inputs(2, 70, 17, 5, torch.float32)]
    for index in (0, 1, 3, 4, 6):
        narrow[index] = narrow[index].bfloat16()
    x, *rest = (t.detach() for t in convolution_inputs(2, 70, 17, 4, torch.float32))
    cases: list[tuple[Callable[..., Any], list[Tensor]]] = [
        (gated_scan, narrow),
        (lambda *t: (convolve(*t),), [x.bfloat16(), *rest]),
    ]
    for run, tensors in cases:
        inputs = [t.clone().requires_grad_() for t in tensors]
        wide = [t.float().requires_grad_() for t in tensors]
        y, expected = run(*inputs)[0], run(*wide)[0]
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, expected.bfloat16())
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        grads = torch.autograd.grad((y * weights).sum(), inputs)
        for mine, theirs, tensor in zip(
            grads, torch.autograd.grad((expected * weights).sum(), wide), inputs, strict=True
        ):
            assert mine.dtype == tensor.dtype
            assert torch.equal(mine, theirs.to(tensor.dtype))


def test_mixed_dtypes_are_computed_in_float32() -> None:
    tensors = [t.detach() for t in scan_inputs(2, 7, 17, 5, torch.float32)]
    tensors[1], tensors[3] = tensors[1].bfloat16(), tensors[3].half()
    y, last_state = gated_scan(*tensors)
    expected, expected_state = gated_scan(*(t.float() for t in tensors))
    assert (y.dtype, last_state.dtype) == (torch.float32, torch.float32)
    assert torch.equal(y, expected)
    assert torch.equal(last_state, expected_state)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_outputs_are_the_same_and_nothing_is_kept(mode: Callable[[], Any]) -> None:
    inputs, taps = scan_inputs(2, 7, 17, 5, torch.float32), convolution_inputs(2, 7, 17, 4, torch.float32)
    with mode():
        found = [*gated_scan(*inputs), convolve(*taps)]
    assert not any(t.requires_grad for t in found)
    for mine, expected in zip(found, [*gated_scan(*inputs), convolve(*taps)], strict=True):
        assert torch.equal(mine, expected)


def test_without_gradients_no_states_are_kept_for_a_backward_although_parameters_would_need_them() -> None:
    inputs = scan_inputs(2, 130, 96, 128, torch.float32)
    with torch.no_grad(), _LargestTensor() as largest:
        gated_scan(*inputs)
    assert largest.numbers <= max(t.numel() for t in inputs)


def test_a_convolution_of_one_tap_needs_no_carried_inputs() -> None:
    inputs = convolution_inputs(2, 5, 3, 1, torch.float64)
    assert_equal_to([convolve(*inputs)], [reference_convolution(*inputs)], torch.float64)
    assert_equal_to(gradients(convolve, inputs), gradients(reference_convolution, inputs), torch.float64)


class _LargestTensor(TorchDispatchMode):
    """Records how many numbers the largest tensor has that an operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


def test_no_tensor_of_all_states_is_made_and_what_is_kept_is_linear_in_length() -> None:
    def kept_numbers(length: int) -> int:
        batch, inner, n = 2, 32, 16
        inputs = scan_inputs(batch, length, inner, n, torch.float32)
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
            return tensor

        with _LargestTensor() as largest:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                y, last_state = gated_scan(*inputs)
            (y.sum() + last_state.sum()).backward()
        assert largest.numbers <= batch * length * inner
        wide = 3 * inner + 2 * n  # u, raw_delta, z, B and C
        assert sum(sizes.values()) <= batch * length * (wide + inner * n / 64) + 4 * inner * n + inner
        return sum(sizes.values())

    assert kept_numbers(1024) < 4.1 * kept_numbers(256)


def test_kernels_are_imported_at_first_use() -> None:
    code = "import sys, yunmin.model, yunmin.cli; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
