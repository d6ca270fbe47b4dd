"""torchcde's names on pfode's paths and solvers: `import pfode.compat.torchcde as torchcde`.

`cdeint`, the coefficients and the controls take torchcde's (0.2.5) arguments, return the same shapes and raise errors
of the same types with the same words. What differs is in the work: missing values are filled for all series and
channels at once, adaptive steps end at the control's knots unless options say otherwise (torchcde integrates over the
kinks), so they are several times fewer at a smaller error, and log-signatures need no further package.
"""

from pfode.compat.torchcde import misc as misc
from pfode.compat.torchcde.coefficients import hermite_cubic_coefficients_with_backward_differences
from pfode.compat.torchcde.coefficients import linear_interpolation_coeffs as linear_interpolation_coeffs
from pfode.compat.torchcde.coefficients import logsig_windows as logsig_windows
from pfode.compat.torchcde.coefficients import logsignature_windows as logsignature_windows
from pfode.compat.torchcde.coefficients import natural_cubic_coeffs as natural_cubic_coeffs
from pfode.compat.torchcde.coefficients import natural_cubic_spline_coeffs as natural_cubic_spline_coeffs
from pfode.compat.torchcde.controls import CubicSpline as CubicSpline
from pfode.compat.torchcde.controls import InterpolationBase as InterpolationBase
from pfode.compat.torchcde.controls import LinearInterpolation as LinearInterpolation
from pfode.compat.torchcde.controls import NaturalCubicSpline as NaturalCubicSpline
from pfode.compat.torchcde.controls import TupleControl as TupleControl
from pfode.compat.torchcde.solver import cdeint as cdeint

__all__ = [
    "CubicSpline",
    "LinearInterpolation",
    "TupleControl",
    "cdeint",
    "hermite_cubic_coefficients_with_backward_differences",
    "linear_interpolation_coeffs",
    "logsig_windows",
    "logsignature_windows",
    "natural_cubic_coeffs",
    "natural_cubic_spline_coeffs",
]
