"""The registry of systems: what --precond offers and snapshots can hold. A new system is one line here."""

from training.system import EDM_SYSTEMS
from warm.blurring import BLURRING
from warm.cold import COLD
from warm.edm_like import edm_like
from warm.epsilon_scaling import with_epsilon_scaling
from warm.ihdm import IHDM
from warm.lee import LEE
from warm.pfgmpp import PFGMPP, with_heavy_tails
from warm.soft import SOFT
from warm.stf import STF
from warm.warm import WARM

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
