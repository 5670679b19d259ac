"""What runs at a client: local training, of one client or of a cohort together."""

from clients.app import CohortApp
from clients.site import Site
from clients.training import LocalTraining

__all__ = ["CohortApp", "LocalTraining", "Site"]
