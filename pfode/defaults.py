"""Defaults and limits that a function of Python and the command line both have, stated once, without an import."""

__all__ = [
    "BATCH",
    "DEVICE",
    "MAX_GUIDANCE",
    "MODEL",
    "SAMPLES",
    "SEED",
    "STEPS",
    "STRENGTH",
    "TEXT_MODEL",
    "Bench",
    "Fit",
    "Train",
]

MODEL = "avatars"  # of the models that come with pfode
TEXT_MODEL = "letters"  # that sets words
DEVICE = "auto"  # CUDA where it is there, else the CPU
SAMPLES = 16  # of a run that says neither how many nor which seeds
SEED = 0  # of the first sample
STEPS = 20  # of a run that says neither steps nor nfe
BATCH = 64  # samples per denoiser call
MAX_GUIDANCE = 1e4  # of a scale of guidance, which is a typing error beyond
STRENGTH = 0.6  # share of noise that a picture to begin from is given


class Fit:
    """Of `fit_plan` and `pfode fit`."""

    CALLS = (4, 6, 8)  # a plan each, on the command line
    START = "auto"
    PARAMETERISATION = "general"
    LOSS = "balanced"
    ITERATIONS = 20
    SAMPLES = 256  # fitted on
    ACTIVE = 96  # of them, in one iteration
    CHECK = 128  # samples that choose
    TEACHER = 100  # steps of the fine solution
    LABEL = "all"
    TUNE_STEPS = 640  # of the optimiser
    TUNE_BATCH = 64  # samples in one of them


class Calibration:
    """Of `calibrate`."""

    SAMPLES = 16


class Train:
    """Of `TrainConfig` and `pfode train`."""

    SIGMA_DATA = 0.5  # standard deviation of the data, of the prediction "edm"
    STEPS = 2000  # of the optimiser
    BATCH = 64  # pictures in one of them
    ACCUM = 1  # parts of a batch
    RATE = 1e-3  # of learning, the highest
    SCHEDULE = "cosine"
    WARMUP = 100  # steps
    COOLDOWN = 0  # steps
    CLIP = 1.0  # of the gradient's norm
    EMA = (0.05, 0.1)  # widths of the averages, as shares of the run
    DROP = 0.1  # share of the pictures without their class
    SEED = 0


class Bench:
    """Of `bench` and `pfode bench`."""

    SEED = 1_000_000_000  # of the first measured sample, far from those that people draw
    EVALS = (3, 4, 5, 6, 8, 10, 15, 20)
    SAMPLES = 256
    VALIDATION = 64  # samples, others, that choose among alternatives
    TEACHER = 512  # most evaluations of the converged solution
    BATCH = 256  # samples per denoiser call
