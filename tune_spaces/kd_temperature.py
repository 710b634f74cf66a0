"""How soft a teacher's answers should be: seven temperatures."""

from ray import tune

space = {"distill.temperature": tune.grid_search([0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0])}
