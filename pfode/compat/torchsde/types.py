"""The names of types that code written for torchsde imports from it."""

from collections.abc import Callable as Callable
from collections.abc import Sequence
from typing import Any as Any
from typing import Dict as Dict  # noqa: UP035
from typing import Optional as Optional
from typing import Tuple as Tuple  # noqa: UP035
from typing import Union as Union

import torch

Tensor = torch.Tensor
Tensors = Sequence[Tensor]
TensorOrTensors = Tensor | Tensors
Scalar = float | Tensor
Vector = Sequence[float] | Tensor
Module = torch.nn.Module
Modules = Sequence[Module]
ModuleOrModules = Module | Modules
Size = torch.Size
Sizes = Sequence[Size]
