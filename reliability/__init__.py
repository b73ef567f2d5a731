"""Test fastkd by the programs that ``docs/reliability.md`` lists.

A program of this package prints its results as a line ``figures: {...}``. ``python -m reliability
NAME`` runs a program, and stores the results in ``results/NAME.json`` and in the document.
"""
