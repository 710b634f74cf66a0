"""Training: one loop for teacher and student, in this process or on Ray Train's workers.

launch      a recipe becomes a run folder: checks, this process or workers, export
workers     Ray Train's workers: their number, their errors, leaving in time
loop        the loop, and the journal of metrics
engine      DeepSpeed behind one small object; the only file that imports it
losses      cross-entropy and distillation, as functions and as the module that DeepSpeed wraps
schedule    the learning rate of a step
checkpoint  weights and moments by parameter name, whatever the worker count
"""
