"""Proof that the runtime computes what the stored integers stand for: the same logits as plain torch, on real text.

Two exact computations of quantized weights differ where an activation lies at the edge of two levels: float32 sums
taken in another order round it to either. A layer makes little of that, but a deep network can amplify it as it
amplifies the rounding of activations itself. So each layer is proven alone, between embedding and head, and the whole
network within what rounding its activations changes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from export.verify import TOLERANCES, Probe, logits_one_by_one, require_parity, steps_of
from yunmin.artifact import Parity
from yunmin.axes import layer_prefix
from yunmin.checkpoint import Checkpoint
from yunmin.quantization.reference import dequantized, network_of
from yunmin.runtime.native.runtime import NativeRuntime


def verify_quantized(checkpoint: Checkpoint, probe: Probe) -> dict[str, Parity]:
    """Compares the native runtime with the torch network on integers, and its steps with its whole sequences.

    Args:
        checkpoint: quantized, as it was read back.
        probe: what to compare on.

    Raises:
        VerificationError: they differ by more than activations at the edge of two levels explain.
    """
    expected = logits_one_by_one(network_of(checkpoint), probe)
    on_floats = logits_one_by_one(network_of(dequantized(checkpoint)), probe)
    rounding = float((on_floats - expected).abs().max() / expected.abs().max())
    runtime = NativeRuntime(checkpoint)
    tolerance = max(TOLERANCES["quantized"], rounding)
    return {
        "layers": _layers_alone(checkpoint, probe),
        "quantized": require_parity("quantized", _served(runtime, probe), expected, tolerance=tolerance),
        "stepwise": require_parity("stepwise", *_by_steps(runtime, probe)),
    }


def one_layer(checkpoint: Checkpoint, layer: int) -> Checkpoint:
    """The model that has one of the layers, and embedding, final norm and head."""
    config = checkpoint.config
    own, others = layer_prefix(layer), "backbone.layers."
    tensors = {
        layer_prefix(0) + name.removeprefix(own) if name.startswith(own) else name: tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(own) or not name.startswith(others)
    }
    widths = config.with_widths(d_inner=config.d_inner[layer : layer + 1], d_state=config.d_state[layer : layer + 1])
    return replace(checkpoint, config=widths, tensors=tensors)


def _layers_alone(checkpoint: Checkpoint, probe: Probe) -> Parity:
    """The worst of the layers."""
    found = []
    for layer in range(checkpoint.config.n_layers):
        part = one_layer(checkpoint, layer)
        expected = logits_one_by_one(network_of(part), probe)
        served = _served(NativeRuntime(part), probe)
        found.append(require_parity("layers", served, expected, hint=f" (layer {layer})"))
    return max(found, key=lambda parity: parity.relative_error)


def _served(runtime: NativeRuntime, probe: Probe) -> Tensor:
    """Logits of each sequence read alone (tokens, V)."""
    return torch.cat([runtime.forward(torch.tensor([sequence]))[0] for sequence in probe.sequences])


def _by_steps(runtime: NativeRuntime, probe: Probe) -> tuple[Tensor, Tensor]:
    """The last positions' logits by a prefill and single steps, and by one pass, both (sequences, steps + 1, V)."""
    steps = steps_of(probe)
    stepped = []
    for sequence in probe.sequences:
        logits, state = runtime.prefill(sequence[:-steps])
        rows = [logits.clone()]
        for token_id in sequence[-steps:]:
            logits, state = runtime.step([token_id], state)
            rows.append(logits[0].clone())
        stepped.append(torch.stack(rows))
    whole = [runtime.forward(torch.tensor([sequence]))[0, -steps - 1 :] for sequence in probe.sequences]
    return torch.stack(stepped), torch.stack(whole)
