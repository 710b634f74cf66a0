"""What others see of a run: Prometheus on a cluster, and the trackers that a recipe names.

prometheus  numbers of stages and trainings, exported by Ray
follow      the journal's lines, passed on while a training writes them
trackers    TensorBoard, MLflow, Weights & Biases

The journal (RUN/metrics.jsonl) is the one source; who gets its lines can neither stop nor slow down the training.
"""
