"""Models in memory: the only place that loads, holds and unloads them."""

from daemon.models.manager import ModelManager, RequestStatus
from daemon.models.resident import ModelState, ModelStatus
from daemon.models.turns import Priority, Terms

__all__ = ["ModelManager", "ModelState", "ModelStatus", "Priority", "RequestStatus", "Terms"]
