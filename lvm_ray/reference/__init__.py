"""Reference networks: what a small network devoted to one task makes of the same pairs in the same time.

networks    a small U-Net
heads       what it learns of each task, and how its outputs become a label
train       the task's own views, learnt for so many core-seconds
run         the stage: the networks of a recipe's tasks, scored on its test items
"""
