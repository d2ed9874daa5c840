"""Bringing models to this machine: jobs in the daemon, and the fetcher that each one runs."""
