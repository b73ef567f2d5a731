"""Compare fastkd with other ways to compute the same loss: ``python -m benchmarks``.

A case (cases.py) is one shape, dtype and temperature; a baseline (baselines.py) is one way to
compute its loss. suite.py checks every baseline's answer against float64 (truth.py), then times
them side by side (measure.py), with a stream through the same memory (stream.py). report.py and
plots.py show the results, and claims.py checks them against fastkd's claims.
"""
