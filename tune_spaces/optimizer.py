"""Learning rates, Muon's momentum and decay. Trials that are far behind stop early."""

from ray import tune

space = {
    "train.rate": tune.loguniform(5e-4, 2e-2),
    "train.muon_rate": tune.loguniform(5e-3, 0.1),
    "train.muon_momentum": tune.choice([0.8, 0.9, 0.95]),
    "train.weight_decay": tune.choice([0.0, 0.1]),
    "train.final_rate": tune.choice([0.0, 0.05, 0.2]),
}
trials = 16
stopping = "asha"
reference = {}
