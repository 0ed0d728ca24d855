"""Every error a user can cause: one line that says where, what was expected, what was found."""

from __future__ import annotations


class YunminError(Exception):
    """Base of the errors that the command line prints as one line, without a traceback."""


class ConfigError(YunminError):
    """A configuration has an unknown key or an impossible value."""


class CheckpointError(YunminError):
    """A checkpoint folder is missing, damaged, or does not fit its config."""


class ArtifactError(CheckpointError):
    """An artifact folder has a wrong hash, an unknown format version, or missing parts."""


class StateError(YunminError):
    """A saved state is damaged or belongs to another model."""


class ShapeError(YunminError):
    """Two tensors that must agree do not."""


class TokenizerError(YunminError):
    """There is no tokenizer, or it does not fit the model."""


class DataError(YunminError):
    """Training or evaluation data is missing, empty or malformed."""


class TrainingError(YunminError):
    """A run cannot go on, or cannot begin."""


class DivergenceError(TrainingError):
    """A loss or a gradient is not finite."""


class VerificationError(YunminError):
    """An export does not compute what the trained model computes."""


class SandboxError(YunminError):
    """Programs that a model wrote cannot be confined on this system, and so are not run."""


class RequestError(YunminError):
    """A generation request has an impossible value.

    Attributes:
        field: name of the offending field of the request.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class MissingExtraError(YunminError):
    """An optional package is needed and not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'yunmin[{extra}]'")
