"""lvm-ray: data-efficient large vision models through sequential autoregression, on Ray."""

__version__ = "0.1.0"
