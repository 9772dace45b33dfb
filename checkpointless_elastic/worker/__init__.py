"""Inside a training process: bootstrap, channel to the agent, Run, gate, RNG."""
