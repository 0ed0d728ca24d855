"""Products with packed weights have exact integers, whatever the tile, the division of work and the processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import llvmlite.binding
import llvmlite.ir as ir
import numpy as np
import pytest
import torch
from torch import Tensor

from yunmin.kernels.dot import BYTES, INT, INTS, emit_dot
from yunmin.kernels.matmul import (
    ACTIVATION_FIELDS,
    BLOCKS,
    FLOAT32,
    INPUTS,
    INT4,
    INT8,
    KIND,
    SCALE,
    SCALES,
    START4,
    START8,
    TILE_NUMBERS,
    VALUES,
    WEIGHT_FIELDS,
    WEIGHTS,
    WIDTH,
    project,
    quantize_row,
)
from yunmin.kernels.matmul import (
    BYTES as ROUNDED,
)
from yunmin.quantization.layout import WeightFormat, WeightLayout
from yunmin.quantization.packing import pack
from yunmin.quantization.reference import quantize_tokens
from yunmin.quantization.rounding import round_weight

SHAPES = [(1, 16, 4), (1, 80, 48), (2, 64, 33), (5, 100, 96), (7, 272, 40), (13, 48, 160)]  # rows, outputs, inputs
KINDS: dict[WeightFormat, int] = {"int8": INT8, "int4": INT4}


class Product:
    """A weight and activations as kernels take them, and the memory they lie in."""

    def __init__(self, x: Tensor, weight: Tensor, kind: int) -> None:
        rows, inputs = x.shape
        outputs = weight.shape[0]
        wide, blocks = -(-inputs // 32) * 32, -(-outputs // 16)
        self.values = torch.zeros(rows, wide)
        self.values[:, :inputs] = x
        self.rounded = torch.zeros(rows, wide, dtype=torch.int8)
        self.scale = torch.zeros(rows)
        self.start8 = torch.zeros(rows, dtype=torch.int32)
        self.start4 = torch.zeros(rows, wide // 32, dtype=torch.int32)
        self.activations = np.zeros(ACTIVATION_FIELDS, np.int64)
        for field, tensor in (
            (VALUES, self.values),
            (ROUNDED, self.rounded),
            (SCALE, self.scale),
            (START8, self.start8),
            (START4, self.start4),
        ):
            self.activations[field] = tensor.data_ptr()
        self.activations[WIDTH] = wide
        self.weight = np.zeros(WEIGHT_FIELDS, np.int64)
        self.scales = torch.zeros(1)
        if kind == FLOAT32:
            padded = torch.zeros(16 * blocks, inputs)
            padded[:outputs] = weight
            self.packed = padded.view(blocks, 16, inputs).transpose(1, 2).contiguous()
            self.weight[INPUTS] = inputs
            self.expected = x.double() @ weight.double().T
        else:
            weight_format = next(name for name, number in KINDS.items() if number == kind)
            layout = WeightLayout(weight_format, (outputs,), inputs)
            levels = round_weight(weight, weight_format)
            self.packed, self.scales = pack(levels, layout)
            self.weight[INPUTS] = layout.padded_inputs
            q, row_scale = quantize_tokens(x)
            self.expected = (q.double() * row_scale.double()) @ levels.dequantized().double().T
        self.weight[KIND], self.weight[BLOCKS] = kind, blocks
        self.weight[WEIGHTS], self.weight[SCALES] = self.packed.data_ptr(), self.scales.data_ptr()
        for row in range(rows):
            quantize_row(self.activations, row, -(-inputs // 16) * 16)

    def run(self, rows: tuple[int, int], blocks: tuple[int, int], out: Tensor, *, adds: int = 0) -> None:
        sums = torch.zeros(TILE_NUMBERS)
        project(self.weight, self.activations, *rows, *blocks, out.data_ptr(), out.shape[1], adds, sums.data_ptr())

    def whole(self) -> Tensor:
        """The product (rows, padded outputs), in one piece."""
        out = torch.zeros(self.values.shape[0], 16 * int(self.weight[BLOCKS]))
        self.run((0, out.shape[0]), (0, int(self.weight[BLOCKS])), out)
        return out


def random_product(rows: int, outputs: int, inputs: int, kind: int) -> Product:
    generator = torch.Generator().manual_seed(rows + outputs + inputs)
    x, weight = (torch.randn(n, inputs, generator=generator) for n in (rows, outputs))
    return Product(x, weight, kind)


@pytest.mark.parametrize("kind", [FLOAT32, INT8, INT4])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_float64_and_any_division_gives_the_same_bits(shape: tuple[int, int, int], kind: int) -> None:
    rows, outputs, _ = shape
    product = random_product(*shape, kind)
    whole = product.whole()
    torch.testing.assert_close(whole[:, :outputs].double(), product.expected, rtol=1e-5, atol=1e-4)
    assert not whole[:, outputs:].any()
    blocks = int(product.weight[BLOCKS])
    pieces = torch.zeros_like(whole)
    for row in range(rows):
        for block in range(blocks):
            product.run((row, row + 1), (block, block + 1), pieces)
    assert torch.equal(pieces, whole)
    product.run((0, rows), (0, blocks), pieces, adds=1)
    assert torch.equal(pieces, whole + whole)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_sums_are_exact(shape: tuple[int, int, int]) -> None:
    product = random_product(*shape, INT8)
    product.scale.fill_(1.0)
    product.scales.fill_(1.0)
    levels = (product.packed.to(torch.int64) - 128).transpose(1, 2).flatten(0, 1).flatten(1)  # (outputs, inputs)
    exact = product.rounded[:, : levels.shape[1]].to(torch.int64) @ levels.T
    assert torch.equal(product.whole().to(torch.int64), exact)


@pytest.mark.parametrize("width", [1, 16, 31, 100])
def test_rows_are_rounded_as_the_reference_rounds_them(width: int) -> None:
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    x[1] = 0.0
    x[2] *= 1e-39  # subnormal: its inverse overflows
    x[3, -1] = float("inf")
    x[4, 0] = float("nan")
    product = Product(x, torch.zeros(16, width), INT8)
    q, scale = quantize_tokens(x[:3])
    torch.testing.assert_close(product.scale[:3], scale[:, 0])
    # the kernel multiplies and rounds at once, so a tie may fall the other way
    assert int((product.rounded[:3, :width].float() - q).abs().max()) <= 1
    assert bool(product.scale[3:].isnan().all())
    sums = product.rounded[:3].to(torch.int32)
    assert torch.equal(product.start8[:3], -128 * sums.sum(1, dtype=torch.int32))
    assert torch.equal(product.start4[:3], -8 * sums.view(3, -1, 32).sum(2, dtype=torch.int32))


_ON_ANOTHER_PROCESSOR = """
import json, torch
from tests.yunmin.test_matmul import random_product
print(json.dumps([random_product(5, 100, 96, kind).whole().view(torch.int32).flatten().tolist() for kind in (1, 2)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("features", ["+avx2,+avx,+fma,+f16c,+sse2", "+sse2"], ids=["avx2", "sse"])
def test_other_instruction_sets_give_the_same_bits(features: str) -> None:
    if "sse2" not in {name for name, has in llvmlite.binding.get_host_cpu_features().items() if has}:
        pytest.skip("needs an x86 processor")
    environment = {**os.environ, "NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": features}
    done = subprocess.run(
        [sys.executable, "-c", _ON_ANOTHER_PROCESSOR], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ours = [random_product(5, 100, 96, kind).whole().view(torch.int32).flatten().tolist() for kind in (INT8, INT4)]
    assert json.loads(done.stdout) == ours


@pytest.mark.parametrize(("features", "instruction"), [("+i8mm,+neon", "usdot"), ("+neon", "mla")])
def test_the_dot_product_compiles_for_arm(features: str, instruction: str) -> None:
    llvmlite.binding.initialize_all_targets()
    llvmlite.binding.initialize_all_asmprinters()
    module = ir.Module()
    module.triple = "aarch64-unknown-linux-gnu"
    function = ir.Function(module, ir.FunctionType(INTS, [INTS, BYTES, INT]), "dot")
    builder = ir.IRBuilder(function.append_basic_block())
    names = frozenset(name[1:] for name in features.split(","))
    sums, weights, x = function.args
    builder.ret(emit_dot(builder, sums, weights, x, names))
    target = llvmlite.binding.Target.from_triple(module.triple).create_target_machine(features=features, opt=2)
    assert instruction in target.emit_assembly(llvmlite.binding.parse_assembly(str(module)))
