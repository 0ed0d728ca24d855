"""The training configuration: every key, its default and its limits."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]

ARCHITECTURE_KEYS = ("d_model", "n_layers", "vocab_size", "expand", "d_state", "d_conv")  # a checkpoint decides them
# the literature's: Galim et al. 2024 (arXiv 2410.09016) divide a Mamba into linear projections and the S6 module; LoRA
# on parts of a projection (LoRAp, Yoshimura et al. 2025) is left out, since cuts remove rows and columns anyway
PROJECTION_GROUPS = {
    "linear": ("in_proj", "out_proj"),
    "s6": ("x_proj", "dt_proj"),
    "all": ("in_proj", "x_proj", "dt_proj", "out_proj"),
}
_SPECTRUM_BATCHES = 20  # docs/pillars.md
_GATE_MEASURES = ("probability", "magnitude")  # of importance
RECORD_KEYS = (
    "log_interval",
    "validation_interval",
    "checkpoint_interval",
    "keep_checkpoints",
    "tensorboard",
    "wandb",
)
# how it is computed: nothing else is learned, but sums may round otherwise
COMPUTE_KEYS = ("gradient_accumulation", "gradient_checkpointing", "sharding")
RESUMABLE_KEYS = (*RECORD_KEYS, *COMPUTE_KEYS)  # a resumed run may change them


class TrainingConfig(BaseModel):
    """What `yunmin train` reads from YAML and `key=value` overrides; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)

    # where to start, and where to write
    checkpoint: str | None = Field(None, description="folder or Hub id to start from; none starts from scratch")
    project_name: str = Field("yunmin", min_length=1, description="project in the trackers")
    run_name: str | None = Field(None, description="folder below output_dir; none makes one from the time")
    output_dir: str = Field("training_outputs", description="where run folders go")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of weights, data order, gates and dropout")
    device: str = Field("auto", description="torch device; auto is CUDA where there is one")

    matmul_precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of products in projections and head while training; bfloat16 is faster on processors made for it",
    )

    gradient_accumulation: Count = Field(1, description="parts a process computes its share of a batch in")
    gradient_checkpointing: bool = Field(
        False, description="compute each mixer again in the backward pass instead of keeping what it needs"
    )
    sharding: Literal["auto", "none", "full"] = Field(
        "auto", description="full: each process of a launch keeps a shard of the weights; auto: if its launcher says so"
    )

    # the model, when it starts from scratch
    d_model: Count = Field(256, description="width of the residual stream")
    n_layers: Count = Field(4, description="number of layers")
    vocab_size: Count = Field(1000, description="ids of the tokenizer, which is trained on the training documents")
    expand: Count = Field(2, description="inner width, in multiples of d_model")
    d_state: Annotated[int, Field(ge=1, le=256)] = Field(16, description="states per inner channel")
    d_conv: Annotated[int, Field(ge=2, le=16)] = Field(4, description="taps of the convolution")

    # data
    data: tuple[str, ...] = Field(
        ("synthetic",), min_length=1, description="files, folders, JSONL, stdlib, synthetic, or Hub datasets"
    )
    validation_data: tuple[str, ...] = Field((), description="held-out sources; none splits off validation_share")
    validation_share: Annotated[float, Field(gt=0.0, lt=0.5)] = Field(0.05, description="share of the data held out")
    validation_tokens: Annotated[int, Field(ge=2)] = Field(32768, description="tokens scored at each validation")
    max_documents: Count | None = Field(None, description="read only this many documents of each source")
    sequence_length: Annotated[int, Field(ge=2)] = Field(256, description="tokens per packed sequence")

    # optimization
    batch_size: Count = Field(16, description="sequences per step, of all processes together")
    num_epochs: Count = Field(10, description="passes over the data, unless max_steps is given")
    max_steps: Count | None = Field(None, description="steps in all; none takes num_epochs over the data")
    learning_rate: Annotated[float, Field(gt=0.0)] = Field(1e-4, description="peak, of the weights")
    adapter_learning_rate: Annotated[float, Field(gt=0.0)] | None = Field(None, description="none: learning_rate")
    min_learning_rate_share: Share = Field(0.1, description="learning rate at the end, as a share of its peak")
    warmup_share: Share = Field(0.05, description="share of steps with rising learning rate")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(0.1, description="none on A_log, D, biases, norms")
    gradient_clip: Annotated[float, Field(gt=0.0)] = Field(1.0, description="largest norm of the gradient")

    # phases, as shares of all steps; those of disabled pillars fall to the others in proportion
    dense_share: Share = Field(0.3, description="of the dense phase")
    gate_share: Share = Field(0.3, description="of the gate phase")
    recover_share: Share = Field(0.2, description="of recovery behind fixed gates")
    adapter_share: Share = Field(0.2, description="of the adapter phase")
    distillation_weight: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="KL divergence from the starting checkpoint while recovering"
    )

    # pillar 1: scan order
    scan_mode: Literal["none", "static", "dynamic"] = Field(
        "dynamic",
        description="static solves the order once, dynamic every scan_update_frequency steps; by saliency not while "
        "blocks are learned",
    )
    scan_start: Literal["identity", "random"] = Field("identity", description="the first order")
    scan_update_frequency: Count = Field(1000, description="steps between two orders")
    scan_objective: Literal["auto", "correlation", "quantization", "n:m", "saliency"] = Field(
        "auto",
        description="neighbours are correlated channels, ones whose weights share an int4 scale well, ones of which an "
        "N:M mask keeps most, or ones of like saliency; auto: n:m for N:M masks, saliency for block gates, else "
        "quantization",
    )
    scan_gradient_weighted: bool = Field(
        False, description="weigh correlations by gradients; for scan_objective=correlation"
    )

    # pillar 2: masking
    enable_masking: bool = Field(True, description="learn or rank what matters, then cut")
    target_sparsity: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.3, description="share of inner channels to cut")
    target_state_sparsity: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="share of states to cut")
    sparsity_unit: Literal["parameters", "flops", "bytes"] = Field("parameters", description="what sparsity counts")
    gate_ranking: Literal["learned", "magnitude", "activation", "random"] = Field(
        "learned",
        description="what decides which channels are kept; all but learned cut without gates, and mask weights by "
        "magnitude",
    )
    state_ranking: Literal["learned", "magnitude", "activation", "random"] = Field(
        "activation", description="what decides which states are kept"
    )
    gate_start: Literal["activation", "equal"] = Field(
        "activation",
        description="first logits of learned gates: in the order of what a layer's channels and states carry, or all "
        "the same",
    )
    channel_gates: Literal["channel", "block"] = Field("channel", description="a gate for each channel or block")
    gate_block_size: Count = Field(16, description="channels, neighbours in scan order, that share a block gate")
    gate_estimator: Literal["gumbel_sigmoid", "hard_concrete"] = Field("gumbel_sigmoid", description="how gates draw")
    masking_initial_tau: Annotated[float, Field(gt=0.0)] = Field(2.0, description="first temperature of the gates")
    masking_tau: Annotated[float, Field(gt=0.0)] = Field(0.5, description="final temperature of the gates")
    gate_learning_rate: Annotated[float, Field(gt=0.0)] = Field(0.05, description="constant, of the gates")
    multiplier_learning_rate: Annotated[float, Field(gt=0.0)] = Field(0.05, description="of the Lagrange multipliers")
    channel_multiple: Count = Field(64, description="kept channels per layer are a multiple of this")
    uniform_widths: bool = Field(True, description="the same widths in all layers, as transformers requires")
    weight_mask: Literal["none", "element", "n:m"] = Field(
        "none", description="zeros in the projections of mask_targets"
    )
    mask_targets: tuple[Literal["in_proj", "x_proj", "dt_proj", "out_proj"], ...] = Field(
        ("in_proj", "out_proj"), description="projections with a weight mask"
    )
    mask_sparsity: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.5, description="share of zeros of an element mask")
    mask_n: Count = Field(2, description="weights kept of each mask_m neighbours in scan order")
    mask_m: Count = Field(4, description="neighbours in a group of an N:M mask")

    # pillar 3: adapters
    enable_peft: bool = Field(True, description="train adapters at the end")
    enable_ia3: bool = Field(True, description="IA3 on projections of middle importance")
    peft_r: Count = Field(16, description="rank of LoRA")
    peft_alpha: Annotated[float, Field(gt=0.0)] = Field(32, description="scale of LoRA, over its rank")
    peft_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.1, description="before LoRA")
    adapter_parameters: Count | None = Field(
        None, description="most trainable numbers of all adapters; LoRA's rank follows; none takes peft_r"
    )
    allocation: Literal["importance", "uniform", "random"] = Field(
        "importance", description="who gets what; uniform is LoRA on all lora_targets, random ranks by lot"
    )
    lora_share: Share = Field(0.4, description="share of projections, the most important ones, that get LoRA")
    ia3_share: Share = Field(0.4, description="share of projections, the next ones, that get IA3")
    lora_targets: tuple[Literal["in_proj", "x_proj", "dt_proj", "out_proj"], ...] = Field(
        ("in_proj", "x_proj", "dt_proj", "out_proj"),
        description="projections that may get LoRA; linear: in_proj, out_proj; s6: x_proj, dt_proj; all",
    )
    importance: Literal["gradient", "spectrum", "probability", "magnitude"] = Field(
        "spectrum",
        description="what ranks projections; spectrum also gives each the rank of LoRA that its gradient is worth",
    )
    lora_init: Literal["random", "gradient"] = Field(
        "gradient", description="LoRA's first directions: by chance, or those of the weights' gradients"
    )
    importance_steps: Count | None = Field(
        None,
        description="batches, before adapters, that measure importance with frozen weights; none: 20 for spectra, else "
        "earlier phases measure",
    )

    # records
    log_interval: Count = Field(10, description="steps between two lines of the log")
    validation_interval: Count | None = Field(
        None, description="steps between validations, besides those at the end of each phase"
    )
    checkpoint_interval: Count | None = Field(
        None, description="steps between checkpoints, besides those at the end of each phase"
    )
    keep_checkpoints: Count = Field(3, description="newest ones that are kept")
    tensorboard: bool = Field(True, description="write events for TensorBoard")
    wandb: bool = Field(False, description="log to Weights & Biases; WANDB_MODE is respected")

    @property
    def order_objective(self) -> Literal["correlation", "quantization", "n:m", "saliency"]:
        """What orders are solved for; docs/pillars.md has the measurements behind `auto`."""
        if self.scan_objective != "auto":
            return self.scan_objective
        has_groups = self.enable_masking and self.weight_mask == "n:m"
        if has_groups and not {"x_proj", "out_proj"}.isdisjoint(self.mask_targets):  # inner channels are their inputs
            return "n:m"
        has_blocks = self.enable_masking and self.channel_gates == "block" and self.target_sparsity > 0
        return "saliency" if has_blocks else "quantization"

    @property
    def has_learned_blocks(self) -> bool:
        """Whether neighbours in scan order share learned gates."""
        learns = self.enable_masking and self.gate_ranking == "learned" and self.target_sparsity > 0
        return learns and self.channel_gates == "block" and self.gate_block_size > 1

    @property
    def needs_spectra(self) -> bool:
        """Whether adapters go by the gradients of the frozen weights."""
        return self.lora_init == "gradient" or (self.importance == "spectrum" and self.allocation == "importance")

    @property
    def importance_batches(self) -> int:
        """Batches that importance is measured with right before the adapters; 0 where earlier phases measure it."""
        return self.importance_steps or (_SPECTRUM_BATCHES if self.needs_spectra else 0)

    @field_validator("data", "validation_data", "mask_targets", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("lora_targets", mode="before")
    @classmethod
    def _groups(cls, value: Any) -> Any:
        """Replaces groups of projections by their members."""
        names = (value,) if isinstance(value, str) else value
        if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
            return value
        return tuple(dict.fromkeys(member for name in names for member in PROJECTION_GROUPS.get(name, (name,))))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.distillation_weight > 0 and self.checkpoint is None:
            raise ValueError("distillation_weight needs a checkpoint to distil from")
        if self.lora_share + self.ia3_share > 1 + 1e-9:
            raise ValueError(f"lora_share + ia3_share must be at most 1, got {self.lora_share + self.ia3_share:g}")
        if self.mask_n >= self.mask_m:
            raise ValueError(f"mask_n must be below mask_m, got {self.mask_n} of {self.mask_m}")
        if self.masking_tau > self.masking_initial_tau:
            raise ValueError("masking_tau must be at most masking_initial_tau: the temperature only falls")
        if self.scan_gradient_weighted and self.scan_objective != "correlation":
            raise ValueError("scan_gradient_weighted weighs correlations: it needs scan_objective=correlation")
        return self

    @model_validator(mode="after")
    def _importance_is_measured(self) -> Self:
        has_channel_gates = self.enable_masking and self.target_sparsity > 0
        reads_gates = self.enable_peft and self.allocation == "importance" and self.importance in _GATE_MEASURES
        if reads_gates and not has_channel_gates:
            raise ValueError(f"importance={self.importance} is a measure of channel gates, and there are none")
        if self.importance in _GATE_MEASURES and self.gate_ranking != "learned":
            raise ValueError(f"importance={self.importance} is a measure of gates, gate_ranking must be learned")
        ranks_gradients = self.importance == "gradient" and self.allocation == "importance"
        if self.importance_steps and not (self.needs_spectra or ranks_gradients):
            raise ValueError(
                "importance_steps is for allocation=importance by gradient or spectrum, or for lora_init=gradient"
            )
        if reads_gates and self.importance == "magnitude" and self.gate_start != "equal":
            raise ValueError("importance=magnitude compares logits that started alike, gate_start must be equal")
        is_measured = self.allocation != "importance" or self.importance_batches > 0
        if self.enable_peft and not self.enable_masking and self.dense_share == 0 and not is_measured:
            raise ValueError(
                "enable_peft without enable_masking needs dense_share > 0 to measure importance in, or importance_steps"
            )
        return self
