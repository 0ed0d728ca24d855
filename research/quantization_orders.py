"""What the order of the channels does to int4 groups: error of the weights, and perplexity.

python -m research.quantization_orders MODEL --data FILE
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from export.card import plain_table
from export.compact import Compact, compact_model, read_source
from export.order import ORDERS, OrderKind, reordered
from export.quality import measure
from export.quantize import quantize_checkpoint
from export.texts import CALIBRATION_TOKENS, MEASURED_TOKENS, WINDOW, Text, Texts, read_texts
from yunmin.axes import layer_prefix
from yunmin.checkpoint import Checkpoint
from yunmin.cli import parser, print_json, run
from yunmin.quantization.layout import Quantization
from yunmin.quantization.order import Grouped
from yunmin.runtime.native.runtime import NativeRuntime

_WEIGHTS = {"W_x": "x_proj", "W_out": "out_proj", "W_in": "in_proj"}
_BATCH_SIZE = 8


def compare_orders(
    source: str,
    data: str | None = None,
    calibrate: str | None = None,
    *,
    measured_tokens: int = MEASURED_TOKENS,
    calibration_tokens: int = CALIBRATION_TOKENS,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Quantizes one model to int4 in each order.

    Args:
        source: run folder or checkpoint, with float32 weights.
        data: held-out text to measure on; None takes the standard library's.
        calibrate: text that orders are solved on and weights are rounded for; None takes another part of `data`.
        measured_tokens, calibration_tokens: at most so many of either.
        report: told how far it is.

    Returns:
        `float32` perplexity, and for each order the relative squared error of rounding W_x, W_out and W_in to nearest
        (means over layers), and of int4, rounded to nearest and calibrated, the perplexity and the divergence from
        float32 (mean KL in nats per token, which chance moves far less); with what they rest on.

    Raises:
        YunminError: the source cannot be read, is quantized, or has no tokenizer; or a text is too short.
    """
    read = read_source(source)
    checkpoint = read.checkpoint
    texts = read_texts(
        checkpoint.tokenizer,
        checkpoint.config.n_tokens,
        data,
        calibrate,
        calibrates=True,
        measured_tokens=measured_tokens,
        calibration_tokens=calibration_tokens,
    )
    assert texts.calibration is not None
    compact = compact_model(read)
    exact = _checkpoint(checkpoint, compact)
    baseline = measure(exact, texts.measured, report, "in float32")
    return {
        "model": source,
        "float32": baseline.token_perplexity,
        "orders": {kind: _measured(checkpoint, compact, kind, texts, report) for kind in ORDERS},  # type: ignore[arg-type]
        "tokens": baseline.tokens,
        "window": baseline.window,
        "stride": baseline.stride,
        "data": texts.measured.source,
        "calibration": texts.calibration.describe(),
    }


def _measured(
    checkpoint: Checkpoint, compact: Compact, kind: OrderKind, texts: Texts, report: Callable[[str], None]
) -> dict[str, float]:
    report(f"order {kind}")
    exact = _checkpoint(checkpoint, reordered(compact, kind, texts.calibration, report))
    found: dict[str, float] = {}
    layers = range(exact.config.n_layers)
    for label, projection in _WEIGHTS.items():
        names = [f"{layer_prefix(layer)}mixer.{projection}.weight" for layer in layers]
        found[label] = sum(Grouped(exact.tensors[name]).error() for name in names) / len(names)
    for label, calibration in (("nearest", None), ("calibrated", texts.calibration)):
        quantized = quantize_checkpoint(exact, Quantization("int4"), calibration, report)
        found[label] = measure(quantized, texts.measured, report, f"in int4, {label}").token_perplexity
        found[f"{label}_divergence"] = divergence(exact, quantized, texts.measured)
    return found


@torch.inference_mode()
def divergence(exact: Checkpoint, other: Checkpoint, text: Text) -> float:
    """Mean KL divergence of a checkpoint's next-token distributions from the exact ones, in nats per token."""
    expected, found = NativeRuntime(exact), NativeRuntime(other)
    total, tokens = 0.0, 0
    for rows in text.sequences().split(_BATCH_SIZE):
        log_p, log_q = (F.log_softmax(runtime.forward(rows), dim=-1) for runtime in (expected, found))  # (B, L, V)
        total += float(F.kl_div(log_q, log_p, log_target=True, reduction="sum"))
        tokens += rows.numel()
    return total / tokens


def _checkpoint(checkpoint: Checkpoint, compact: Compact) -> Checkpoint:
    single = compact.cast(torch.float32)
    return replace(checkpoint, config=single.config, tensors=single.tensors)


def orders_table(result: dict[str, Any]) -> str:
    """The result for a terminal."""
    labels = ("nearest", "calibrated")
    header = ("order", *(f"error of {label}" for label in _WEIGHTS), *(f"int4 {label}  (KL)" for label in labels))
    exact = f"{result['float32']:.3f}          "
    rows: list[tuple[str, ...]] = [("float32", "", "", "", exact, exact)]
    for kind, found in result["orders"].items():
        errors = [f"{found[label]:.6f}" for label in _WEIGHTS]
        rows.append((kind, *errors, *(f"{found[label]:.3f} ({found[f'{label}_divergence']:.5f})" for label in labels)))
    return plain_table(header, rows)


def main(argv: list[str]) -> int:
    """`python -m research.quantization_orders MODEL`."""
    arguments = parser(
        "research.quantization_orders",
        "Quantizes a model to int4 in each channel order, and compares the errors of its weights and its perplexities.",
        ["python -m research.quantization_orders training_outputs/my-run --data held-out.txt --calibrate training.txt"],
    )
    arguments.add_argument("model", help="run folder, a checkpoint of it, or any Mamba checkpoint")
    arguments.add_argument("--data", metavar="SOURCE", help="held-out text to measure on (the standard library's)")
    arguments.add_argument("--calibrate", metavar="SOURCE", help="text to calibrate on (another part of --data)")
    arguments.add_argument("--tokens", type=int, default=MEASURED_TOKENS, metavar="N", help="to measure (%(default)s)")
    arguments.add_argument(
        "--calibration-tokens", type=int, default=CALIBRATION_TOKENS, metavar="N", help="to calibrate on (%(default)s)"
    )
    arguments.add_argument("--json", action="store_true", help="print the result as one JSON object")
    options = arguments.parse_args(argv)
    result = compare_orders(
        options.model,
        options.data,
        options.calibrate,
        measured_tokens=options.tokens,
        calibration_tokens=options.calibration_tokens,
        report=lambda stage: print(f"{stage} ...", file=sys.stderr, flush=True),
    )
    if options.json:
        print_json(result)
        return 0
    print(orders_table(result))
    print(f"\nperplexity per token on {result['tokens']:,} tokens of {result['data']}, window and stride {WINDOW}")
    print(f"calibrated on {result['calibration']['tokens']:,} tokens of {result['calibration']['source']}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
