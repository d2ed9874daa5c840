"""Everything that touches an inference engine; never imports `daemon`."""
