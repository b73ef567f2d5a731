"""The command line, ``python -m fastkd``: what each command takes and does."""
