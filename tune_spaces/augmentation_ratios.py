"""How many versions of each original the small tasks should be seen in, on recipes with the embedded data set's tasks.

More copies than were tokenised are refused: raise tasks.NAME.copies first.
"""

from ray import tune

space = {
    "balance.ratios.pose": tune.qloguniform(1, 20, 1),
    "balance.ratios.derain": tune.qloguniform(1, 50, 1),
}
reference = {}  # against the recipe as it is
