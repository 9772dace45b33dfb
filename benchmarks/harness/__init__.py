"""What the benchmarks, the demo and chaos share: start a job, read the files it writes, judge and report.

A job is judged from outside, by its processes and its files, so the same measure serves our launcher, plain
torchrun and training scripts that are not ours; of checkpointless_elastic only observe and chaos are used, which
do so too. The files are these, in the folder that the environment variable BENCH_DIR names:

    steps-<rank>.log   one line per committed step, appended and flushed when optimizer.step() has returned:
                       "<time.time_ns()> <step> <pid>", steps counted from 0
    final-<rank>.pt    what the rank ends with, written by torch.save: compared bit for bit, so no clock times
    in it

BENCH_STEPS says how many steps to do. BENCH_CHECKPOINT_EVERY says after how many steps to write a checkpoint
that the script finds again when it is started anew (0: never); it is 0 under our launcher and 10 under plain
torchrun."""
