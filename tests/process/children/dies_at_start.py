"""Dies before it says hello, with an explanation on stderr."""

from __future__ import annotations

import sys

print("loading the engine", flush=True)
print("Error: libengine.so.1: größer als erlaubt", file=sys.stderr)
print("giving up", file=sys.stderr)
sys.exit(3)
