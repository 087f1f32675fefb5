"""The structure of a network: its calls in order, its blocks, and how to run a part of it."""
