"""Agents of a job without training in them, for benchmarks/control_plane.py.

What an agent is made of is the package's own: Membership (so Peers, Member and, in one of them, Board) and Station, on
real TCP connections. Its workers are stand-ins that answer at once. Many agents share one operating system process.
"""
