"""The entry points of group `torchrun.handlers`, one file per rendezvous store.

torchrun loads every handler of every installed package at each start, whatever backend was asked for, so nothing of
this library and nothing of torch is imported at module level here.
"""
