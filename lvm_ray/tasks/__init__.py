"""The tasks by name. To add one: write its file beside these and name it here."""

from lvm_ray.tasks.base import SPLITS, Item, PairTask, Picture, Sample, Seen, Split, Task, TrivialAnswer, View
from lvm_ray.tasks.colourise import Colourise
from lvm_ray.tasks.complete import Complete
from lvm_ray.tasks.deblur import Deblur
from lvm_ray.tasks.derain import Derain
from lvm_ray.tasks.detect import Detect
from lvm_ray.tasks.foreground import Foreground
from lvm_ray.tasks.images import Images
from lvm_ray.tasks.next_frame import NextFrame
from lvm_ray.tasks.objects import Objects
from lvm_ray.tasks.pictures import Pictures
from lvm_ray.tasks.pose import Pose
from lvm_ray.tasks.segmentation import Segmentation
from lvm_ray.tasks.video import Video

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        *(Segmentation, Foreground, Objects, Detect, Pose, Derain, Deblur, Colourise, Complete, Pictures),
        *(NextFrame, Video, Images),
    )
}

__all__ = ["SPLITS", "TASKS", "Item", "PairTask", "Picture", "Sample", "Seen", "Split", "Task", "TrivialAnswer", "View"]
