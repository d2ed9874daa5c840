"""Models in memory: the only place that loads, holds and unloads them."""

from daemon.models.manager import ModelManager
from daemon.models.resident import ModelState, ModelStatus

__all__ = ["ModelManager", "ModelState", "ModelStatus"]
