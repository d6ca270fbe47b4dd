"""Defaults that a function of Python and the command line both have, stated once. Nothing is imported here."""

MODEL = "emoji"  # of the models that come with pfode
DEVICE = "auto"  # CUDA where it is there, else the CPU
SAMPLES = 16  # of a run that says neither how many nor which seeds
SEED = 0  # of the first sample
STEPS = 20  # of a run that says neither steps nor nfe
BATCH = 64  # samples per denoiser call
STRENGTH = 0.6  # share of noise that a picture to begin from is given
