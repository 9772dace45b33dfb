"""The command `checkpointless`: looks at a running job and moves ranks between its nodes; entry of `chaos`."""
