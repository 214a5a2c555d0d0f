"""The registry of systems: what --precond offers and snapshots can hold.

A new system is a file here and one line below.
"""

from training.system import EDM_SYSTEMS
from warm.systems.blurring import BLURRING
from warm.systems.cold import COLD
from warm.systems.edm_like import edm_like
from warm.systems.epsilon_scaling import with_epsilon_scaling
from warm.systems.ihdm import IHDM
from warm.systems.lee import LEE
from warm.systems.pfgmpp import PFGMPP, with_heavy_tails
from warm.systems.soft import SOFT
from warm.systems.stf import STF
from warm.systems.warm import WARM

SYSTEMS = {system.name: system for system in (
    *map(edm_like, EDM_SYSTEMS),
    WARM,
    BLURRING,
    LEE,
    IHDM,
    COLD,
    SOFT,
    edm_like(STF),
    with_epsilon_scaling(PFGMPP, with_heavy_tails),
)}
