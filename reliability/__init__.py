"""Programs that test fastkd's behavior under faults; ``docs/reliability.md`` lists them.

A program of this package prints its results as a line ``figures: {...}``. ``python -m reliability
NAME``, which the Makefile calls, stores that line in ``results/NAME.json`` and in the document.
"""
