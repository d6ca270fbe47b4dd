"""Preconditioning: D is exact whenever F is, for every prediction and process."""

import math

import pytest
import torch
from torch import nn

import pfode
from pfode.errors import UsageError
from pfode.prediction import PREDICTIONS
from pfode.scores.denoiser import Denoiser
from tests_scores import NAMES, network  # type: ignore[import-not-found]
