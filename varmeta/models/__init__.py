"""The Pyro program of a set of tasks, its checks, and what its numbers are called."""
