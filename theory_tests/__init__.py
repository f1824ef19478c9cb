"""Property-based, symbolic and theory-against-simulation tests of the UFM."""
