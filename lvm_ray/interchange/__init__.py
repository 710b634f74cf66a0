"""From and for other programs: token files of DeLVM and LVM into shards and out of them, and their models into runs."""
