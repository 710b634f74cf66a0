"""The sweep: a search over trainings of the student, on Ray Tune.

    SWEEP/space.json    what is searched, so that another search is not mixed into it
    SWEEP/answers/      one teacher cache for all trials
    SWEEP/trials/00007  an ordinary run folder, and what became of it: trial.json, failed.json or stopped.json
    SWEEP/sweep.json SWEEP/best.yaml SWEEP/report.html

SWEEP is PIPELINE/tune/{name of the space's file}. A sweep is rounds of trials that are listed before they start. Its state is its
trials' folders and nothing else: the same command lists the same trials, keeps what is finished and goes on with the rest.
"""
