"""What docs/scale.md is computed from: numbers that others have published, assumptions that are said to be some, and what was
measured here (`measure.py`, kept in docs/results/scale.json). Change one and `make scale` computes the page anew.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / "docs" / "results" / "scale.json"


@dataclass(frozen=True)
class Input:
    """A number with its unit, what it is, and where it comes from."""

    value: float
    unit: str
    what: str
    source: str


NVIDIA = "NVIDIA's figures, glennklockwood.com/garden/processors/h100"
P5 = "AWS p5.48xlarge, EC2 capacity blocks' table"
S3_RATES = "AWS S3, optimizing-performance: a partitioned prefix, of which a bucket gets more as its load grows"
S3_PRICES = "AWS S3 standard, us-east-1, March 2026"
ASSUMED = "assumed"

INPUTS = {
    # The GPUs and their machines.
    "gpu_bf16": Input(989e12, "operations/s", "products in bf16, dense, H100 SXM", NVIDIA),
    "gpu_fp32": Input(67e12, "operations/s", "fp32 without tensor cores, H100 SXM", NVIDIA),
    "convolution_share": Input(0.3, "", "part of those rates that the tokenizer's convolutions reach", ASSUMED),
    "gpu_memory": Input(80e9, "bytes", "memory of a GPU", NVIDIA),
    "gpu_memory_rate": Input(3.35e12, "bytes/s", "out of that memory; half of it is reckoned with", NVIDIA),
    "gpus_of_a_node": Input(8, "", "GPUs of a node", P5),
    "cores_of_a_node": Input(96, "", "cores of a node (192 vCPUs)", P5),
    "node_memory": Input(2048 * 2**30, "bytes", "memory of a node", P5),
    "node_disk": Input(8 * 3.84e12, "bytes", "NVMe of a node", P5),
    # How GPUs and machines are connected.
    "nvlink": Input(370e9, "bytes/s", "bus bandwidth of NCCL within a node, by rings", "NCCL's author, NVIDIA/nccl-tests#212"),
    "node_network": Input(400e9, "bytes/s", "network of a node, 3,200 Gbit/s", P5),
    "network_share": Input(
        0.8, "", "part of the network that NCCL reaches", "the same protocol overhead as NVLink's, 370 of 450"
    ),
    "nccl_hop": Input(20e-6, "s", "from node to node in NCCL's trees", ASSUMED),
    "gloo_hop": Input(50e-6, "s", "from worker to worker in gloo's ring, over TCP", ASSUMED),
    "host_copy": Input(5e9, "bytes/s", "from a GPU into the host's ordinary memory", ASSUMED),
    # Storage.
    "request": Input(0.03, "s", "a small request to an object store", "AWS whitepaper on S3: tens of milliseconds at the median"),
    "gets": Input(5500, "/s", "GET and HEAD requests of a prefix", S3_RATES),
    "node_storage": Input(10e9, "bytes/s", "between a node and an object store", ASSUMED),
    "disk_read": Input(5e9, "bytes/s", "from a node's NVMe", ASSUMED),
    "shared_write": Input(2e9, "bytes/s", "of one writer into a shared file system", ASSUMED),
    "shared_read": Input(10e9, "bytes/s", "of all readers of a shared file system", "FSx for Lustre: 10 TiB at 1,000 MB/s/TiB"),
    # The data.
    "image_bytes": Input(300e3, "bytes", "a photo as JPEG", ASSUMED),
    "id_bytes": Input(20, "bytes", "an image's name", ASSUMED),
    "bytes_per_token": Input(2.045, "bytes", "a token in the shards, names included", "docs/benchmarks.md"),
    # What stands in the code, or was measured for it.
    "unit_listed": Input(1.1e-3, "s", "Ray Data lists a unit", "lvm_ray/data/stream.py"),
    "unit_consumed": Input(18e-3, "s", "Ray Data consumes a unit", "lvm_ray/data/stream.py"),
    "start": Input(120, "s", "until workers compute: processes, imports, rendezvous, rehearsal", ASSUMED),
    # What goes wrong.
    "gpu_mtbf": Input(54 * 86400 * 16384 / 419, "s", "of a GPU between failures", "Llama 3: 419 in 54 days of 16,384 H100"),
    "spot_calm": Input(
        0.2, "a month", "how often a spot node is taken away", "AWS Spot Instance Advisor, February 2026: 15 to 20 %"
    ),
    "spot_rough": Input(30, "a month", "the same where every day is a bad day", ASSUMED),
    # Prices, in US dollars. They change: they are here to be replaced.
    "gpu_hour": Input(6.88, "$", "an H100 for an hour, on demand", "AWS p5, as of April 2026 (codesota.com/hardware/h100)"),
    "spot_share": Input(
        0.42, "", "a spot price over the one on demand", "AWS p5en offers of 6 August 2026 (dstackai/dstack#4110)"
    ),
    "month": Input(0.023, "$/GB", "a month in an object store", S3_PRICES),
    "thousand_gets": Input(0.0004, "$", "a thousand GETs", S3_PRICES),
}


def value(name: str) -> float:
    """An input by its name."""
    return INPUTS[name].value


@lru_cache(maxsize=1)
def measurements() -> dict[str, dict[str, object]]:
    """What `measure.py` has found: {name: {"value", "unit", "how"}}, and machine and date under their names."""
    found: dict[str, dict[str, object]] = json.loads(MEASURED.read_text(encoding="utf-8"))
    return found


def measured(name: str) -> float:
    """A measurement by its name."""
    return float(str(measurements()[name]["value"]))
