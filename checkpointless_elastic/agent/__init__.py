"""The agent: one process per node, run by torchrun; starts, watches, replaces and stops that node's workers.

`install` puts it in torchrun's place for an agent, `agent` is what torchrun calls, `context` and `servers` have the
processes, `forkserver` is the process that forks them, `runtime` is the event loop and the seam to the control plane.
"""
