"""Strikes a job that a user's own command starts, and compares what it writes with a run without faults.

`command` has the options and their meaning, `trial` the two runs, `strikes` what can be done to a process. Nothing in
the script takes part. Faults come from outside, through signals and resource limits; only corrupted memory is the
work of the struck worker itself, on request (`worker.damage`).
"""
