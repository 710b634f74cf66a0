"""Other systems' command-line tools, which know the user's clusters and have the user's rights: kubectl, sbatch and its kin."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence

from lvm_ray.errors import UserError
from lvm_ray.storage import redacted

ANSWERS = 14.0  # seconds


def run(
    command: Sequence[str],
    then: str,
    text: str | None = None,
    environment: Mapping[str, str] | None = None,
    folder: str | None = None,
) -> str:
    """What a tool prints; `text` is what it reads, `folder` where it runs. `then`: what to do where it is not there.

    Raises UserError where it is not on the PATH, does not answer, or fails, with the last line of what it says.
    """
    try:
        done = subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, **(environment or {})},
            cwd=folder,
            timeout=ANSWERS,
            check=False,
        )
    except FileNotFoundError:
        raise UserError(f"{command[0]}: no such command on the PATH: {then}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} {command[1]}: no answer within {ANSWERS:.0f} s: {then}") from None
    except OSError as error:
        raise UserError(f"{command[0]}: cannot be run: {error.strerror}: {then}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"{command[0]} {command[1]}: {redacted(said[-1])[:400]}")
    return done.stdout
