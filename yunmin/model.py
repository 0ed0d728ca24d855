"""The network: embedding, residual blocks of norm and mixer, final norm, head; named as `MambaForCausalLM`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from yunmin.axes import expected_shapes
from yunmin.config import MambaConfig
from yunmin.errors import CheckpointError, ShapeError
from yunmin.mixer import MambaMixer
from yunmin.state import MambaState

MixerFactory = Callable[[MambaConfig, int], MambaMixer]


class RMSNorm(nn.Module):
    """Root-mean-square normalization, computed in float32 or wider."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normalized.to(self.weight.dtype)


class MambaBlock(nn.Module):
    """A mixer behind a norm, added to the residual stream."""

    def __init__(self, config: MambaConfig, layer: int, mixer: MixerFactory) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = mixer(config, layer)


class MambaBackbone(nn.Module):
    """Everything below the head."""

    def __init__(self, config: MambaConfig, mixer: MixerFactory) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(MambaBlock(config, layer, mixer) for layer in range(config.n_layers))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)

    @property
    def blocks(self) -> Sequence[MambaBlock]:
        """The layers, by the type that `nn.ModuleList` does not carry."""
        return cast("Sequence[MambaBlock]", self.layers)

    def forward(self, input_ids: Tensor, state: MambaState, lengths: Tensor | None = None) -> tuple[Tensor, MambaState]:
        """Token ids (B, L) -> normalized hidden states (B, L, d) and the state after the last real position."""
        residual = self.embeddings(input_ids)  # (B, L, d)
        if self.config.residual_in_fp32:
            residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
        conv_states, ssm_states = [], []
        for block, conv_state, ssm_state in zip(self.blocks, state.conv, state.ssm, strict=True):
            output, conv_state, ssm_state = block.mixer(block.norm(residual), conv_state, ssm_state, lengths)
            residual = residual + output
            conv_states.append(conv_state)
            ssm_states.append(ssm_state)
        return self.norm_f(residual), MambaState(tuple(conv_states), tuple(ssm_states))


class MambaLM(nn.Module):
    """A Mamba language model; `forward` for whole sequences, `prefill` and `step` from an explicit state.

    Args:
        config: the architecture.
        mixer: builds the mixer of a layer; `yunmin.gated` supplies one with gates.
    """

    def __init__(self, config: MambaConfig, mixer: MixerFactory = MambaMixer) -> None:
        super().__init__()
        self.config = config
        self.backbone = MambaBackbone(config, mixer)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight

    @classmethod
    def from_tensors(
        cls,
        config: MambaConfig,
        tensors: Mapping[str, Tensor],
        mixer: MixerFactory = MambaMixer,
        *,
        shares_memory: bool = False,
    ) -> MambaLM:
        """A model in evaluation mode.

        Args:
            config: the architecture.
            tensors: by checkpoint name.
            mixer: builds the mixer of a layer.
            shares_memory: whether its parameters are `tensors` themselves, which may lie in a file that is mapped and
                are not to be written to; else it owns copies.

        Raises:
            CheckpointError: a tensor is missing, unexpected or of a wrong shape; names it.
        """
        check_tensors(config, tensors)
        with torch.device("meta"):  # no time spent on initial values
            model = cls(config, mixer)
        own = {name: t.detach() if shares_memory else t.detach().clone() for name, t in tensors.items()}
        model.load_state_dict(own, assign=True, strict=False)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.backbone.embeddings.weight
        return model.eval()

    @classmethod
    def initialized(
        cls, config: MambaConfig, generator: torch.Generator | None = None, mixer: MixerFactory = MambaMixer
    ) -> MambaLM:
        """A fresh model with Mamba's own initialization, drawn from `generator`."""
        model = cls(config, mixer)
        nn.init.normal_(model.backbone.embeddings.weight, std=config.initializer_range, generator=generator)
        if not config.tie_word_embeddings:
            nn.init.normal_(model.lm_head.weight, std=config.initializer_range, generator=generator)
        for block in model.backbone.blocks:
            block.mixer.reset_parameters(config, generator)
        return model

    @property
    def device(self) -> torch.device:
        return self.backbone.embeddings.weight.device

    def tensors(self) -> dict[str, Tensor]:
        """The model's own weights by checkpoint name, without adapters or gates, detached but not copied.

        An adapter's wrapping (`in_proj.base_layer.weight`) is undone in the names.
        """
        names = expected_shapes(self.config)
        own = {name.replace(".base_layer.", "."): t for name, t in self.state_dict().items()}
        return {name: own[name].detach() for name in names}

    def new_state(self, batch_size: int) -> MambaState:
        """The state before the first token, in float32 (float64 for a float64 model)."""
        dtype = torch.promote_types(self.backbone.embeddings.weight.dtype, torch.float32)
        return MambaState.zeros(self.config, batch_size, dtype=dtype, device=self.device)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of whole sequences from the empty state.

        Args:
            input_ids: int64 (B, L).
            attention_mask: 1 or True at real tokens (B, L), padding anywhere; None if all are real.

        Returns:
            Logits (B, L, V); zero at padding.
        """
        state = self.new_state(input_ids.shape[0])
        if attention_mask is None:
            hidden, _ = self.backbone(input_ids, state)
            return self._logits(hidden)
        packed_ids, order, lengths = _real_tokens_first(input_ids, attention_mask)
        hidden, _ = self.backbone(packed_ids, state, lengths)
        unpacked = torch.zeros_like(hidden).scatter(1, order[..., None].expand_as(hidden), hidden)  # (B, L, d)
        # the head has no bias: of zeros it makes zeros
        return self._logits(unpacked.masked_fill(~attention_mask.bool()[..., None], 0.0))

    def prefill(
        self, input_ids: Tensor, state: MambaState | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        """Reads tokens and returns what is needed to go on.

        Args:
            input_ids: int64 (B, L), L >= 1.
            state: to continue from, not modified; None for the empty state.
            attention_mask: as in `forward`; every row needs at least one real token.

        Returns:
            Logits after each row's last real token (B, V), and the state there.

        Raises:
            ShapeError: a row has no token, or the state is of another batch size.
        """
        batch, length = input_ids.shape
        state = self.new_state(batch) if state is None else state
        if state.batch_size != batch:
            raise ShapeError(f"prefill: input_ids has {batch} rows, the state has {state.batch_size}")
        if length == 0:
            raise ShapeError("prefill: input_ids has no tokens, expected at least 1")
        lengths = None
        if attention_mask is not None:
            input_ids, _, lengths = _real_tokens_first(input_ids, attention_mask)
            if bool((lengths == 0).any()):
                raise ShapeError("prefill: a row of attention_mask has no real token")
        hidden, state = self.backbone(input_ids, state, lengths)
        if lengths is None:
            last = hidden[:, -1]  # (B, d)
        else:
            last = hidden[torch.arange(batch, device=hidden.device), lengths - 1]  # (B, d)
        return self._logits(last), state

    def score(self, input_ids: Tensor, state: MambaState | None = None) -> tuple[Tensor, MambaState]:
        """Reads tokens (B, L) from a state: logits after each of them (B, L, V), and the state after the last."""
        hidden, state = self.backbone(input_ids, self.new_state(input_ids.shape[0]) if state is None else state)
        return self._logits(hidden), state

    def step(self, token_ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """One token per sequence: ids (B,) and a state, not modified -> logits (B, V) and the next state."""
        return self.prefill(token_ids[:, None], state)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden)
        return logits


def check_tensors(config: MambaConfig, tensors: Mapping[str, Tensor]) -> None:
    """Checks names and shapes against the config.

    Raises:
        CheckpointError: names the first tensor that is missing, unexpected or of a wrong shape.
    """
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(f"tensor {name!r} is missing, expected shape {shape}")
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(f"tensor {name!r}: expected shape {shape}, found {tuple(tensors[name].shape)}")
    unexpected = sorted(set(tensors) - set(expected))
    if unexpected:
        raise CheckpointError(f"unexpected tensor {unexpected[0]!r}")


def _real_tokens_first(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moves padding behind each row's real tokens: ids (B, L), the source position of each (B, L), lengths (B,)."""
    if attention_mask.shape != input_ids.shape:
        raise ShapeError(f"attention_mask has shape {tuple(attention_mask.shape)}, expected {tuple(input_ids.shape)}")
    is_real = attention_mask.bool()
    order = torch.argsort((~is_real).to(torch.uint8), dim=1, stable=True)  # (B, L)
    return input_ids.gather(1, order), order, is_real.sum(1)
