"""Training: one loop for teacher and student, in this process or on Ray Train's workers.

launch      a recipe becomes a run folder: checks, this process or workers, export
preflight   whether a run can run, before it costs anything
job         what a worker needs of a recipe: a plain value
workers     Ray Train's workers: their number, their errors, leaving in time
work        a worker's part: models, rehearsal, loop
loop        the loop: load, step, log, validate, save
meter       the journal of metrics: what one sees
validation  held-out sentences, scored at each checkpoint
profile     a trace of three steps
engine      DeepSpeed behind one small object; the only file that imports it
losses      cross-entropy and distillation: the module that DeepSpeed wraps
divergences what students learn from teachers, as functions
caching     a teacher's answers to every sentence of a plan, kept
schedule    the learning rate of a step
checkpoint  weights and moments by parameter name, whatever the worker count
"""
