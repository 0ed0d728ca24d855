"""What the compiled network is told: addresses and sizes, as int64 numbers at named positions.

A kernel with an argument for each of a model's tensors would take hundreds. It takes a few arrays of numbers instead,
whose fields are named here, once for those who write them and those who read them. Widths D, N, R and d are padded to
multiples of 16 everywhere below, with zeros that change no result.
"""

from __future__ import annotations

from yunmin.kernels.matmul import ACTIVATION_FIELDS, WEIGHT_FIELDS

# --- one row per layer: where a weight is described, its WEIGHT_FIELDS begin at that position -------------------------
IN_PROJ = 0
X_PROJ = IN_PROJ + WEIGHT_FIELDS
DT_PROJ = X_PROJ + WEIGHT_FIELDS  # its bias is dt_proj's
OUT_PROJ = DT_PROJ + WEIGHT_FIELDS
(
    NORM,  # float32 (d,)
    CONV_TAPS,  # float32 (K, D)
    CONV_BIAS,  # float32 (D,)
    DECAY,  # float32 (D / 16, N, 16): log2(e) * A; N is not padded here, nor in the states
    SKIP,  # float32 (D,)
    INNER,  # D
    STATES,  # N, not padded
    RANK,  # R
    CONV_STATE,  # where the layer's states begin among the numbers of one sequence: (K-1, D)
    SSM_STATE,  # (N, D)
) = range(OUT_PROJ + WEIGHT_FIELDS, OUT_PROJ + WEIGHT_FIELDS + 10)
LAYER_FIELDS = SSM_STATE + 1

# --- the model -------------------------------------------------------------------------------------------------------
EMBEDDING = 0  # described as a weight; float32 ones lie as they are in the file, rows of d numbers, not padded
HEAD = EMBEDDING + WEIGHT_FIELDS
(
    FINAL_NORM,  # float32 (d,)
    MODEL_WIDTH,  # d, not padded
    TAPS,  # K
    STATE_NUMBERS,  # float32 numbers of one sequence's states
) = range(HEAD + WEIGHT_FIELDS, HEAD + WEIGHT_FIELDS + 4)
MODEL_FIELDS = STATE_NUMBERS + 1

# --- memory to work in, for a number of rows (positions of all sequences) ---------------------------------------------
HIDDEN = 0  # activations: the normalized residual stream
CONVOLVED = HIDDEN + ACTIVATION_FIELDS  # activations: SiLU(conv(x)), the scan's input
GATED = CONVOLVED + ACTIVATION_FIELDS  # activations: the scan's output behind the gate
(
    RESIDUAL,  # float32 (rows, d)
    XZ,  # float32 (rows, XZ_STRIDE): what in_proj gives, x and then z
    XZ_STRIDE,
    MAPS,  # float32 (rows, MAPS_STRIDE): what x_proj gives, step sizes and then input and output maps
    MAPS_STRIDE,
    DELTA,  # float32 (rows, D of the widest layer): what dt_proj gives
    DELTA_STRIDE,
    PRIVATE,  # memory that each thread has for itself: TILE_NUMBERS, then 16 N float32
    PRIVATE_STRIDE,  # bytes
    MEETING,  # of the barrier
) = range(GATED + ACTIVATION_FIELDS, GATED + ACTIVATION_FIELDS + 10)
SCRATCH_FIELDS = MEETING + 1


def padded(count: int, multiple: int = 16) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple
