"""The tasks by name. To add one: write its file beside these and name it here."""

from lvm_ray.tasks.base import SPLITS, Item, PairTask, Picture, Sample, Seen, Split, Task, TrivialAnswer, View
from lvm_ray.tasks.deblur import Deblur
from lvm_ray.tasks.derain import Derain
from lvm_ray.tasks.images import Images
from lvm_ray.tasks.objects import Objects
from lvm_ray.tasks.pictures import Pictures
from lvm_ray.tasks.pose import Pose
from lvm_ray.tasks.segmentation import Segmentation
from lvm_ray.tasks.video import Video

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Segmentation, Pose, Derain, Deblur, Objects, Pictures, Video, Images)
}

__all__ = ["SPLITS", "TASKS", "Item", "PairTask", "Picture", "Sample", "Seen", "Split", "Task", "TrivialAnswer", "View"]
