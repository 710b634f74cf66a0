"""The tasks by name. To add one: write its file beside these and name it here."""

from lvm_ray.tasks.base import SPLITS, Item, PairTask, Picture, Sample, Seen, Split, Task, TrivialAnswer, View
from lvm_ray.tasks.derain import Derain
from lvm_ray.tasks.pose import Pose
from lvm_ray.tasks.segmentation import Segmentation

TASKS: dict[str, type[Task]] = {task.name: task for task in (Segmentation, Pose, Derain)}

__all__ = ["SPLITS", "TASKS", "Item", "PairTask", "Picture", "Sample", "Seen", "Split", "Task", "TrivialAnswer", "View"]
