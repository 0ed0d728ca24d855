"""The torch network of the weights that a graph stands for, made one layer at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

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
        rounds_activations: whether the inputs of every product are rounded to 8 bits, with one scale per token.

    Raises:
        ConfigError: the precision does not go with the checkpoint's.
    """
    config, weights = checkpoint.config, GraphWeights(checkpoint, precision)

    def tensor(name: str) -> Tensor:
        return reference_tensor(weights, precision, name)

    def rounded(module: nn.Module) -> nn.Module:
        if rounds_activations:
            for child in module.modules():
                if isinstance(child, nn.Linear):
                    child.register_forward_pre_hook(_round_input)
        return module.eval().requires_grad_(requires_grad=False)

    def mixer(layer: int) -> nn.Module:
        with torch.device("meta"):
            block = MambaBlock(config, layer, MambaMixer)
        prefix = layer_prefix(layer)
        block.load_state_dict({name: tensor(prefix + name) for name in block.state_dict()}, assign=True)
        return rounded(block.mixer)

    def norm(name: str) -> nn.Module:
        found = RMSNorm(config.d_model, config.norm_eps)
        found.load_state_dict({"weight": tensor(name)}, assign=True)
        return found

    with torch.device("meta"):
        model = MambaLM(replace(config))
    for layer, block in enumerate(model.backbone.blocks):
        block.norm = norm(f"{layer_prefix(layer)}norm.weight")  # type: ignore[assignment]
        block.mixer = OnCall(lambda layer=layer: mixer(layer))  # type: ignore[assignment, misc]
    model.backbone.norm_f = norm("backbone.norm_f.weight")  # type: ignore[assignment]
    embedding = tensor("backbone.embeddings.weight")
    model.backbone.embeddings = nn.Embedding.from_pretrained(embedding, freeze=True)
    head = embedding if config.tie_word_embeddings else tensor("lm_head.weight")
    model.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False, device="meta")
    model.lm_head.weight = nn.Parameter(head, requires_grad=False)
    rounded(model.lm_head)
    return model.eval()


def _round_input(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor]:
    levels, scale = quantize_tokens(arguments[0])
    return (levels * scale,)
