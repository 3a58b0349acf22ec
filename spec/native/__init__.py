"""Loops that an implementation compiles where its framework has none as fast: how to, and no formula of a DLRM."""
