"""State: what a Run must keep, how a lost rank gets it back, and how a void attempt is undone.

Reading order: `pieces` (one tensor and its description), `inventory` (all pieces of a Run's objects),
`plan` (which replica sends which bytes), `segment` and `transfer` (the bytes travel through shared memory and are
checked by `digest`), `snapshot` (what a void attempt must put back).
"""
