"""`python -m lvm_ray` is `lvm-ray`."""

from lvm_ray.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
