"""The torch network on integers: its arithmetic, element by element, and the network made of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models import random_ids, random_tensors
from tests.quantization.fixtures import CONFIGS, quantized_checkpoint
from tests.quantization.test_packing import random_weight
from yunmin.model import MambaLM
from yunmin.quantization.layout import FLOAT32, Format, WeightFormat, WeightLayout
from yunmin.quantization.reference import QuantizedLinear, dequantized, network_of, quantize_tokens

FORMATS: list[Format] = ["int8", "int4"]


def _inputs(rows: int, width: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def _by_loop(layer: QuantizedLinear, x: Tensor, bias: Tensor) -> np.ndarray:
    """The definition, in numpy's float32 and Python's integers."""
    levels, scale = layer.levels.int().tolist(), layer.scale.numpy()
    result = np.zeros((x.shape[0], layer.out_features), np.float32)
    for token, row in enumerate(x.numpy()):
        absmax = np.abs(row).max()
        q = [int(v) for v in np.rint(row * (np.float32(127) / absmax))] if absmax else [0] * len(row)
        activation_scale = absmax / np.float32(127)
        for out in range(layer.out_features):
            products = [a * b for a, b in zip(q, levels[out], strict=True)]
            if layer.format == "int8":
                value = np.float32(sum(products)) * activation_scale * scale[out, 0]
            else:
                value = np.float32(0)
                for group, first in enumerate(range(0, len(q), 32)):
                    value += np.float32(sum(products[first : first + 32])) * scale[out, group]
                value = value * activation_scale
            result[token, out] = value + bias[out].numpy()
    return result


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("inputs", [1, 33, 70])
def test_linear_layer_computes_its_definition(weight_format: WeightFormat, inputs: int) -> None:
    weight, bias = random_weight(WeightLayout(weight_format, (7,), inputs)), _inputs(1, 7)[0]
    layer, x = QuantizedLinear(weight, bias), _inputs(5, inputs, seed=1)
    x[2] = 0.0
    torch.testing.assert_close(layer(x), torch.from_numpy(_by_loop(layer, x, bias)), rtol=2e-6, atol=2e-6)
    assert torch.equal(layer(x)[2], bias)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_linear_layer_is_near_the_dequantized_one(weight_format: WeightFormat) -> None:
    weight = random_weight(WeightLayout(weight_format, (40,), 100))
    x = _inputs(6, 100)
    exact = x.double() @ weight.dequantized().double().T
    error = (QuantizedLinear(weight, None)(x).double() - exact).norm() / exact.norm()
    assert float(error) < 0.02


def test_integer_sums_beyond_24_bits_are_exact() -> None:
    layout = WeightLayout("int8", (3,), 3000)
    weight = random_weight(layout)
    weight.levels.fill_(127)
    weight.levels[:, ::2] = 126
    x = torch.full((2, 3000), 1.0)
    x[:, 5] = 126 / 127
    expected = (
        127 * (1500 * 127 + 1499 * 126) + 127 * 126 + 126 * 126 - 127 * 126 - 127
    )  # x[5] meets 127, an odd column
    expected = 127 * (1499 * 127 + 1500 * 126) + 126 * 127
    scale = weight.scale[:, 0]
    found = QuantizedLinear(weight, None)(x)
    assert torch.equal(found[0], torch.tensor(float(expected)) * torch.tensor(1 / 127) * scale)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_int8_rows_do_not_depend_on_their_neighbours(weight_format: WeightFormat) -> None:
    layer = QuantizedLinear(random_weight(WeightLayout(weight_format, (48,), 96)), None)
    x = _inputs(16, 96)
    x[3] *= 1e4
    alone = torch.cat([layer(row[None]) for row in x])
    if weight_format == "int8":
        assert torch.equal(layer(x), alone)
    else:
        torch.testing.assert_close(layer(x), alone, rtol=1e-5, atol=1e-5)


def test_tokens_round_halves_to_even() -> None:
    q, scale = quantize_tokens(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))
    assert q.tolist() == [[127, 0, 2, 2, 0, -2]]
    assert scale.item() == 1.0


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_number_makes_its_own_row_nan_and_no_other(weight_format: WeightFormat, bad: float) -> None:
    layer = QuantizedLinear(random_weight(WeightLayout(weight_format, (20,), 40)), None)
    x = _inputs(3, 40)
    x[1, 7] = bad
    out = layer(x)
    assert bool(out[1].isnan().all())
    assert bool(out[[0, 2]].isfinite().all())


@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-38])
def test_tokens_next_to_zero_give_numbers(tiny: float) -> None:
    layer = QuantizedLinear(random_weight(WeightLayout("int8", (20,), 40)), None)
    assert bool(layer(torch.full((1, 40), tiny)).isfinite().all())


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("which", CONFIGS)
def test_network_on_integers_is_near_the_dequantized_one(tmp_path: Path, which: str, weight_format: Format) -> None:
    config = CONFIGS[which]
    checkpoint = quantized_checkpoint(tmp_path, config, weight_format)
    plain = dequantized(checkpoint)
    assert plain.quantization == FLOAT32
    ids = random_ids(config, 2, 17)
    with torch.inference_mode():
        on_integers, on_floats = network_of(checkpoint)(ids), network_of(plain)(ids)
    assert float((on_integers - on_floats).norm() / on_floats.norm()) < 0.1


@pytest.mark.parametrize("weight_format", FORMATS)
def test_dequantized_checkpoint_is_near_the_one_it_came_from(tmp_path: Path, weight_format: Format) -> None:
    config = CONFIGS["cut"]
    plain = dequantized(quantized_checkpoint(tmp_path, config, weight_format))
    MambaLM.from_tensors(config, plain.tensors)  # names and shapes fit
    for name, tensor in random_tensors(config).items():
        error = float((plain.tensors[name] - tensor).norm() / tensor.norm())
        assert error < (0.12 if weight_format == "int4" else 0.01), name


@pytest.mark.parametrize("weight_format", FORMATS)
def test_steps_equal_the_sequence(tmp_path: Path, weight_format: Format) -> None:
    config = CONFIGS["tied"]
    model = network_of(quantized_checkpoint(tmp_path, config, weight_format))
    ids = random_ids(config, 2, 9)
    logits, state = model.prefill(ids[:, :4])
    for position in range(4, 9):
        logits, state = model.step(ids[:, position], state)
    torch.testing.assert_close(logits, model(ids)[:, -1], rtol=5e-3, atol=5e-3)  # a level may round to its neighbour
