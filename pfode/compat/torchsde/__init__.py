"""torchsde's names on pfode: `from pfode.compat.torchsde import sdeint, sdeint_adjoint, BrownianInterval`.

Its own suite passes unedited (tests/upstream/torchsde.py). What is better than there: steps end at all output times
instead of being interpolated between; gradients of `sdeint_adjoint` are exact for every method; the Brownian motions
are the same numbers whatever was asked for before; srk calls f and g as often as its tableau has stages.
"""

from pfode.compat.torchsde import settings as settings
from pfode.compat.torchsde import types as types
from pfode.compat.torchsde.brownian import BaseBrownian as BaseBrownian
from pfode.compat.torchsde.brownian import BrownianInterval as BrownianInterval
from pfode.compat.torchsde.brownian import BrownianPath as BrownianPath
from pfode.compat.torchsde.brownian import BrownianTree as BrownianTree
from pfode.compat.torchsde.brownian import ReverseBrownian as ReverseBrownian
from pfode.compat.torchsde.brownian import brownian_interval_like as brownian_interval_like
from pfode.compat.torchsde.classes import BaseSDE as BaseSDE
from pfode.compat.torchsde.classes import SDEIto as SDEIto
from pfode.compat.torchsde.classes import SDEStratonovich as SDEStratonovich
from pfode.compat.torchsde.solve import sdeint as sdeint
from pfode.compat.torchsde.solve import sdeint_adjoint as sdeint_adjoint
