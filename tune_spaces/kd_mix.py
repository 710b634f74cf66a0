"""What to learn from a teacher, and how much of it: temperature, weight and divergence together."""

from ray import tune

space = {
    "distill.temperature": tune.loguniform(0.5, 8.0),
    "distill.weight": tune.loguniform(0.25, 4.0),
    "distill.divergence": tune.choice(["forward_kl", "reverse_kl", "jsd"]),
}
search = "tpe"
trials = 24
