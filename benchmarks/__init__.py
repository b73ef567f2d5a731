"""fastkd against what one would use instead: ``python -m benchmarks``.

A case (cases.py) is one shape, dtype and temperature; a rival (rivals.py) is one way to compute its
loss. suite.py checks every rival's answer against float64 (truth.py), then times them side by side
(measure.py) next to a plain stream through the same memory (stream.py). report.py and plots.py show
the results, claims.py holds them against what fastkd promises.
"""
