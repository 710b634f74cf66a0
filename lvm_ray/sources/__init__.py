"""The sources by format. To add one: write its file beside these, and name the class among a task's `sources`."""

from lvm_ray.sources.base import Item, Picture, Region, Sample, Source

__all__ = ["Item", "Picture", "Region", "Sample", "Source"]
