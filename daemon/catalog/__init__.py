"""The models this daemon knows, in SQLite."""
