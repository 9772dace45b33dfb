"""The protocol: messages, states and decisions. Pure: no input or output, no clock, no randomness.

A step, per worker: compute; at the gate say ``Ready``; on ``Commit`` apply the update. Votes of a node's workers are
gathered by its agent (``node``), those of all agents by the coordinator (``coordinator``), which alone decides. Where
the job has one node, its ranks see each other's votes, and the coordinator hears later what they have committed.

A fault: the coordinator opens the next generation and sends ``Freeze``. Each worker answers ``Frozen`` with its step
and phase, and cannot commit in the old generation from then on. When all have answered the coordinator sends
``Decision``: every rank goes on at one step. Whole ranks publish their state, replacements restore it, all rebuild
the affected groups, ``Resume``. Another loss at any moment opens another generation and starts over.

Several nodes: each agent is a ``member``, who follows a coordinator or is it (``board``); its seat is a ``station``.
With many of them orders and answers go through a tree (``branch``). What agents say stands in ``between``.

Import order: messages <- between <- node, coordinator <- station, roster <- board <- seeker <- hanging <- member.
This package imports the standard library and msgspec only.
"""
