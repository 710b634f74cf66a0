"""A verb sent elsewhere: to a Ray cluster, to Kubernetes, to Slurm, or into the background of this machine.

`submission` says what is sent, as plain values; `package` makes the wheel that travels with it. One file a target does the
sending, all with the same functions (`submission.Target`); `verbs` is what the command line calls. What a job does first when it
has arrived is in `arrival`.
"""
