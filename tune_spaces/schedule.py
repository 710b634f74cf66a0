"""Shares that change over the training, found by a population: the worst members go on from the best, with other shares."""

from ray import tune

space = {
    "balance.shares.segmentation": tune.uniform(0.05, 1.0),
    "balance.shares.pose": tune.uniform(0.05, 1.0),
    "balance.shares.derain": tune.uniform(0.05, 1.0),
}
search = "population"
trials = 8
generations = 5
best = 1
reference = {}
