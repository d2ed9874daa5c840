"""Everything HTTP: one gate, and a package or module for each surface."""
