"""Compare fastkd with other implementations of the distillation loss: ``python -m benchmarks``.

A case (cases.py) is a shape of logits, a dtype, and options of the loss. A baseline (baselines.py)
is an implementation of the loss. suite.py checks every baseline against float64 (truth.py), and
then times the baselines in turns (measure.py). suite.py also measures the memory bandwidth
(stream.py). report.py, plots.py and readme.py show the results. claims.py checks fastkd's claims.
"""
