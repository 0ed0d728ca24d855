"""How a setting of the study becomes an experiment: the same start, text and number of steps for every combination."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from research.ablation.grid import Setting
from research.ablation.settings import Settings
from research.ablation.sources import Texts
from research.studies.experiments import NO_PILLARS, Experiment
from research.studies.measures import Measures
from training.config import ARCHITECTURE_KEYS, TrainingConfig
from training.config_file import parse_config
from training.data import load_text, read_and_split
from yunmin.checkpoint import load_checkpoint
from yunmin.config import MambaConfig
from yunmin.corpus import texts_of
from yunmin.errors import TokenizerError
from yunmin.tokenizer import Tokenizer

_SHARED_WITH_BASE = (*ARCHITECTURE_KEYS, "sequence_length", "batch_size", "device", "matmul_precision")
_ORDERS = 5  # times that the order of channels is solved while weights are trained


@dataclass(frozen=True)
class Recipes:
    """Makes experiments.

    Attributes:
        settings: of the study.
        texts: of the study.
    """

    settings: Settings
    texts: Texts

    @property
    def measures(self) -> Measures:
        """How every experiment is measured: in float32, and rounded to int4, where the order of channels shows."""
        tokens, window = self.settings.test_tokens, self.settings.config().sequence_length
        return Measures(str(self.texts.task.test), tokens, window, int4=True)

    def base(self, seed: int) -> Experiment | None:
        """The dense model that all experiments of a seed start from; None where they start from a checkpoint."""
        if self.settings.checkpoint is not None:
            return None
        shared = {key: v for key, v in self.settings.training.items() if key in _SHARED_WITH_BASE}
        values = {**shared, **self.settings.base_training, **NO_PILLARS, "seed": seed, "data": str(self.texts.base)}
        return Experiment(values, label=f"base model, seed {seed}")

    def experiment(self, setting: Setting) -> Experiment:
        """One combination at one point: fine-tuning on the task's text, with the pillars that it has.

        Without PEFT all weights are trained; with PEFT alone they stay as they are, and only adapters are trained.
        """
        values = {key: v for key, v in self.settings.training.items() if key not in ARCHITECTURE_KEYS}
        values |= {
            "seed": setting.seed,
            "data": str(self.texts.task.train),
            "validation_data": str(self.texts.task.tune),
            "max_steps": self.steps,
        }
        values |= self._pillars(setting)
        if self.settings.checkpoint is not None:
            values["checkpoint"] = self.settings.checkpoint
        return Experiment(values, start=self.base(setting.seed), label=setting.name)

    def _pillars(self, setting: Setting) -> dict[str, Any]:
        point = setting.point
        values: dict[str, Any] = dict(NO_PILLARS)
        if setting.uses("scan"):
            values["scan_mode"] = self.settings.training.get("scan_mode", "dynamic")
            values["scan_update_frequency"] = max(1, self.steps // _ORDERS)
        if setting.uses("masking"):
            values |= {"enable_masking": True, "masking_tau": point["tau"], "target_sparsity": point["sparsity"]}
        if setting.uses("peft"):
            half = point["share"] / 2
            values |= {"enable_peft": True, "peft_r": int(point["rank"]), "peft_alpha": 2.0 * point["rank"]}
            values |= {"lora_share": half, "ia3_share": half}
            if not setting.uses("masking"):
                values["dense_share"] = 0.0
        return values

    # --- what is known before anything is trained -----------------------------------------------------------------

    @cached_property
    def steps(self) -> int:
        """Of every experiment: the epochs over the task's text, in the tokens that the models will have.

        Raises:
            TokenizerError: the checkpoint has no tokenizer.
            DataError: the text is too short.
        """
        config = self._task_config
        if config.max_steps is not None:
            return config.max_steps
        tokenizer, end_of_text = self._tokenizer()
        data = load_text(config, read_and_split(config), tokenizer, end_of_text)
        return self.settings.epochs * -(-len(data.training) // config.batch_size)

    @cached_property
    def model(self) -> MambaConfig:
        """The architecture that is adapted."""
        if self.settings.checkpoint is not None:
            return load_checkpoint(self.settings.checkpoint).config
        names = ("d_model", "n_layers", "vocab_size", "expand", "d_state", "d_conv")
        config = self._task_config
        return MambaConfig.create(**{name: getattr(config, name) for name in names})

    @property
    def _task_config(self) -> TrainingConfig:
        task = self.texts.task
        return self.settings.config(data=str(task.train), validation_data=str(task.tune))

    def _tokenizer(self) -> tuple[Tokenizer, int]:
        """The tokenizer of the base models, which depends on no seed, or the checkpoint's; and its end of text."""
        base = self.base(0)
        if base is not None:
            config = parse_config(dict(base.training))
            tokenizer = Tokenizer.train(texts_of(read_and_split(config)[0]), config.vocab_size)
            assert tokenizer.eos_id is not None
            return tokenizer, tokenizer.eos_id
        assert self.settings.checkpoint is not None
        checkpoint = load_checkpoint(self.settings.checkpoint)
        found = checkpoint.tokenizer
        ids = (*checkpoint.config.eos_token_ids, *([] if found is None or found.eos_id is None else [found.eos_id]))
        if found is None or not ids:
            raise TokenizerError(f"{checkpoint.folder}: a study needs a tokenizer with an end-of-text token")
        return found, ids[0]
