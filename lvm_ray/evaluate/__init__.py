"""Evaluation: prompts of training pairs, answers scored by the tasks, each beside a floor and a ceiling that need no model.

prompts     which training pairs stand before a query
floors      the answers that need no model, and the best that the tokenizer allows
score       one unit of work: queries in, measures out
statistics  measures to `evaluation.json`: intervals, progress
run         the stage: units here or in Ray, files of the run folder
study       a trained run asked in every way that some settings make
predict     answers for anybody's pictures
"""
