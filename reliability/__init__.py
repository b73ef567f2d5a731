"""Programs that test fastkd's behavior under faults; ``docs/reliability.md`` lists them.

A program of this package prints what it found as a line ``figures: {...}``. Started through
``python -m reliability NAME``, as the Makefile does, the line is kept in ``results/NAME.json`` and
shown in the document.
"""
