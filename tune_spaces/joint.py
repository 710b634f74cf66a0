"""Temperature and augmentation at once: what helps a student that sees few versions need not help one that sees many."""

from ray import tune

space = {
    "distill.temperature": tune.loguniform(0.5, 8.0),
    "balance.ratios.derain": tune.qloguniform(1, 50, 1),
}
