"""The model's configuration, read from Hugging Face's and from `mamba_ssm`'s `config.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from yunmin.errors import ConfigError

# Keys that `transformers` writes beside the architecture and that change nothing about what is computed here.
_HF_METADATA = frozenset(
    """_name_or_path architectures attn_implementation auto_map chunk_size_feed_forward dtype experts_implementation
    fused_add_norm id2label is_encoder_decoder label2id layer_types model_type output_attentions output_hidden_states
    problem_type return_dict torch_dtype transformers_version use_associative_scan use_cache use_mambapy
    use_mambapy_fallback torchscript""".split()
)
# Names under which converted checkpoints repeat the same quantity: {repeated: authoritative}.
_HF_ALIASES = {"d_model": "hidden_size", "n_layer": "num_hidden_layers", "d_inner": "intermediate_size"}
_SSM_TOP = frozenset(
    """d_model d_intermediate n_layer vocab_size ssm_cfg attn_layer_idx attn_cfg rms_norm residual_in_fp32
    fused_add_norm pad_vocab_size_multiple tie_embeddings""".split()
)
_SSM_CFG = frozenset(
    """layer d_state d_conv expand dt_rank dt_min dt_max dt_init dt_scale dt_init_floor conv_bias bias
    use_fast_path""".split()
)


@dataclass(frozen=True)
class MambaConfig:
    """A Mamba-1 language model (Gu & Dao 2023); symbols are explained in `yunmin.scan`.

    Attributes:
        vocab_size: rows of the embedding, padding rows included.
        d_model: width d of the residual stream.
        d_inner: inner width D of each layer.
        d_state: state size N of each layer.
        dt_rank: rank R of the step-size projection.
        d_conv: taps K of the convolution.
        n_tokens: ids below this may be sampled, the rest of `vocab_size` is padding; 0 stands for all.
    """

    vocab_size: int
    d_model: int
    d_inner: tuple[int, ...]
    d_state: tuple[int, ...]
    dt_rank: int
    d_conv: int = 4
    n_tokens: int = 0
    norm_eps: float = 1e-5
    use_bias: bool = False
    use_conv_bias: bool = True
    tie_word_embeddings: bool = True
    residual_in_fp32: bool = True
    rescale_prenorm_residual: bool = False
    initializer_range: float = 0.1
    time_step_min: float = 1e-3
    time_step_max: float = 1e-1
    time_step_floor: float = 1e-4
    time_step_scale: float = 1.0
    time_step_init_scheme: str = "random"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:  # noqa: C901 (one flat check after the other)
        if self.n_tokens == 0:
            object.__setattr__(self, "n_tokens", self.vocab_size)
        for name in ("vocab_size", "d_model", "dt_rank", "n_tokens"):
            _require_positive(name, getattr(self, name))
        if not isinstance(self.d_conv, int) or self.d_conv < 2:
            raise ConfigError(f"d_conv must be an integer >= 2, got {self.d_conv!r}")
        if not self.d_inner or len(self.d_inner) != len(self.d_state):
            raise ConfigError(
                f"d_inner and d_state need one value per layer, got {len(self.d_inner)} and {len(self.d_state)}"
            )
        for name in ("d_inner", "d_state"):
            for layer, width in enumerate(getattr(self, name)):
                _require_positive(f"{name}[{layer}]", width)
        if self.n_tokens > self.vocab_size:
            raise ConfigError(f"n_tokens must be at most vocab_size {self.vocab_size}, got {self.n_tokens}")
        for name in (
            "norm_eps",
            "initializer_range",
            *(f"time_step_{kind}" for kind in ("min", "max", "floor", "scale")),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
                raise ConfigError(f"{name} must be a positive number, got {value!r}")
        for name in (
            "use_bias",
            "use_conv_bias",
            "tie_word_embeddings",
            "residual_in_fp32",
            "rescale_prenorm_residual",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.time_step_min > self.time_step_max:
            raise ConfigError(f"time_step_min {self.time_step_min} exceeds time_step_max {self.time_step_max}")
        if self.time_step_init_scheme not in ("random", "constant"):
            raise ConfigError(
                f"time_step_init_scheme must be 'random' or 'constant', got {self.time_step_init_scheme!r}"
            )
        special = [("bos_token_id", self.bos_token_id), ("pad_token_id", self.pad_token_id)]
        for name, token_id in [*special, *(("eos_token_id", token_id) for token_id in self.eos_token_ids)]:
            is_id = isinstance(token_id, int) and not isinstance(token_id, bool) and 0 <= token_id < self.vocab_size
            if not is_id and not (token_id is None and name != "eos_token_id"):
                raise ConfigError(f"{name} must be an integer in 0..{self.vocab_size - 1}, got {token_id!r}")

    @property
    def n_layers(self) -> int:
        return len(self.d_inner)

    @property
    def is_uniform(self) -> bool:
        """Whether every layer has the same widths, as `transformers` requires."""
        return len(set(self.d_inner)) == 1 and len(set(self.d_state)) == 1

    @property
    def model_type(self) -> str:
        """The name `peft` and `transformers` know this architecture by."""
        return "mamba"

    @classmethod
    def create(
        cls,
        *,
        vocab_size: int,
        d_model: int,
        n_layers: int,
        expand: int = 2,
        d_state: int = 16,
        dt_rank: int | str = "auto",
        **options: Any,
    ) -> MambaConfig:
        """A config with equal layers: `d_inner = expand * d_model`, and `dt_rank = ceil(d_model / 16)` if "auto"."""
        _require_positive("n_layers", n_layers)
        return cls(
            vocab_size=vocab_size,
            d_model=d_model,
            d_inner=(expand * d_model,) * n_layers,
            d_state=(d_state,) * n_layers,
            dt_rank=_resolve_dt_rank(dt_rank, d_model),
            **options,
        )

    def with_widths(self, *, d_inner: Sequence[int] | None = None, d_state: Sequence[int] | None = None) -> MambaConfig:
        """The same model with other widths per layer."""
        return replace(
            self,
            d_inner=self.d_inner if d_inner is None else tuple(d_inner),
            d_state=self.d_state if d_state is None else tuple(d_state),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of a Hugging Face folder.

        `intermediate_size` and `state_size` are integers when all layers agree, else one integer per layer (which
        `transformers` refuses, as it must).
        """
        uniform = self.is_uniform
        eos = self.eos_token_ids
        return {
            "architectures": ["MambaForCausalLM"],
            "model_type": "mamba",
            "vocab_size": self.vocab_size,
            "n_tokens": self.n_tokens,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layers,
            # transformers 5 refuses a fractional `expand`; the explicit intermediate_size decides
            "expand": max(1, round(max(self.d_inner) / self.d_model)),
            "intermediate_size": self.d_inner[0] if uniform else list(self.d_inner),
            "state_size": self.d_state[0] if uniform else list(self.d_state),
            "conv_kernel": self.d_conv,
            "time_step_rank": self.dt_rank,
            "hidden_act": "silu",
            "layer_norm_epsilon": self.norm_eps,
            "use_bias": self.use_bias,
            "use_conv_bias": self.use_conv_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
            "residual_in_fp32": self.residual_in_fp32,
            "rescale_prenorm_residual": self.rescale_prenorm_residual,
            "initializer_range": self.initializer_range,
            "time_step_min": self.time_step_min,
            "time_step_max": self.time_step_max,
            "time_step_floor": self.time_step_floor,
            "time_step_scale": self.time_step_scale,
            "time_step_init_scheme": self.time_step_init_scheme,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(eos) if len(eos) > 1 else (eos[0] if eos else None),
            "pad_token_id": self.pad_token_id,
            "dtype": "float32",
            "use_cache": True,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, where: str = "config.json") -> MambaConfig:
        """Reads either format; `model_type` or `hidden_size` marks Hugging Face's, `d_model` alone `mamba_ssm`'s.

        Raises:
            ConfigError: names the first unknown key or impossible value.
        """
        try:
            if "model_type" in raw or "hidden_size" in raw:
                return _from_hf(raw)
            if "d_model" in raw:
                return _from_mamba_ssm(raw)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        raise ConfigError(f"{where}: expected a Mamba config with 'hidden_size' or 'd_model', found neither")

    @classmethod
    def from_file(cls, path: str | Path) -> MambaConfig:
        """Reads `config.json`.

        Raises:
            ConfigError: the file is missing, no JSON object, or holds unknown or impossible values.
        """
        return cls.from_dict(read_config(path), where=str(path))


def read_config(path: str | Path) -> dict[str, Any]:
    """The content of a `config.json`.

    Raises:
        ConfigError: the file is missing or no JSON object.
    """
    path = Path(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: expected a config.json, found no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: expected JSON, {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def _require_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, got {value!r}")


def _resolve_dt_rank(dt_rank: object, d_model: int) -> int:
    if dt_rank == "auto":
        return math.ceil(d_model / 16)
    if isinstance(dt_rank, int):
        return dt_rank
    raise ConfigError(f"dt_rank must be 'auto' or a positive integer, got {dt_rank!r}")


def _per_layer(name: str, value: object, n_layers: int) -> tuple[int, ...]:
    if isinstance(value, list):
        if len(value) != n_layers:
            raise ConfigError(f"{name} lists {len(value)} widths for {n_layers} layers")
        for layer, width in enumerate(value):
            _require_positive(f"{name}[{layer}]", width)
        return tuple(value)
    _require_positive(name, value)
    assert isinstance(value, int)
    return (value,) * n_layers


def _refuse_unknown(raw: Mapping[str, Any], known: frozenset[str], where: str = "") -> None:
    unknown = sorted(set(raw) - known)
    if unknown:
        raise ConfigError(f"unknown key {where}{unknown[0]!r}")


def eos_ids(value: Any) -> tuple[int, ...]:
    """The ids of an `eos_token_id` entry, which is an integer, a list of them, or null."""
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


def _inner_width(expand: object, d_model: int) -> int:
    is_number = isinstance(expand, int | float) and not isinstance(expand, bool) and 0 < expand < math.inf
    if not is_number:
        raise ConfigError(f"expand must be a positive number, got {expand!r}")
    assert isinstance(expand, int | float)
    return int(expand * d_model)


def _require_mamba1(ssm_cfg: object, rms_norm: object) -> dict[str, Any]:
    """Refuses what both formats can name and this model is not; returns `ssm_cfg`."""
    if not isinstance(ssm_cfg, dict):
        raise ConfigError(f"ssm_cfg must be an object, got {ssm_cfg!r}")
    if ssm_cfg.get("layer", "Mamba1") != "Mamba1":
        raise ConfigError(f"ssm_cfg.layer must be 'Mamba1', got {ssm_cfg['layer']!r}")
    _refuse_unknown(ssm_cfg, _SSM_CFG, "ssm_cfg.")
    if rms_norm is not True:
        raise ConfigError(f"rms_norm must be true (LayerNorm is another model), got {rms_norm!r}")
    return ssm_cfg


_HF_FIELDS = {  # Hugging Face's key: our field, where the value is taken over as it is
    "vocab_size": "vocab_size",
    "n_tokens": "n_tokens",
    "conv_kernel": "d_conv",
    "layer_norm_epsilon": "norm_eps",
    **{
        f.name: f.name
        for f in fields(MambaConfig)
        if f.name.startswith(("use_", "time_step_", "tie_", "residual_", "rescale_", "initializer_"))
    },
    "bos_token_id": "bos_token_id",
    "pad_token_id": "pad_token_id",
}
_HF_KNOWN = frozenset(
    {*_HF_FIELDS, *_HF_METADATA, *_HF_ALIASES, *_HF_ALIASES.values()}
    | {"state_size", "time_step_rank", "expand", "hidden_act", "eos_token_id", "rms_norm", "ssm_cfg"}
    | {"pad_vocab_size_multiple", "quantization_config"}  # how weights are stored: yunmin.quantization reads it
)


def _from_hf(raw: Mapping[str, Any]) -> MambaConfig:
    if raw.get("model_type", "mamba") != "mamba":
        raise ConfigError(f"model_type must be 'mamba', got {raw['model_type']!r}")
    _refuse_unknown(raw, _HF_KNOWN)
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"hidden_act must be 'silu', got {raw['hidden_act']!r}")
    _require_mamba1(raw.get("ssm_cfg", {}), raw.get("rms_norm", True))
    # absent keys have transformers' defaults, since `save_pretrained` writes only what differs from them
    d_model, n_layers = raw.get("hidden_size", 768), raw.get("num_hidden_layers", 32)
    _require_positive("hidden_size", d_model)
    _require_positive("num_hidden_layers", n_layers)
    inner = _inner_width(raw.get("expand", 2), d_model)
    d_inner = _per_layer("intermediate_size", raw.get("intermediate_size", inner), n_layers)
    values = {"hidden_size": d_model, "num_hidden_layers": n_layers, "intermediate_size": d_inner[0]}
    for alias, name in _HF_ALIASES.items():
        if alias in raw and len(set(d_inner)) == 1 and raw[alias] != values[name]:
            raise ConfigError(f"{alias} is {raw[alias]!r} and {name} is {values[name]!r}; expected the same")
    if "n_tokens" in raw:
        _require_positive("n_tokens", raw["n_tokens"])
    taken = {ours: raw[theirs] for theirs, ours in _HF_FIELDS.items() if theirs in raw}
    return MambaConfig(
        **{"vocab_size": 50280, "pad_token_id": 0, "bos_token_id": 0, **taken},
        d_model=d_model,
        d_inner=d_inner,
        d_state=_per_layer("state_size", raw.get("state_size", 16), n_layers),
        dt_rank=_resolve_dt_rank(raw.get("time_step_rank", "auto"), d_model),
        eos_token_ids=eos_ids(raw.get("eos_token_id", 0)),
    )


def _from_mamba_ssm(raw: Mapping[str, Any]) -> MambaConfig:
    _refuse_unknown(raw, _SSM_TOP)
    ssm = _require_mamba1(raw.get("ssm_cfg", {}), raw.get("rms_norm", True))
    if raw.get("d_intermediate", 0) != 0:
        raise ConfigError(f"d_intermediate must be 0 (no MLP blocks), got {raw['d_intermediate']!r}")
    if raw.get("attn_layer_idx"):
        raise ConfigError(f"attn_layer_idx must be empty (no attention layers), got {raw['attn_layer_idx']!r}")
    for name in ("d_model", "n_layer", "vocab_size"):
        _require_positive(name, raw.get(name))
    multiple = raw.get("pad_vocab_size_multiple", 8)
    _require_positive("pad_vocab_size_multiple", multiple)
    names = {"dt_min": "time_step_min", "dt_max": "time_step_max", "dt_init": "time_step_init_scheme"}
    names |= {"dt_scale": "time_step_scale", "dt_init_floor": "time_step_floor", "d_conv": "d_conv"}
    names |= {"conv_bias": "use_conv_bias", "bias": "use_bias"}
    d_model, n_layers = raw["d_model"], raw["n_layer"]
    return MambaConfig(
        vocab_size=math.ceil(raw["vocab_size"] / multiple) * multiple,
        n_tokens=raw["vocab_size"],
        d_model=d_model,
        d_inner=(_inner_width(ssm.get("expand", 2), d_model),) * n_layers,
        d_state=(ssm.get("d_state", 16),) * n_layers,
        dt_rank=_resolve_dt_rank(ssm.get("dt_rank", "auto"), d_model),
        tie_word_embeddings=raw.get("tie_embeddings", True),
        residual_in_fp32=raw.get("residual_in_fp32", True),
        rescale_prenorm_residual=True,  # what mamba_ssm's own initialization does
        initializer_range=0.02,
        **{ours: ssm[theirs] for theirs, ours in names.items() if theirs in ssm},
    )
