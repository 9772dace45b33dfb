"""The protocol between agents, in virtual time: any number of agents, their workers and the directory in one process.

    clock       what happens next
    network     connections that delay, break, fall silent; groups of machines that are cut off
    directory   who coordinates, in which term
    worker      one incarnation of one rank, as a session behaves
    agent       a process that performs the acts of `Member` and `Station`, as the real agent does
    world       one job: agents, spares, what is lost and when
    faults      schedules of faults, drawn from a seed
    oracle      the invariants; a broken one raises Violation
    measure     messages and bytes, per step and per recovery
    script      stories in text files, and what came of them

All randomness comes from one seed, so any schedule can be replayed.
"""
