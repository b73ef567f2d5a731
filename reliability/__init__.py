"""Test what fastkd promises, by the programs that ``docs/reliability.md`` lists.

A program prints its results as a line ``figures: {...}``, or as the summary of a test runner or
of libFuzzer.
``python -m reliability NAME`` runs a program, and stores the results in ``results/NAME.json`` and
in the document.
"""
