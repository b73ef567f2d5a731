"""Compare fastkd with other ways to compute the same loss: ``python -m benchmarks``.

A case (cases.py) is one shape, dtype and temperature; a baseline (baselines.py) is one way to
compute its loss. suite.py checks every baseline's answer against float64 (truth.py), then times
the baselines side by side (measure.py), and measures the memory bandwidth (stream.py). report.py,
plots.py and readme.py show the results, and claims.py checks fastkd's claims.
"""
