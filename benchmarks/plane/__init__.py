"""Agents of a job without training in them, for benchmarks/control_plane.py.

What an agent is made of is the package's own: Membership (so Peers, Member and, in one of them, Board) and Station, on
real TCP connections. Its workers are stand-ins that answer at once. Many agents share one operating system process.
"""

import os

os.environ.setdefault(
    "RES_OPTIONS", "timeout:1 attempts:1"
)  # torch asks the DNS for the name of each connection ...
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # ... and says so for each that has none
