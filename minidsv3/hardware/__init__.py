"""Facts and clocks: what machines can do, how they are wired, and how long things take. Imports nothing of ours."""
