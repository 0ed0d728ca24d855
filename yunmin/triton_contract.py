"""How a model is asked and how it answers under Triton: names of tensors, files and settings.

`export.triton` writes them into model repositories, `serving.triton` answers and asks by them. Text, `stream` and
`sampling_parameters` are named as in Triton's own backends for language models, whose clients thus work here.
"""

from __future__ import annotations

from yunmin.sampling import CHOICE_FIELDS

TEXT_INPUT = "text_input"  # BYTES [1]: the prompt
IDS_INPUT = "input_ids"  # INT64 [n]: the prompt as token ids, in place of text
STREAM_INPUT = "stream"  # BOOL [1]: whether tokens are sent as they come, or all of them at the end
SAMPLING_INPUT = "sampling_parameters"  # BYTES [1]: a JSON object of fields of `yunmin.sampling.SamplingParams`

TEXT_OUTPUT = "text_output"  # BYTES [1]: text that became certain
IDS_OUTPUT = "token_ids"  # INT64 [n]: ids of the tokens behind it
REASON_OUTPUT = "finish_reason"  # BYTES [1]: "stop" or "length" in the last response, else empty

# fields of `SamplingParams` that a request may set, in `sampling_parameters` or as request parameters
SAMPLING_FIELDS = ("max_tokens", *CHOICE_FIELDS)

# settings of `serving.settings.Settings` that `parameters` in config.pbtxt may give
SETTINGS = (
    "runtime",
    "threads",
    "slots",
    "queue",
    "prefill_chunk",
    "decode_stall",
    "cache_bytes",
    "cache_interval",
    "max_prompt_tokens",
    "max_tokens",
    "deadline_s",
)

ARTIFACT_FOLDER = "artifact"  # beside model.py
INITIAL_STATES = "initial_state"  # where Triton looks for the files that `initial_state` names
