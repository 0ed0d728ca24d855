"""The torch network of the weights that a graph stands for, made one layer at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.onnx_graph.matrices import block_size
from export.onnx_graph.weights import GraphWeights, reference_tensor
from export.wide import OnCall
from yunmin.axes import layer_prefix
from yunmin.checkpoint import Checkpoint
from yunmin.mixer import MambaMixer
from yunmin.model import MambaBlock, MambaLM, RMSNorm
from yunmin.quantization.reference import quantize_tokens
from yunmin.runtime.onnx_contract import Precision


def reference_network(checkpoint: Checkpoint, precision: Precision, *, rounds_activations: bool = False) -> MambaLM:
    """What a graph is compared with.

    Args:
        checkpoint: that the graph is written from.
        precision: of the graph.
        rounds_activations: whether the inputs of every product are rounded to 8 bits, in blocks as by `MatMulNBits`.

    Raises:
        ConfigError: the precision does not go with the checkpoint's.
    """
    config, weights = checkpoint.config, GraphWeights(checkpoint, precision)

    def tensor(name: str) -> Tensor:
        return reference_tensor(weights, precision, name)

    def ready(module: nn.Module, prefix: str) -> nn.Module:
        for name, child in module.named_modules():
            weight_format = weights.quantization.of(f"{prefix}{name}.weight")
            if rounds_activations and weight_format is not None:
                block = block_size(weight_format, child.in_features)
                child.register_forward_pre_hook(partial(_round_input, block))
        return module.eval().requires_grad_(requires_grad=False)

    def mixer(layer: int) -> nn.Module:
        with torch.device("meta"):
            block = MambaBlock(config, layer, MambaMixer)
        prefix = layer_prefix(layer)
        block.load_state_dict({name: tensor(prefix + name) for name in block.state_dict()}, assign=True)
        return ready(block.mixer, f"{prefix}mixer.")

    def norm(name: str) -> nn.Module:
        found = RMSNorm(config.d_model, config.norm_eps)
        found.load_state_dict({"weight": tensor(name)}, assign=True)
        return found

    with torch.device("meta"):
        model = MambaLM(config)
    for layer, block in enumerate(model.backbone.blocks):
        block.norm = norm(f"{layer_prefix(layer)}norm.weight")  # type: ignore[assignment]
        block.mixer = OnCall(lambda layer=layer: mixer(layer))  # type: ignore[assignment, misc]
    model.backbone.norm_f = norm("backbone.norm_f.weight")  # type: ignore[assignment]
    embedding = tensor("backbone.embeddings.weight")
    model.backbone.embeddings = nn.Embedding.from_pretrained(embedding, freeze=True)
    head = embedding if config.tie_word_embeddings else tensor("lm_head.weight")
    model.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False, device="meta")
    model.lm_head.weight = nn.Parameter(head, requires_grad=False)
    ready(model.lm_head, "backbone.embeddings" if config.tie_word_embeddings else "lm_head")
    return model.eval()


def _round_input(block: int, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor]:
    (x,) = arguments
    width = x.shape[-1]
    levels, scale = quantize_tokens(F.pad(x, (0, -width % block)).unflatten(-1, (-1, block)))
    return ((levels * scale).flatten(-2)[..., :width],)
