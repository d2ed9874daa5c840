"""The modeld service: one asyncio process that makes every decision; children do the work."""

__version__ = "0.1.0"
