"""Test fastkd's behavior under faults by the programs that ``docs/reliability.md`` lists.

A program of this package prints its results as a line ``figures: {...}``. ``python -m reliability
NAME``, which the Makefile calls, stores that line in ``results/NAME.json`` and in the document.
"""
