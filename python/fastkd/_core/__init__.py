"""Private: from checked arguments to a kernel, and back."""
