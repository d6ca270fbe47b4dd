"""Controlled differential equations dz = f(t, z) dX: paths through data, and `cdesolve` on the loop of pfode.ode.

paths     a path is a value: piecewise polynomials between knots, of which it gives values, derivatives and increments
          (paths.py); linear, rectilinear, natural and hermite make one of a series
filling   missing values (NaN) and tridiagonal systems, for all series and channels at once (filling.py)
solve     the field f(t, z) X'(t), its knots the stops of the one loop (solve.py)
online    the same solve fed observation by observation (online.py)
logsig    log-signatures of windows, for long series (logsig.py)
"""

from pfode.cde.filling import fill_forward as fill_forward
from pfode.cde.filling import fill_linear as fill_linear
from pfode.cde.logsig import logsig_windows as logsig_windows
from pfode.cde.logsig import logsignature as logsignature
from pfode.cde.logsig import logsignature_channels as logsignature_channels
from pfode.cde.online import Online as Online
from pfode.cde.paths import Path as Path
from pfode.cde.paths import hermite as hermite
from pfode.cde.paths import linear as linear
from pfode.cde.paths import natural as natural
from pfode.cde.paths import rectilinear as rectilinear
from pfode.cde.solve import cdesolve as cdesolve
