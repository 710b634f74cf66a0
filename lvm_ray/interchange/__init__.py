"""Tokens from and for other programs: the token files of DeLVM and of LVM, into shards and out of them."""
