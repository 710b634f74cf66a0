"""Two temperatures in a few steps, to see that a sweep runs: minutes on a laptop."""

from ray import tune

space = {
    "distill.temperature": tune.grid_search([1.0, 2.0]),
    "train.steps": 20,
    "train.checkpoint_every": 10,
}
best = 1
repeats = 1
