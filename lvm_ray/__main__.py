"""`python -m lvm_ray` is `lvm-ray`. A submitted job looks first whether its machine has what the package needs."""

import sys

from lvm_ray.cluster import arrival

if __name__ == "__main__":
    if arrival.is_job() and (missing := arrival.missing_modules()):
        print(f"lvm-ray job: this Python lacks {', '.join(missing)}: {arrival.IMAGE}", file=sys.stderr)
        raise SystemExit(2)
    from lvm_ray.cli import main

    raise SystemExit(main())
