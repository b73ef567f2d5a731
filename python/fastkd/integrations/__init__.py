"""Use fastkd in other libraries' training loops; each library has its own module."""
