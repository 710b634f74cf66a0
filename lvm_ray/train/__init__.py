"""Training: one loop for teacher and student, in this process or on Ray Train's workers.

launch      a recipe becomes a run folder: checks, this process or workers, export
preflight   whether a run can run, before it costs anything
rehearsal   one micro batch forward and backward before the first step
loop        the loop, and the journal of metrics
engine      DeepSpeed behind one small object; the only file that imports it
losses      cross-entropy and distillation, as functions and as the module that DeepSpeed wraps
schedule    the learning rate of a step
checkpoint  weights and moments by parameter name, whatever the worker count
"""
