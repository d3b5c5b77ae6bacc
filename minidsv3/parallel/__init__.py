"""Ranks: communicators, expert parallelism, pipeline schedules. Never imports the model: parts of it are handed in."""
